"""Methods whose metric is made of each layer's inputs alone: FOOF and Linear Neuron Boosting.

Others use `amortised` (statistics averaged over steps and inverted now and then); benchmarks use
`metric.descend`. It may import `_layers` and the ground floor.
"""
