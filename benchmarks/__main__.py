"""The one entry to all that is measured here: `python -m benchmarks` lists it."""

import importlib
import sys
from collections.abc import Mapping, Sequence

# folder -> the names of its modules that can be run, and what each does
ENTRIES: Mapping[str, Mapping[str, str]] = {
    "defaults": {
        "defaults": "every method at its defaults beside tuned Adam, AdamW, Muon and others",
        "outside": "models of other packages: the layers found, thirty steps beside Adam",
    },
    "experiments": {
        "autoencoder": "the deep autoencoder with LocoProp, FOOF, LNB, K-FAC, RMSProp and Adam",
        "claims": "the headline claims of the five papers, and what the stored runs say of each",
        "ablations": "LocoProp with one thing changed at a time; a classifier; first-order methods",
        "neurons": "LNB and FOOF beside momentum, Adam and Muon, from dense layers to a ViT",
        "gauss_newton": "K-FAC, KFLR, KFRA and natural gradients: races, alignment, damping",
        "sensitivity": "how much the two most important numbers of each method matter",
        "table1": "memory and flops of LocoProp and Adam, beside the formulas of its paper",
        "tune": "search the hyperparameters that `autoencoder` and `ablations` start from",
    },
    "physics": {
        "physics": "equations, energies and forces: Adam, L-BFGS, FOOF, K-FAC, natural gradient",
    },
    "costs": {
        "costs": "a step of each method beside Adam's: compilation, time, memory",
        "communication": "bytes that each device sends in a step, by shapes",
        "accelerator": "the same at real sizes on a GPU, and the time to a loss; one short run",
        "speed": "a step of each method and its parts on the autoencoder, as ratios",
        "capture_cost": "capture on a transformer, a ViT, a ResNet and a UNet, as ratios",
        "paths": "the ways to LocoProp's plain gradient steps, and the choice between them",
        "stacking": "equal layers solved apart or stacked: compile time and step time",
    },
    "peers": {
        "kfac_peer": "K-FAC here and in kfac-jax",
        "torch_peer": "LocoProp here and in PyTorch (the package `locoprop`)",
    },
}
MODULES = {name: f"benchmarks.{folder}.{name}" for folder, at in ENTRIES.items() for name in at}


def listing() -> str:
    """A line for each name, below its folder's."""
    width = max(map(len, MODULES))
    lines = ["usage: python -m benchmarks NAME [options]; NAME --help lists its options"]
    for folder, names in ENTRIES.items():
        title = f"{importlib.import_module(f'benchmarks.{folder}').__doc__}".splitlines()[0]
        lines += ["", f"{folder}: {title}"]
        lines += [f"  {name:{width}}  {what}" for name, what in names.items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Import and run what is named first, with the other arguments; return its exit status."""
    name, *options = argv or ["--help"]
    if name in ("-h", "--help"):
        print(listing())
        return 0
    if name not in MODULES:
        known = ", ".join(MODULES)
        print(f"python -m benchmarks: no {name!r}; there are {known}", file=sys.stderr)
        return 2
    return importlib.import_module(MODULES[name]).main(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
