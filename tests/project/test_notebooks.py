"""The notebooks run, open in Colab, and are stored with what they print and draw."""

import ast
import base64
import importlib.util
from pathlib import Path

import jax
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/locoprop-jax/locoprop_jax/blob/main/notebooks/"
INSTALL = (
    '%pip install -q "locoprop_jax[notebooks] @ git+https://github.com/locoprop-jax/locoprop_jax"'
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def test_there_are_six():
    assert [path.stem[0] for path in NOTEBOOKS] == list("123456")


@each_notebook
@pytest.mark.filterwarnings("ignore")  # those of the kernel's own messages
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    variables = {
        "LOCOPROP_QUICK": "1",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(tmp_path),  # not the user's
        "JAX_PLATFORMS": "cpu",
        # As in `conftest.py`: compiling is what takes long.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    if jax.config.jax_compilation_cache_dir:
        variables["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        variables["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    execute.execute(path)


@each_notebook
def test_a_notebook_opens_in_colab_and_installs_the_package_there(path):
    badge = cells(path, "markdown")[0].source.splitlines()[0]
    assert badge.startswith("[![Open in Colab](") and badge.endswith(f"]({COLAB}{path.name})")
    first = cells(path, "code")[0].source
    assert INSTALL in first
    module = ast.parse(first.replace(INSTALL, "pass"))  # valid Python otherwise
    assert any(isinstance(node, ast.If) for node in module.body)


@each_notebook
def test_a_notebook_is_stored_with_its_output(path):
    assert path.stat().st_size < 600_000
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    images = [
        output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})
    ]
    assert images
    assert all(len(base64.b64decode(image)) < 200_000 for image in images)
