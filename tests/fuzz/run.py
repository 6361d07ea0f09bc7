"""Random programs against the oracles, from a seed: `python3 make.py fuzz --seed 0 --minutes 5`.

Programs are numbered: `--seed S --count K` asks about those from S to S + K - 1, and the last line
says with which seed to go on. A failure prints the number of its program and a smaller one that
fails in the same way, as Python.
"""

import argparse
import collections
import dataclasses
import functools
import sys
import time
import warnings

import jax
import numpy as np

from tests.fuzz.build import build, draw
from tests.fuzz.oracles import METHODS, Failure, check
from tests.fuzz.shrink import shrink

CLEAR = 200  # programs after which what JAX keeps of them is dropped
JIT = 20  # one program of so many is compiled too
REPORT = 50


@dataclasses.dataclass
class Report:
    """What came out of many programs.

    Attributes:
      programs: how many.
      checked: how often each oracle was asked.
      refused: how often each reason was given.
      failures: the program's number and text, and what failed.
    """

    programs: int = 0
    checked: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list[tuple[int, str, Failure]] = dataclasses.field(default_factory=list)


def methods_of(seed: int, count: int = 2) -> tuple[str, ...]:
    """The methods that take a step on a program."""
    names = np.random.default_rng([seed, 1]).choice(sorted(METHODS), count, replace=False)
    return tuple(map(str, names))


def ask(seed: int, report: Report, attempts: int = 100) -> None:
    """Ask the oracles about one program."""
    program = draw(seed)
    fails = functools.partial(check, names=methods_of(seed), with_jit=seed % JIT == 0)
    report.programs += 1
    try:
        findings = fails(build(program))
    except Failure as failure:
        small = shrink(program, fails, failure.oracle, attempts)
        report.failures.append((seed, build(small).text, failure))
        return
    report.checked.update(findings.checked)
    report.refused.update(findings.refused)


def explore(
    seed: int, count: int | None, minutes: float | None, attempts: int = 100, say=print
) -> Report:
    """Ask about programs from a seed on, until a count or a time is reached."""
    report, start = Report(), time.monotonic()

    def ends():
        is_late = minutes is not None and time.monotonic() - start > 60 * minutes
        return is_late or report.programs == count

    while not ends():
        own, known = seed + report.programs, len(report.failures)
        ask(own, report, attempts)
        for _, text, failure in report.failures[known:]:
            say(f"\nprogram {own} fails, {failure}\n\n{text}")
            say(f"once more: python3 make.py fuzz --seed {own} --count 1\n")
        if report.programs % REPORT == 0:
            rate = 60 * report.programs / (time.monotonic() - start)
            say(f"{report.programs} programs, {len(report.failures)} fail, {rate:.0f} a minute")
        if report.programs % CLEAR == 0:
            jax.clear_caches()
    return report


def summary(report: Report, seed: int) -> str:
    lines = [f"{report.programs} programs from {seed} to {seed + report.programs - 1}"]
    for title, counter in (("checked", report.checked), ("refused", report.refused)):
        lines += ["", f"{title}:", *(f"{n:7}  {name}" for name, n in counter.most_common())]
    by_oracle = collections.defaultdict(list)
    for number, _, failure in report.failures:
        by_oracle[failure.oracle].append(number)
    lines += ["", f"{len(report.failures)} fail:"]
    lines += [f"{len(own):7}  {oracle}: {own[:10]}" for oracle, own in by_oracle.items()]
    return "\n".join([*lines, "", f"go on with --seed {seed + report.programs}"])


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python3 make.py fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="for how long")
    parser.add_argument("--count", type=int, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first program")
    parser.add_argument(
        "--attempts", type=int, default=100, help="programs tried to make a failing one smaller"
    )
    options = parser.parse_args(arguments)
    if options.minutes is None and options.count is None:
        options.minutes = 1.0
    warnings.simplefilter("ignore")  # of find_layers, where all parameters are in none
    jax.config.update("jax_enable_x64", True)
    say = functools.partial(print, flush=True)
    report = explore(options.seed, options.count, options.minutes, options.attempts, say)
    say(summary(report, options.seed))
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
