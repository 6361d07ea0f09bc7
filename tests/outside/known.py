"""What capture refuses of the outside models today, and why.

`KNOWN` has, for each model, the parameters by a regular expression of their paths, and a part of
the reason that capture gives. A model without a single layer is known as `NO_LAYER`.

NetKet sets a global mesh when it is imported, under which capture finds no batch axis. Without it
four parameters of "jraph: deep sets" are refused, and flowjax's flows with other reasons.
"""

NO_LAYER = ".*"
# Reasons as capture words them.
CHANGED = "changes it before it meets the data"
GRAPHS = "it meets data that does not grow with the batch|not a layer's output"
SEVERAL_USES = "not with the same shape, orientation and bias each time"

KNOWN: dict[str, dict[str, str]] = {
    # --- the kernel is made of parameters ---
    "distrax: actor and critic": {"log_deviation": f"`exp` {CHANGED}"},
    "distrax: hidden Markov model": {
        "means": "a `sub` of data and a parameter",
        "start|turn": f"`reduce_max` {CHANGED}",
    },
    "equinox: spectral normalisation": {"layers/0/layer/weight": f"`stop_gradient` {CHANGED}"},
    "equinox: weight normalisation": {"layers/0/": f"`mul` {CHANGED}"},
    "flax: NNX, weight normalisation": {"hidden/layer_instance/kernel|scales": f"`mul` {CHANGED}"},
    "flax: linen, bidirectional LSTM and GRU": {"OptimizedLSTMCell": f"`concatenate` {CHANGED}"},
    "flax: linen, local and transposed convolutions": {"ConvTranspose": f"`rev` {CHANGED}"},
    "flax: linen, spectral normalisation": {
        "hidden/layer_instance/kernel": f"`dot_general` {CHANGED}"
    },
    "flax: linen, weight normalisation": {"hidden/layer_instance/kernel": f"`mul` {CHANGED}"},
    "flowjax: block neural autoregressive flow": {NO_LAYER: f"`custom_jvp_call` {CHANGED}"},
    "flowjax: conditional masked autoregressive flow of splines": {NO_LAYER: "`select_n`"},
    "flowjax: coupling flow": {
        "base_dist/bijection/loc": "a `sub` of data and a parameter",
        "base_dist/bijection/scale": f"`custom_jvp_call` {CHANGED}",
    },
    "flowjax: masked autoregressive flow": {NO_LAYER: "`select_n`"},
    "flowjax: planar flow": {NO_LAYER: f"`slice` {CHANGED}"},
    "flowjax: triangular spline flow": {NO_LAYER: f"`custom_jvp_call` {CHANGED}"},
    "haiku: VQ-VAE": {"embeddings": f"`device_put` {CHANGED}"},
    "haiku: spectral normalisation": {"/w$": f"`dot_general` {CHANGED}"},
    "keras: MobileNetV2": {"/(beta|gamma)$": f"`add` {CHANGED}"},
    "keras: convolutions, batch normalisation": {"/(beta|gamma)$": f"`add` {CHANGED}"},
    "keras: spectral normalisation": {"conv2d/kernel": f"`eq` {CHANGED}"},
    "keras: transposed convolutions": {"transpose/kernel": f"`rev` {CHANGED}"},
    "netket: ARNN, dense": {"kernel": f"`mul` {CHANGED}"},
    "netket: GCNN, Fourier transforms": {"kernel": f"`gather` {CHANGED}"},
    "netket: GCNN, irreducible representations": {
        "dense_symm/kernel": f"`gather` {CHANGED}",
        "equivariant_layers_0/kernel": f"`dot_general` {CHANGED}",
    },
    "netket: Gaussian": {NO_LAYER: f"`dot_general` {CHANGED}"},
    "netket: Jastrow": {NO_LAYER: f"`scatter` {CHANGED}"},
    "netket: symmetric RBM": {"Dense/kernel": f"`gather` {CHANGED}"},
    "transformers: Gemma": {"norm/weight": f"`add` {CHANGED}"},
    "transformers: wav2vec 2.0": {"pos_conv_embed/conv/weight_": f"`mul` {CHANGED}"},
    # --- no batch axis to double ---
    "jraph: GraphNetwork": {"": GRAPHS},
    "jraph: GraphNetwork, padded": {"": GRAPHS},
    "jraph: graph attention": {"query": f"`dot_general` {CHANGED}"},
    "jraph: interaction network": {"Mlp_0": GRAPHS},
    # --- control flow, own derivatives ---
    "diffrax: neural ODE, BacksolveAdjoint": {NO_LAYER: "its own derivative"},
    "diffrax: neural ODE, DirectAdjoint": {NO_LAYER: "`cond`"},
    "diffrax: neural ODE, DirectAdjoint, adaptive steps": {NO_LAYER: "`cond`"},
    "diffrax: neural ODE, RecursiveCheckpointAdjoint": {NO_LAYER: "its own derivative"},
    "diffrax: neural SDE, DirectAdjoint": {NO_LAYER: "`cond`"},
    "diffrax: neural controlled differential equation, DirectAdjoint": {"field": "`cond`"},
    "flax: linen, switch": {"experts": "`cond`"},
    "jinns: Burgers' equation": {NO_LAYER: f"`cond` {CHANGED}"},
    # --- the loss differentiates the network ---
    "e3nn: energies and forces": {"Linear_2": f"`dot_general` {CHANGED}"},
    "folx: Poisson, all directions at once": {
        "layers/[02]/weight": f"`dot_general` {CHANGED}",
        "layers/1/weight": SEVERAL_USES,
    },
    "folx: Poisson, forward Laplacian": {
        "layers/0/weight": f"`dot_general` {CHANGED}",
        "layers/[12]/weight": SEVERAL_USES,
    },
    "folx: Poisson, loop over directions": {
        "layers/0/weight": "it meets data that does not grow with the batch",
        "layers/1/weight": SEVERAL_USES,
        "layers/2/weight": f"`dot_general` {CHANGED}",
    },
    "folx: local energies of an oscillator": {"layers/0/weight": f"`dot_general` {CHANGED}"},
}
