"""The one entry, `python -m benchmarks NAME`, and the commands that are written down."""

import ast
import json
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import ENTRIES, MODULES, main

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "make.py", "pyproject.toml")),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("notebooks/*.ipynb"),
    *ROOT.glob("benchmarks/**/*.py"),
    *ROOT.glob("benchmarks/*/*requirements.txt"),
]
# The old form, a module; or a name; or neither, for the list. In make.py the words are strings.
COMMAND = re.compile(r'-m(?:\s+|", ")benchmarks(?:(\.[\w.]+)|(?:\s+|", ")(\w+))?')


def text(page: Path) -> str:
    """What is written, without the line ends of a notebook's JSON."""
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])


def written(page: Path) -> list[str]:
    """What a page's commands name; a module's path, the old form, begins with a dot."""
    found = (old or name for old, name in COMMAND.findall(text(page)))
    return [name for name in found if name not in ("", "NAME")]


@pytest.mark.parametrize("name", MODULES)
def test_each_name_says_how_it_is_called(name, capsys):
    with pytest.raises(SystemExit) as raised:
        main([name, "--help"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name} [-h]")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_name_there_is_a_line_for_each(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(MODULES)
    titles = [line.partition(":") for line in lines[1:] if line[:1].strip()]
    assert [folder for folder, _, _ in titles] == list(ENTRIES)
    assert all(title.endswith(".") for _, _, title in titles)


def test_an_unknown_name_is_refused_with_those_there_are(capsys):
    assert main(["autoencodr"]) == 2
    error = capsys.readouterr().err
    assert "no 'autoencodr'" in error and all(name in error for name in MODULES)


def test_what_has_a_command_line_is_listed():
    modules = {
        f"benchmarks.{folder}.{path.stem}"
        for folder in ENTRIES
        for path in (ROOT / "benchmarks" / folder).glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    }
    assert modules == set(MODULES.values())


def test_commands_are_found_however_they_are_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`python -m benchmarks speed`, `python -m\nbenchmarks tune --trials 8`, "
        '"-m", "benchmarks", "autoencoder", python -m benchmarks.paths; '
        "`python -m benchmarks` lists what there is, python -m benchmarks NAME runs it"
    )
    assert written(page) == ["speed", "tune", "autoencoder", ".paths"]


def test_the_commands_that_are_written_down_exist():
    found = {(page, name) for page in PAGES for name in written(page)}
    assert {(page, name) for page, name in found if name not in MODULES} == set()
    assert {name for _, name in found} == {*MODULES}


def test_what_is_shared_knows_nothing_of_those_that_share_it():
    for path in (ROOT / "benchmarks" / "shared").glob("*.py"):
        assert not re.search(rf"benchmarks\.({'|'.join(ENTRIES)})\b", path.read_text()), path
