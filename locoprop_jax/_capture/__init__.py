"""From a loss to the arrays: `find_layers`, `value_grad_and_capture` and `accumulate`.

Others use these three, and what tells the curvature of a loss by its outputs: `find_targets` with
`Target`, and `Point`, `cotangents`, `root_of` and `weighted` of `curvature`.

May import `_layers`, `_tracing` and the ground floor.
"""
