"""Pictures of a model: its layers, and the spectra that a method sees of their inputs.

Others use `plot`, which is public. Matplotlib is imported only when something is drawn.

May import `_layers`, `_neurons` and the ground floor.
"""
