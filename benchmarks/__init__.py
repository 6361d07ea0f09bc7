"""The papers' experiments: one module per experiment, `python -m benchmarks.<experiment>`."""
