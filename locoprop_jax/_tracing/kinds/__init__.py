"""How sites are read, one file for each kind of layer.

Each reader looks at one equation whose operands' labels say that a parameter meets data, and
returns a `Site`, or the reason why there is none.
"""
