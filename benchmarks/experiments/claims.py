"""The headline claims of the five papers, and what the stored runs say of each.

    python -m benchmarks claims            prints the ledger
    python -m benchmarks claims --write    writes docs/claims.md too

Nothing is trained here: the ledger is read off benchmarks/results, which the commands that it
names have written. A claim holds or does not by the numbers alone.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.shared import cli
from benchmarks.shared.results import HOME, RESULTS

PAGE = HOME.parent / "docs" / "claims.md"

LOCOPROP = "LocoProp (Amid et al.)"
LNB = "Linear Neuron Boosting"
FOOF = "Gradient descent on neurons (Benzing)"
GAUSS_NEWTON = "Practical Gauss-Newton (Botev et al.)"

INTRODUCTION = """# The papers' claims

Written by `python -m benchmarks claims --write` from the stored runs. A claim holds if the numbers
say so, whatever the reason may be where it does not. The sizes are small, mostly 10,000 images and
3 to 5 epochs on a CPU: a claim that does not hold here may hold at the paper's size. Losses are
training losses at the end, and each method has the best of its stored settings. That LNB and FOOF
are invariant to shifts of their inputs is an identity, which the tests hold; here it is asked of
whole runs, which begin at different functions.
"""


class Found(NamedTuple):
    """What was found: in words with numbers, and whether the claim holds."""

    text: str
    holds: bool


class Claim(NamedTuple):
    """A claim of a paper.

    Attributes:
      paper: whose.
      says: the claim.
      command: what made the runs.
      look: reads them.
    """

    paper: str
    says: str
    command: str
    look: Callable[[], Found]


# --- what the stored runs say --------------------------------------------------------------------


@functools.cache
def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def last_loss(run: dict[str, Any]) -> float:
    loss = run["curve"][-1]["train_loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def loss_of(name: str, method: str) -> float:
    """The lowest last loss of the runs of a method: those named so, or so and then a comma."""
    losses = [
        last_loss(run)
        for key, run in stored(name)["runs"].items()
        if key == method or _is_number_after(key, method)
    ]
    return min(losses)


def _is_number_after(key: str, method: str) -> bool:
    """Whether what follows the method's name is its settings, and no other variant's name."""
    rest = key.removeprefix(f"{method}, ")
    return rest != key and (rest[0].isdigit() or rest.startswith("damping"))


def below(
    name: str, ours: Sequence[str], others: Sequence[str], slack: float = 1.0
) -> Callable[[], Found]:
    """All of ours below all of the others, or no more than so many times the best of them."""

    def look() -> Found:
        left, right = ({m: loss_of(name, m) for m in group} for group in (ours, others))
        text = f"{_listed(left)}; against {_listed(right)}"
        return Found(text, max(left.values()) < slack * min(right.values()))

    return look


def falling(name: str, methods: Sequence[str]) -> Callable[[], Found]:
    """Each below the one before."""

    def look() -> Found:
        losses = {method: loss_of(name, method) for method in methods}
        values = list(losses.values())
        return Found(_listed(losses), values == sorted(values, reverse=True))

    return look


def at_most(name: str, network: str, ratio: str, paper: float) -> Callable[[], Found]:
    """A ratio of times is no more than the paper's, but for a tenth."""

    def look() -> Found:
        found = stored(name)[network][ratio]["median"]
        return Found(f"{found:.2f}, in the paper {paper}", found <= 1.1 * paper)

    return look


def reached_sooner(name: str, ours: str, other: str) -> Callable[[], Found]:
    """Seconds to the last loss of the other's best run, by curves that are looked at by epoch."""

    def look() -> Found:
        runs = stored(name)["runs"]
        best = min((run for key, run in runs.items() if key.startswith(other)), key=last_loss)
        seconds = best["curve"][-1]["seconds"]
        points = [p for p in runs[ours]["curve"] if p["train_loss"] <= last_loss(best)]
        mine = points[0]["seconds"] if points else math.inf
        steps = points[0]["step"] if points else math.inf
        updates = best["curve"][-1]["step"]
        text = (
            f"{other} ends after {updates} updates and {seconds:.1f} s; {ours} is there by update "
            f"{steps}, after {mine:.1f} s"
        )
        return Found(text, mine < seconds)

    return look


