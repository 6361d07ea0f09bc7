"""The library's methods at their defaults against tuned rivals, on many small problems.

    python -m benchmarks defaults

trains every contestant on every problem, for as many steps and then for as many seconds: hours on
two CPU cores. Each run is stored as soon as it is done, in runs/PROBLEM.csv of the output folder,
and is not run again; several processes may work at once, each on problems of its own. Prints the
tables, and writes them as summary.md and summary.json beside the plot profiles.png. --show does
that alone, from what is stored.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.defaults import summary
from benchmarks.defaults.contestants import CONTESTANTS
from benchmarks.defaults.picture import plot_profiles
from benchmarks.defaults.problems import PROBLEMS, load
from benchmarks.defaults.runs import Runs
from benchmarks.defaults.stages import STAGES
from benchmarks.shared import cli
from benchmarks.shared.tuned import write_json

QUICK = {"problems": ["smooth", "tabular"], "seeds": 1}
QUICK_STEPS = 20


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    description, _, usage = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks defaults",
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, known, what in (
        ("problems", PROBLEMS, "which problems"),
        ("methods", CONTESTANTS, "which methods"),
        ("stage", STAGES, "which parts of the work"),
    ):
        parser.add_argument(
            f"--{option}",
            nargs="+",
            choices=known,
            default=list(known),
            metavar=option.rstrip("s").upper(),
            help=f"{what}: {', '.join(known)} (default: all)",
        )
    cli.add_numbers(parser, {"seeds": (3, "how many seeds the settings that count are run with")})
    cli.add_output_dir_argument(
        parser, "benchmarks/results/defaults", "where runs, tables and the plot go"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="run the methods anew whose runs are stored, because their code has changed",
    )
    parser.add_argument("--show", action="store_true", help="train nothing, show what is stored")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a look in minutes: {QUICK_STEPS} steps, kept apart in the folder quick, "
        f"--problems {' '.join(QUICK['problems'])} and --seeds {QUICK['seeds']} unless given",
    )
    args = cli.parse(parser, QUICK, argv)
    if args.quick:
        args.output_dir /= "quick"
    return parser, args


def run_all(args: argparse.Namespace) -> None:
    """Each problem's stages in turn; nothing compiled for one is kept for the next."""
    for name in dict.fromkeys(args.problems):
        problem = load(name)
        if args.quick:
            problem = problem._replace(steps=QUICK_STEPS)
        print(f"{name}: {problem.what}, {problem.steps} steps of {problem.batch_size}", flush=True)
        again = args.methods if args.again else ()
        runs = Runs(problem, args.output_dir / "runs" / f"{name}.csv", again)
        for stage, work in STAGES.items():
            if stage in args.stage:
                work(runs, args.methods, args.seeds)
        jax.clear_caches()


def show(directory: Path) -> None:
    """Print and write what the stored runs say."""
    rows = summary.load_rows(directory / "runs")
    if not rows:
        print(f"There are no runs in {directory / 'runs'}.")
        return
    text = summary.tables(rows)
    print(f"\n{text}\n")
    (directory / "summary.md").write_text(text + "\n")
    write_json(directory / "summary.json", summary.results(rows))
    plot_profiles(rows, directory / "profiles.png")
    print(f"Wrote the tables and the plot to {directory}.", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 130 after Ctrl-C, as shells have it."""
    parser, args = parse_arguments(argv)
    cli.make_output_dir(parser, args.output_dir)
    interrupted = False
    if not args.show:
        try:
            run_all(args)
        except KeyboardInterrupt:
            interrupted = True
    show(args.output_dir)
    if interrupted:
        print("Interrupted; the same command goes on where this one stopped.", file=sys.stderr)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
