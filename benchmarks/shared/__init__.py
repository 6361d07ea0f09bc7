"""What experiments, costs and peers have in common, and the committed values that they start from.

Data, networks, methods, training, timing, tables, plots, command lines; it imports none of them.
"""
