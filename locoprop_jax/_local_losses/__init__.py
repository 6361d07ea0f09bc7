"""Methods that improve each layer by a local loss of its own: LocoProp, PocoProp, ProxProp.

No other wing uses it: its names are public, or its own. It may import `_layers`, `_training` and
the ground floor.
"""
