"""A user's type checker knows the types of the package, and finds mistakes."""

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "typed_program.py"


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with the user's program, and the Python that has the package installed."""
    home = tmp_path_factory.mktemp("user")
    venv.create(home / "venv", symlinks=True)
    python = home / "venv" / "bin" / "python"
    (site,) = (home / "venv").glob("lib/python*/site-packages")
    shutil.copytree(ROOT / "locoprop_jax", site / "locoprop_jax")
    # What it depends on; as no `.pth` in there is read, the package itself is the copy.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    shutil.copy(PROGRAM, home)
    return home, python


def check(home, *command):
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=home, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_program_runs_with_the_copy(user, monkeypatch):
    home, python = user
    where = check(home, python, "-c", "import locoprop_jax; print(locoprop_jax.__file__)")
    assert Path(where.strip()).is_relative_to(home)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is what takes long
    check(home, python, PROGRAM.name)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("pyright"), reason="pyright is not installed")
@pytest.mark.parametrize("mode", ["standard", "strict"])
def test_pyright_finds_the_mistakes_and_nothing_else(user, mode):
    home, python = user
    options = {"typeCheckingMode": mode, "reportUnnecessaryTypeIgnoreComment": True}
    # Optax has no types, nor is what it returns known.
    unknown = ("MemberType", "ArgumentType", "VariableType")
    options |= {f"reportUnknown{what}": False for what in unknown}
    options |= {"reportMissingTypeStubs": False, "include": [PROGRAM.name]}
    (home / "pyrightconfig.json").write_text(json.dumps(options))
    check(home, sys.executable, "-m", "pyright", "--pythonpath", python)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_mypy_finds_the_mistakes_and_nothing_else(user):
    home, python = user
    options = ["--strict", "--disable-error-code", "import-untyped"]  # Optax has no types
    options += ["--cache-dir", home / "cache", "--python-executable", python]
    check(home, sys.executable, "-m", "mypy", *options, PROGRAM.name)
