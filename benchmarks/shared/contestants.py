"""Methods as their users would try them first, and the learning rates around their default."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from benchmarks.shared import paper
from benchmarks.shared.methods import Method

TRIAL_STEP = 10**0.5  # between two learning rates


class Contestant(NamedTuple):
    """A method with what its users would try first.

    Attributes:
      label: its name in tables and plots.
      build: (layers, learning rate) -> optimizer.
      learning_rate: the default.
      needs_capture: whether its step captures activations and cotangents.
      curvature: which curvature it captures.
      schedule: (learning rate, steps) -> its schedule; None for a warm-up and a linear decay.
    """

    label: str
    build: Callable[..., optax.GradientTransformation]
    learning_rate: float
    needs_capture: bool = False
    curvature: str | None = None
    schedule: Callable[[float, int], optax.Schedule] | None = None

    def method(self) -> Method:
        def build(layers: Any, schedule: optax.Schedule) -> Any:
            arguments = (layers,) if self.needs_capture else ()
            return optax.with_extra_args_support(self.build(*arguments, schedule))

        return Method(
            self.label,
            build,
            {},
            needs_capture=self.needs_capture,
            curvature=self.curvature,
            schedule=self.schedule,
        )


FOOF = Contestant("FOOF", paper.foof, 4.0, needs_capture=True)
LNB = Contestant("LNB", paper.lnb, 4.0, needs_capture=True)
ADAM = Contestant("Adam", optax.adam, 1e-3)
MOMENTUM = Contestant("Momentum", functools.partial(optax.sgd, momentum=0.9), 1e-1)
MUON = Contestant("Muon", optax.contrib.muon, 2e-2)


def constant(peak: float, steps: int) -> optax.Schedule:
    """The schedule of a `Contestant` whose learning rate never changes."""
    del steps
    return optax.constant_schedule(peak)


def rates(middle: float, trials: int) -> list[float]:
    """Learning rates a factor of sqrt(10) apart, from small to large."""
    return [middle * TRIAL_STEP ** (i - trials // 2) for i in range(trials)]
