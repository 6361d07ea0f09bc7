"""What is built from the repository, and what comes with importing it."""

import email
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import locoprop_jax as lp

ROOT = Path(__file__).parents[2]
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "locoprop_jax").rglob("*.py")}
SOURCES.add("locoprop_jax/py.typed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel and a source distribution."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", target, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return target


def test_the_wheel_is_the_package_and_its_licence(built):
    (path,) = built.glob("*.whl")
    assert path.name == f"locoprop_jax-{lp.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
    info = f"locoprop_jax-{lp.__version__}.dist-info"
    extra = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert names == SOURCES | extra


def test_the_source_distribution_can_be_built_again(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    about = {"CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".gitignore"}
    assert names == SOURCES | about


def test_the_description_on_an_index_has_no_link_relative_to_the_repository(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
        about = email.message_from_bytes(wheel.read(name))
    text = about.get_payload()
    assert about["Description-Content-Type"] == "text/markdown"
    pictures = re.findall(r'!\[[^\]]*\]\(([^)\s]+)|\bsrc="([^"]+)', text)
    links = re.findall(r'\]\(([^)\s]+)|\b(?:src|href)="([^"]+)', text)
    targets = ["".join(link) for link in links]
    assert targets and not [link for link in targets if not re.match("https://|#", link)]
    assert not ["".join(link) for link in pictures if "/blob/" in "".join(link)]
    ours = [link for link in targets if "/locoprop-jax/locoprop_jax/" in link]
    files = {re.sub("^.*?/main/|#.*", "", link) for link in ours if "/main/" in link}
    assert files and not {name for name in files if not (ROOT / name).exists()}


def test_the_workflows_run_commands_that_there_are_and_need_no_secret():
    commands = runpy.run_path(str(ROOT / "make.py"))["COMMANDS"]
    flows = {path.stem: path.read_text() for path in (ROOT / ".github" / "workflows").iterdir()}
    assert set(flows) == {"ci", "release"}
    for text in flows.values():
        assert set(re.findall(r"make\.py (\w+)", text)) <= set(commands)
        assert set(re.findall(r"[\w./]*\.ci/\w+", text)) <= {".ci/run"}
        assert "secrets." not in text and "password" not in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    ci, release = (yaml.safe_load(flows[name]) for name in ("ci", "release"))
    assert ci["jobs"]["everything"]["steps"][-1] == {"run": ".ci/run"}
    jobs = release["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert jobs["publish"]["needs"] == ["test", "build"]
    may_sign = [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})]
    assert may_sign == ["publish"]


def test_the_version_is_that_of_the_metadata_and_has_its_changes_listed():
    assert lp.__version__ == version("locoprop_jax")
    assert re.search(
        rf"^## \[{re.escape(lp.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_the_citation_names_the_version():
    assert f"\nversion: {lp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def imported(code: str) -> set[str]:
    """The packages that some code imports, in a Python of its own."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(result.stdout.split())


def test_importing_takes_little_more_than_jax_and_optax():
    ours = imported("import locoprop_jax") - imported("import jax, optax, jaxtyping")
    assert ours == {"locoprop_jax"}


def test_importing_warns_of_nothing():
    command = [sys.executable, "-W", "error", "-c", "import locoprop_jax"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


def test_only_the_train_state_needs_flax():
    assert "flax" in imported("import locoprop_jax; locoprop_jax.TrainState")
    hidden = "import sys; sys.modules['flax'] = None; import locoprop_jax as lp; lp.TrainState"
    result = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, cwd=ROOT
    )
    assert "pip install 'locoprop_jax[flax]'" in result.stderr
