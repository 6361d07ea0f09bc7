"""What capture refuses of the outside models today, and why.

`KNOWN` has, for each model, the parameters by a regular expression of their paths, and a part of
the reason that capture gives. A model without a single layer is known as `NO_LAYER`.
"""

NO_LAYER = ".*"
# Reasons as capture words them.
SEVERAL_USES = "not with the same shape, orientation and bias each time"
OWN_DERIVATIVE = "its own derivative"

KNOWN: dict[str, dict[str, str]] = {
    # --- parameters that several kernels are made of ---
    "equinox: spectral normalisation": {"layers/0/layer/weight": SEVERAL_USES},
    "flowjax: block neural autoregressive flow": {"weight|bias": ""},
    "flowjax: planar flow": {"bijections/0/params": SEVERAL_USES},
    "flowjax: triangular spline flow": {"triangular|loc|derivatives": ""},
    # --- own derivatives ---
    "diffrax: neural ODE, BacksolveAdjoint": {NO_LAYER: OWN_DERIVATIVE},
    "diffrax: neural ODE, RecursiveCheckpointAdjoint": {NO_LAYER: OWN_DERIVATIVE},
}
