"""What a method sees: the layers of a model, and what one batch left at each.

Others use `Layers` with `Layer` and `Parameter`, `Captured` with `LayerArrays` and `Head`,
`Transfer`, the kernels and biases of a tree as `blocks`, the products that `rows` have, and
`map_layers`, which does the same work for every layer.

May import `_tracing` and the ground floor.
"""
