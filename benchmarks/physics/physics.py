"""Physics-informed losses and forces: the error against seconds, of nine methods.

    python -m benchmarks physics

Every method trains a network of 3 x 32 tanh in float64 on each problem for so many seconds, Adam
with each of four rates. A run is stored as soon as it is done, in physics.json of the output
folder, and is not run again unless --again is given. Prints the tables and draws errors.png. --show
does that alone, from what is stored.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.physics.methods import METHODS
from benchmarks.physics.picture import plot_errors
from benchmarks.physics.problems import PROBLEMS
from benchmarks.physics.training import Curve, train
from benchmarks.shared import cli
from benchmarks.shared.report import aligned, machine
from benchmarks.shared.results import write_json

SECONDS, QUICK_SECONDS = 20, 1
QUICK = {"problems": ["poisson_2d"]}
Stored = dict[str, dict[str, dict[str, Any]]]  # by problem, method and factor: a curve's lists


def best(runs: dict[str, Any]) -> Curve:
    """Of a method's runs, by their last error."""
    return min((Curve(**run) for run in runs.values()), key=lambda curve: curve.final)


def table(stored: Stored) -> str:
    """For each problem and method its last error, Adam's at that time, and when it passes Adam."""
    header = ("problem", "method", "steps", "error", "lowest", "below Adam", "1e-4 after")
    rows = []
    for problem, methods in stored.items():
        adam = best(methods["adam"]) if "adam" in methods else None
        for name, runs in methods.items():
            curve = best(runs)
            after = curve.seconds_to(1e-4)
            share = "-" if adam is None else f"{adam.final / curve.final:.3g}"
            lowest = f"{min(filter(math.isfinite, curve.errors)):.2e}"
            ends = (f"{curve.final:.2e}", lowest, share, "-" if after is None else f"{after:.2f} s")
            rows.append((problem, METHODS[name].label, f"{curve.steps[-1]:,}", *ends))
    return aligned(header, rows)


def run_all(args: argparse.Namespace, path: Path) -> None:
    seconds = QUICK_SECONDS if args.quick else args.seconds
    stored: Stored = json.loads(path.read_text())["runs"] if path.exists() else {}
    for name in args.problems:
        problem = PROBLEMS[name]()
        of_problem = stored.setdefault(name, {})
        for key in args.methods:
            method, runs = METHODS[key], of_problem.setdefault(key, {})
            for factor in method.factors:
                if f"{factor:g}" in runs and not args.again:
                    continue
                curve = train(problem, method, factor, seconds)
                print(f"{name}, {method.label}, {factor:g}: {curve.final:.2e}", flush=True)
                runs[f"{factor:g}"] = finite(curve)
                ordered = {k: of_problem[k] for k in METHODS if of_problem.get(k)}
                stored[name] = ordered
                kept = {k: stored[k] for k in PROBLEMS if stored.get(k)}
                write_json(path, {"machine": machine(), "runs": kept})
                jax.clear_caches()


def finite(curve: Curve) -> dict[str, Sequence[float]]:
    """As JSON has it, which knows no infinity."""
    rounded: dict[str, Sequence[float]] = {
        key: [min(float(f"{x:.5g}"), 1e300) if math.isfinite(x) else 1e300 for x in values]
        for key, values in curve._asdict().items()
    }
    return rounded | {"steps": curve.steps}


def show(directory: Path, path: Path) -> None:
    if not path.exists():
        print(f"There are no runs in {directory}.")
        return
    stored = json.loads(path.read_text())["runs"]
    print(f"\n{table(stored)}\n")
    plot_errors(
        {p: {METHODS[m].label: best(runs) for m, runs in of.items()} for p, of in stored.items()},
        directory / "errors.png",
    )
    print(f"Wrote the runs and the plot to {directory}.", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    description, _, usage = (__doc__ or "").partition("\n")
    parser = cli.make_parser("physics", description, usage)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for option, known in (("problems", PROBLEMS), ("methods", METHODS)):
        parser.add_argument(
            f"--{option}",
            nargs="+",
            choices=list(known),
            default=list(known),
            metavar=option.rstrip("s").upper(),
            help=f"which {option}: {', '.join(known)} (default: all)",
        )
    cli.add_numbers(parser, {"seconds": (SECONDS, "how long each run trains")})
    cli.add_output_dir_argument(parser, "benchmarks/results/physics", "where runs and the plot go")
    parser.add_argument("--again", action="store_true", help="run anew what is stored")
    parser.add_argument("--show", action="store_true", help="train nothing, show what is stored")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SECONDS} s for each run, kept apart in the folder quick; "
        f"--problems {' '.join(QUICK['problems'])} unless given",
    )
    args = cli.parse(parser, QUICK, argv)
    if args.quick:
        args.output_dir /= "quick"
    cli.make_output_dir(parser, args.output_dir)
    path = args.output_dir / "physics.json"
    interrupted = False
    if not args.show:
        try:
            with jax.enable_x64(True):
                run_all(args, path)
        except KeyboardInterrupt:
            interrupted = True
    show(args.output_dir, path)
    if interrupted:
        print("Interrupted; the same command goes on where this one stopped.", file=sys.stderr)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
