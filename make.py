#!/usr/bin/env python3
"""Set up an environment for this repository and run one of its commands there.

    python3 make.py demo [options]           train the autoencoder of the papers
    python3 make.py test [--oldest] [...]    run the tests (further options: pytest's)
    python3 make.py test --outside [...]     find the layers of models of other packages
    python3 make.py fuzz [options]           ask oracles about random models (--seed, --minutes)
    python3 make.py check [paths]            lint, formatting and types
    python3 make.py docs [serve]             build the documentation in out/site, or serve it
    python3 make.py package                  build dist/, install it elsewhere and use it there
    python3 make.py help                     this text

Needs Python 3.11 or newer and a package index, nothing else. The environment is .venv/<version of
Python>; it is made on first use, and again when pyproject.toml or that Python changes. `--oldest`
tests against the oldest supported dependencies (tests/oldest-requirements.txt). `--outside` runs
tests/outside, with the packages of its requirements.txt; these two have environments of their own.
"""

# Standard library only, and no syntax that an old Python stumbles over before `main` can say
# which one is needed.
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
# name -> what pip is told besides the package and its extra
VARIANTS = {
    "": (),
    "oldest": ("--constraint", ROOT / "tests" / "oldest-requirements.txt"),
    "outside": ("--requirement", ROOT / "tests" / "outside" / "requirements.txt"),
}
EXTRAS = ("benchmarks", "test", "dev")  # as in pyproject.toml: each includes those before it
VERSION = "{}.{}".format(*sys.version_info)


def fail(message: str, status: int = 1) -> NoReturn:
    """Stop with a message for the person at the keyboard."""
    print("make.py: " + message, file=sys.stderr)
    sys.exit(status)


def call(*command: object) -> int:
    """Run a command in the repository root; return its exit status."""
    return subprocess.run([str(word) for word in command], cwd=str(ROOT)).returncode


def python_in(home: Path) -> Path:
    """Where an environment has its Python."""
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(extra: str, variant: str = "") -> Path:
    """Return the Python of an environment that holds the package and one of its extras.

    A stamp, written last and removed first, says what is installed. Where it is missing or differs,
    the environment is new, out of date or half made, and is made from scratch.
    """
    home = ROOT / ".venv" / "-".join(filter(None, (VERSION, variant)))
    python = python_in(home)
    stamp = home / "installed"
    made_from = [sys.version, sys.base_prefix, str(ROOT)]
    files = [ROOT / "pyproject.toml", *(o for o in VARIANTS[variant] if isinstance(o, Path))]
    made_from += [path.read_text() for path in files]
    fingerprint = hashlib.sha256("\n".join(made_from).encode()).hexdigest()

    try:
        made, installed = stamp.read_text().split()
    except (OSError, ValueError):
        made = installed = ""
    if made == fingerprint and installed in EXTRAS[EXTRAS.index(extra) :]:
        return python

    print(f"make.py: installing into {home}, this can take minutes", flush=True)
    if made == fingerprint:
        stamp.unlink()
    else:
        if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
            fail(
                "this Python comes without venv and ensurepip. "
                f"Debian, Ubuntu: sudo apt install python{VERSION}-venv. Then run this again."
            )
        if call(sys.executable, "-m", "venv", "--clear", home):
            fail(f"could not make {home}, see above. Remove it and run this again.")
    # What is never imported need not be compiled.
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    if call(*pip, *VARIANTS[variant], "--editable", f".[{extra}]"):
        fail(
            "pip could not install the dependencies, see above. Is the network up, and does jaxlib "
            f"exist for Python {VERSION} on this system? Then run this again."
        )
    stamp.write_text(f"{fingerprint} {extra}")
    return python


# One process for each of two cores; who is done takes over from who has long tests left.
PARALLEL = ("-n", "2", "--dist", "worksteal")


def demo(*options: str) -> int:
    """Train the autoencoder of the papers."""
    return call(environment("benchmarks"), "-m", "benchmarks", "autoencoder", *options)


def test(*options: str) -> int:
    """Run the tests, in two processes unless told otherwise."""
    variant = next((name for name in VARIANTS if name and f"--{name}" in options), "")
    which = ("tests/outside", "-m", "slow") if variant == "outside" else ()
    others = (option for option in options if option != f"--{variant}")
    return call(environment("test", variant), "-m", "pytest", *PARALLEL, *which, *others)


def fuzz(*options: str) -> int:
    """Ask the oracles of tests/fuzz about random models."""
    return call(environment("test"), "-m", "tests.fuzz.run", *options)


def check(*paths: str) -> int:
    """Check lint, formatting and types: all three, even when one fails."""
    python = environment("dev")
    return max(
        call(python, "-m", "ruff", "check", *paths),
        call(python, "-m", "ruff", "format", "--check", *paths),
        call(python, "-m", "pyright", "--pythonpath", python, *paths),
    )


def docs(command: str = "build", *options: str) -> int:
    """Build the documentation, where a warning is an error; or serve it while it is written."""
    strict = ("--strict", "--site-dir", ROOT / "out" / "site") if command == "build" else ()
    return call(environment("dev"), "-m", "mkdocs", command, *strict, *options)


def package() -> int:
    """Build the wheel and the source distribution, and use the wheel where nothing else is."""
    dist = ROOT / "dist"
    for old in dist.glob("locoprop_jax-*"):
        old.unlink()
    if call(environment("test"), "-m", "build", "--no-isolation", "--outdir", dist):
        return 1
    (wheel,) = dist.glob("*.whl")
    with tempfile.TemporaryDirectory() as home:
        python = python_in(Path(home))
        return (
            call(sys.executable, "-m", "venv", home)
            or call(python, "-m", "pip", "install", "--quiet", "--no-compile", wheel)
            or call(python, ROOT / "tests" / "newcomer.py")
        )


def show_help(*_: str) -> int:
    """Print what the top of this file says."""
    print((__doc__ or "").strip())
    return 0


COMMANDS = {
    "demo": demo,
    "test": test,
    "fuzz": fuzz,
    "check": check,
    "docs": docs,
    "package": package,
    "help": show_help,
}


def main(command: str = "help", *options: str) -> int:
    """Run the command of this name."""
    if sys.version_info < (3, 11):  # noqa: UP036 (this is where an older one ends up)
        fail(f"needs Python 3.11 or newer, this is {VERSION}. Try: python3.12 make.py {command}")
    if command not in COMMANDS:
        fail(f"no command `{command}`; the commands are {', '.join(COMMANDS)}", status=2)
    return COMMANDS[command](*options)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
