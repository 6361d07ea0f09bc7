"""The examples in the docstrings and in the README run."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import jax
import pytest

import locoprop_jax
from benchmarks.costs.capture_cost import images
from benchmarks.shared.models import ViT

MODULES = [module.name for module in pkgutil.walk_packages(locoprop_jax.__path__, "locoprop_jax.")]
SLOW = {"locoprop_jax._curvature.kfac"}  # its steps take long to compile
ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODULES]
)
def test_docstring_examples_run(name):
    with jax.numpy_rank_promotion("allow"):  # JAX's default, which a user has
        assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.standard_promotion
def test_the_readmes_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["losses"][-1] < scope["losses"][0]
    assert str(scope["layers"]) in README.read_text()


def test_the_readmes_code_is_no_wider_than_github_shows_at_1280_pixels():
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 3
    assert [line for block in blocks for line in block.splitlines() if len(line) > 90] == []


@pytest.mark.standard_promotion
@pytest.mark.parametrize("page", ["index", "using", "own_method", "distributed"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    scope = {}
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        for code in blocks:
            exec(compile(code, f"docs/{page}.md", "exec"), scope)
    if page == "index":
        assert scope["last"] < scope["best"]


@pytest.mark.standard_promotion
def test_the_table_of_a_vision_transformer_is_what_is_printed():
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        vit = images(ViT(10, depth=1), 4, 28, 1)
        layers = locoprop_jax.find_layers(vit.loss_fn, vit.params, vit.batch)
    assert str(layers) in (DOCS / "using.md").read_text()


def test_every_public_name_is_in_the_reference_and_has_a_docstring():
    public = [name for name in vars(locoprop_jax) if not name.startswith("_")] + ["TrainState"]
    names = [name for name in public if not isinstance(getattr(locoprop_jax, name), ModuleType)]
    assert [name for name in names if not getattr(locoprop_jax, name).__doc__] == []
    listed = re.findall(r"^::: locoprop_jax\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({*names, "losses", "plot"})


@pytest.mark.parametrize(
    "name",
    (
        *("find_layers", "value_grad_and_capture", "accumulate", "with_fallback"),
        *("foof", "lnb", "kfac", "locoprop_s", "locoprop_m"),
    ),
)
def test_the_main_functions_have_examples(name):
    text = inspect.getdoc(getattr(locoprop_jax, name)) or ""
    _, _, examples = text.partition("\nExamples:\n")
    assert len(doctest.DocTestParser().get_examples(examples)) > 3


def test_the_tests_that_the_mathematics_names_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (DOCS / "mathematics.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test


def test_the_tests_that_the_promises_name_exist():
    text = (DOCS / "promises.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if "::" not in row and row != "| promise | test |"] == []


def test_what_the_tour_names_exists():
    text = (DOCS / "contributing.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 50
    for file, name in named:
        (path,) = [p for p in (ROOT / file, ROOT / "locoprop_jax" / file) if p.exists()]
        assert not name or re.search(rf"^(def|class) {name}\b", path.read_text(), re.M), (
            file,
            name,
        )
    for path in re.findall(r"make\.py test ([^#\n]+)", text):
        assert [word for word in path.split() if "/" in word and not (ROOT / word).exists()] == []


def test_links_between_files_of_the_repository_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("measurements/*.md")]
    links = [
        (page, link.partition("#")[0])
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not link.startswith(("http", "#"))
    ]
    assert [(str(page), link) for page, link in links if not (page.parent / link).exists()] == []
