"""The Python of a program while it is written: its lines, its parameters, and the shape at hand."""

import contextlib
import dataclasses

MAX_RANK = 4


class Invalid(Exception):
    """A statement cannot be applied to what is there: never drawn, but met while shrinking."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that a program is given: its shape, and how it is drawn from a seed."""

    shape: tuple[int, ...]
    recipe: str = "normal"
    scale: float = 1.0
    shift: float = 0.0


class Writer:
    """What has been written so far.

    Attributes:
      lines: of the network.
      shape: of the value at hand, `h`: examples, positions, features. Words have no features.
      params: by group and name.
      data: what the batch holds beside the inputs, by name.
      constants: what the loss is closed over, by name.
      zs: the names of what the losses take.
      prefix: the axes that the loops and maps around put in front of parameters.
      whole: whether the value at hand is the whole batch.
    """

    def __init__(self, shape, flat=False, words=None):
        self.shape = tuple(shape)
        self.flat, self.words = flat, words
        self.lines: list[str] = []
        self.indent = 1
        self.params: dict[str, dict[str, Array]] = {}
        self.data: dict[str, Array] = {}
        self.constants: dict[str, Array] = {}
        self.zs: list[str] = []
        self.prefix: tuple[int, ...] = ()
        self.whole = True
        self.mixes_examples = False
        self.group = ""
        self.count = 0

    # --- the shape at hand ---

    @property
    def width(self):
        return self.shape[-1]

    @property
    def positions(self):
        return self.shape[1:-1]

    @property
    def batch(self):
        return self.shape[0]

    def need(self, condition):
        if not condition:
            raise Invalid

    # --- lines and names ---

    def line(self, text):
        self.lines.append("    " * self.indent + text)

    def name(self, start):
        self.count += 1
        return f"{start}{self.count}"

    def new_group(self):
        self.group = self.name("s")

    def param(self, *shape, scale=1.0, shift=0.0):
        """A new parameter of the statement; the expression that reads it."""
        own = self.params.setdefault(self.group, {})
        name = f"w{len(own)}"
        own[name] = Array((*self.prefix, *shape), "normal", scale, shift)
        return f'p["{self.group}{name}"]' if self.flat else f'p["{self.group}"]["{name}"]'

    def keys(self, groups):
        """The keys of the parameter dictionary that belong to groups."""
        if not self.flat:
            return [group for group in groups if group in self.params]
        return [group + name for group in groups for name in self.params.get(group, ())]

    def constant(self, *shape, recipe="normal"):
        name = self.name("c")
        self.constants[name] = Array(shape, recipe)
        return name

    def argument(self, *shape, recipe="normal"):
        name = self.name("m")
        self.data[name] = Array(shape, recipe)
        return name

    @contextlib.contextmanager
    def function(self, start="f", arguments="p, h", returns="h"):
        """The lines inside are a function's; its name, and the groups of parameters it has."""
        name, before = self.name(start), set(self.params)
        groups: list[str] = []
        self.line(f"def {name}({arguments}):")
        self.indent += 1
        yield name, groups
        self.line(f"return {returns}")
        self.indent -= 1
        groups += [group for group in self.params if group not in before]

    @contextlib.contextmanager
    def part(self):
        """What is inside does not see the whole batch."""
        before, self.whole = self.whole, False
        yield
        self.whole = before

    @contextlib.contextmanager
    def stacked(self, count):
        """The parameters inside are stacks of so many."""
        before, self.prefix = self.prefix, (*self.prefix, count)
        yield
        self.prefix = before
