"""Reading a loss's trace: which of its equations are layers, and what lies around them.

Others use `trace` and what it returns, a `Traced`: the loss as a flat `Program` with the sites of
its layers. They rearrange arrays by `chains`, cut heads out of the program by `heads`, ask `flow`
and `separable` what depends on what, and run the loss by `evaluate`.

May import the ground floor.
"""
