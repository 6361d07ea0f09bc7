"""Methods of the loss's curvature: K-FAC, KFRA, natural gradient, Gauss-Newton, Hessian-free.

No other wing uses it: its names are public, or its own. It may import all wings but
`_local_losses`, and the ground floor.
"""
