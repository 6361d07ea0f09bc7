"""What was measured, and what measures it: `python -m benchmarks` lists it."""
