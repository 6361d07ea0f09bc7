"""The wings of the package: who may import whom, and what is said about it."""

import ast
import graphlib
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import locoprop_jax

ROOT = Path(__file__).parents[2]
PACKAGE = "locoprop_jax"
# Reads the files and their imports, and draws them.
wings = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "wings.py")))

# What a wing may import beside the ground floor, the modules that lie in no wing. A new door is
# opened here first, and only downwards.
MAY_IMPORT = {
    "_tracing": set(),
    "_layers": {"_tracing"},
    "_capture": {"_tracing", "_layers"},
    "_neurons": {"_layers"},
    "_plotting": {"_layers", "_neurons"},
    "_training": {"_layers"},
    "_local_losses": {"_layers", "_training"},
    "_curvature": {"_tracing", "_layers", "_capture", "_neurons", "_training"},
}
# The tests of these are of no wing.
OTHER_TESTS = {"benchmarks", "fuzz", "outside", "project"}

MODULES = {name: path for name, path in wings.modules().items() if name != PACKAGE}
each_wing = pytest.mark.parametrize("wing", MAY_IMPORT)


def tree(module: str) -> ast.Module:
    return ast.parse(wings.modules()[module].read_text())


# --- who imports whom ----------------------------------------------------------------------------


def test_every_folder_of_the_package_is_a_wing_of_the_table():
    assert set(wings.wings()) == {f"{PACKAGE}.{wing}" for wing in MAY_IMPORT}


def test_the_table_has_no_circle():
    assert list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


@each_wing
def test_a_wing_imports_what_the_table_allows(wing):
    allowed = {PACKAGE, *(f"{PACKAGE}.{other}" for other in {wing} | MAY_IMPORT[wing])}
    found = {
        f"{module} imports {other}"
        for module in wings.rooms(f"{PACKAGE}.{wing}")
        for other in wings.imports(module)
        if wings.wing(other) not in allowed
    }
    assert found == set()


def test_the_ground_floor_imports_no_wing():
    assert wings.doors(PACKAGE) == set()


def test_modules_import_modules_and_neither_a_wing_nor_the_list_of_public_names():
    found = {
        f"{module} imports {other}"
        for module in MODULES
        for other in wings.imports(module)
        if wings.is_package(other)
    }
    assert found == set()


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: wings.imports(module) for module in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises with the circle


# --- what a wing is ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in MODULES if wings.is_package(name)])
def test_the_init_of_a_folder_describes_it_and_does_nothing(module):
    assert len(tree(module).body) == 1
    assert len((ast.get_docstring(tree(module)) or "").split()) > 3


def test_wings_are_private_and_what_is_in_them_need_not_say_so():
    private = {module for module in MODULES if wings.short(module).startswith("_")}
    inside = {module for module in MODULES if wings.wing(module) not in (module, PACKAGE)}
    assert private == set(MODULES) - inside - {f"{PACKAGE}.losses"}


@pytest.mark.parametrize("module", wings.modules())
def test_no_file_is_longer_than_400_lines(module):
    length = wings.modules()[module].read_text().count("\n")
    assert length <= 400


def test_the_package_itself_is_the_one_list_of_public_names():
    nodes = ast.walk(tree(PACKAGE))
    ours = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module.startswith(PACKAGE)]
    names = {alias.name for node in ours for alias in node.names}
    assert not [name for name in names if name.startswith("_")]
    public = {name for name in vars(locoprop_jax) if not name.startswith("_")}
    assert public == names - {"TrainState"}  # which is imported when it is asked for
    again = {
        name
        for name in public
        for module in MODULES.values()
        if re.search(rf"import .*\b{name} as {name}\b", module.read_text())
    }
    assert again == set()
    assert not [module for module in MODULES.values() if "__all__" in module.read_text()]


def test_the_folders_of_the_tests_are_the_wings():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders == {wing.removeprefix("_") for wing in MAY_IMPORT} | OTHER_TESTS


# --- what is said about it -----------------------------------------------------------------------


def test_the_picture_of_the_wings_shows_them_as_they_are():
    drawn = (ROOT / "docs" / "wings.svg").read_text()
    assert drawn == wings.draw(), "python docs/wings.py draws it again"