def alike(name: str, method: str, than: str, one: str, other: str) -> Callable[[], Found]:
    """A method's losses on two forms of the data are closer than another's, as a factor."""

    def apart(own: str) -> float:
        first, second = loss_of(name, f"{own}, {one}"), loss_of(name, f"{own}, {other}")
        return max(first, second) / min(first, second)

    def look() -> Found:
        mine, theirs = apart(method), apart(than)
        text = (
            f"losses on {one} and {other} differ by a factor of {mine:.2f}, {than}'s by "
            f"{theirs:.2f}"
        )
        return Found(text, mine < theirs)

    return look


def better_aligned(first: str, second: str) -> Callable[[], Found]:
    """By the mean cosine with the full Gauss-Newton direction."""

    def look() -> Found:
        cosines = stored("gauss_newton/alignment")["full"]
        means = {name: sum(cosines[name]) / len(cosines[name]) for name in (first, second)}
        return Found(_listed(means), means[first] > means[second])

    return look


def more_progress() -> Found:
    progress = stored("gauss_newton/second_factor")["progress"]
    without = next(key for key in progress if key not in ("updates", "with"))
    means = {key: sum(progress[key]) / len(progress[key]) for key in ("with", without)}
    text = f"a step lowers its batch's loss by these shares on average: {_listed(means)}"
    return Found(text, means[without] > means["with"])


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name}: {loss:.4g}" for name, loss in losses.items())


# --- the claims ----------------------------------------------------------------------------------


def _by_size(network: str) -> Callable[[], Found]:
    return below("ablations/size", [f"locoprop_m, {network}"], [f"rmsprop, {network}"])


def _by_transfer(transfer: str) -> Callable[[], Found]:
    ours = [f"{name}, {transfer}" for name in ("locoprop_s", "locoprop_m")]
    others = [f"{name}, {transfer}" for name in ("rmsprop", "adam")]
    return below("ablations/transfer", ours, others)


_AUTOENCODER = "autoencoder"
_LOCOPROP = ["locoprop_s", "locoprop_m"]
_ABLATIONS, _NEURONS, _CURVATURE = "ablations", "neurons", "gauss_newton"

