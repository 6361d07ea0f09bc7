"""Models that nobody here wrote, as their packages ship them: is every parameter in a layer?"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported
