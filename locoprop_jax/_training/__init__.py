"""What training loops need around a method: fallbacks, averages of parameters, a train state.

Others use `training.with_fallback`. It may import `_layers` and the ground floor.
"""