CLAIMS = (
    Claim(
        LOCOPROP,
        "LocoProp-S and -M are far below first-order methods on the standard autoencoder",
        "autoencoder",
        below(_AUTOENCODER, _LOCOPROP, ["rmsprop", "adam"]),
    ),
    Claim(
        LOCOPROP,
        "LocoProp is on a par with K-FAC there (within a tenth)",
        "autoencoder",
        below(_AUTOENCODER, _LOCOPROP, ["kfac"], 1.1),
    ),
    Claim(LOCOPROP, "it is ahead on the wide network", _ABLATIONS, _by_size("wide")),
    Claim(LOCOPROP, "it is ahead on the deep network", _ABLATIONS, _by_size("deep")),
    Claim(LOCOPROP, "it is ahead with tanh", _ABLATIONS, _by_transfer("tanh")),
    Claim(LOCOPROP, "it is ahead with ReLU", _ABLATIONS, _by_transfer("ReLU")),
    Claim(
        LOCOPROP,
        "more local iterations lower the loss further",
        _ABLATIONS,
        falling("ablations/iterations", [f"locoprop_m, T = {count}" for count in (1, 5, 10, 50)]),
    ),
    Claim(
        LNB,
        "it sees no difference between images and inverted images",
        _NEURONS,
        alike("neurons/inverted", "LNB", "Adam", "images", "1 - images"),
    ),
    Claim(LNB, "it is ahead of Adam on a ViT", _NEURONS, below("neurons/vit", ["LNB"], ["Adam"])),
    Claim(LNB, "it is ahead of Adam on a UNet", _NEURONS, below("neurons/unet", ["LNB"], ["Adam"])),
    Claim(
        LNB,
        "a step takes 1.48 times Adam's on a ViT",
        "capture_cost",
        at_most("capture_cost_cpu", "ViT", "LNB / Adam", 1.48),
    ),
    Claim(
        LNB,
        "a step takes 2.3 times Adam's on a UNet",
        "capture_cost",
        at_most("capture_cost_cpu", "UNet", "LNB / Adam", 2.3),
    ),
    Claim(
        FOOF,
        "FOOF is ahead of K-FAC on small batches",
        _CURVATURE,
        below("gauss_newton/minibatches", ["FOOF"], ["K-FAC"]),
    ),
    Claim(
        FOOF,
        "FOOF is ahead of K-FAC on logistic regression",
        _CURVATURE,
        below("gauss_newton/logistic", ["FOOF"], ["K-FAC"]),
    ),
    Claim(
        FOOF,
        "K-FAC is ahead of the natural gradient that it approximates",
        _CURVATURE,
        below("gauss_newton/minibatches", ["K-FAC"], ["Natural", "Natural, last batch"]),
    ),
    Claim(
        FOOF,
        "K-FAC works because it is FOOF: without its second factor its steps do more",
        _CURVATURE,
        more_progress,
    ),
    Claim(
        FOOF,
        "a step of FOOF takes 1.10 times a first-order one on a wide ResNet",
        "capture_cost",
        at_most("capture_cost_cpu", "ResNet18, widths 16 to 128", "FOOF / Adam", 1.1),
    ),
    Claim(
        GAUSS_NEWTON,
        "KFRA and K-FAC are far ahead of Adam for each update",
        _CURVATURE,
        below("gauss_newton/autoencoder", ["KFRA", "K-FAC"], ["Adam"]),
    ),
    Claim(
        GAUSS_NEWTON,
        "KFRA is ahead of Adam in seconds",
        _CURVATURE,
        reached_sooner("gauss_newton/autoencoder", "KFRA", "Adam"),
    ),
    Claim(
        GAUSS_NEWTON,
        "KFRA is ahead of K-FAC",
        _CURVATURE,
        below("gauss_newton/autoencoder", ["KFRA"], ["K-FAC"]),
    ),
    Claim(
        GAUSS_NEWTON,
        "KFLR is ahead of Adam in seconds on a mixture of classifiers",
        _CURVATURE,
        reached_sooner("gauss_newton/mixture", "KFLR", "Adam"),
    ),
    Claim(
        GAUSS_NEWTON,
        "KFRA is better aligned with the Gauss-Newton direction than K-FAC",
        _CURVATURE,
        better_aligned("KFRA", "K-FAC"),
    ),
)


# --- the ledger ----------------------------------------------------------------------------------


def ledger() -> str:
    """The page, as Markdown."""
    found = [(claim, claim.look()) for claim in CLAIMS]
    count = sum(each.holds for _, each in found)
    lines = [INTRODUCTION, f"{count} of {len(found)} hold in these runs.\n"]
    for paper in dict.fromkeys(claim.paper for claim, _ in found):
        lines += [f"## {paper}\n", "| claim | holds here | found | command |", "|---|---|---|---|"]
        lines += [
            f"| {claim.says} | {'yes' if each.holds else '**no**'} | {each.text} | "
            f"`{claim.command}` |"
            for claim, each in found
            if claim.paper == paper
        ]
        lines.append("")
    return "\n".join(lines)


def main(argv: cli.Argv = None) -> int:
    parser = cli.make_parser("claims", "The papers' claims, and what the stored runs say.")
    parser.add_argument("--write", action="store_true", help="write docs/claims.md as well")
    args = parser.parse_args(argv)
    text = ledger()
    print(text)
    if args.write:
        PAGE.write_text(text)
        print(f"Wrote {PAGE.relative_to(HOME.parent)}.")
    return 0
