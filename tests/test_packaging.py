"""The package as it is installed: what importing it loads, and that it shadows nothing."""

import ast
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import mixloader
from mixloader import _core

ROOT = Path(__file__).parents[1]
OPTIONAL = [
    "triton",
    "transformers",
    "tokenizers",
    "numba",
    "matplotlib",
    "yaml",
    "tqdm",
    "safetensors",
    "ray",
    "lightning",
]


def run_python(code, cwd=None):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_mixloader_needs_only_torch_and_numpy():
    blocked = f"import sys; [sys.modules.__setitem__(name, None) for name in {OPTIONAL}]; import mixloader; print('ok')"
    assert run_python(blocked) == "ok"


def test_kernels_does_not_shadow_a_package_of_that_name(tmp_path):
    """`kernels` on PyPI is Hugging Face's; from the repository's root it must still be found."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.whose)"
    assert run_python(code, cwd=ROOT) == "theirs"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "mixloader" / "kernels").is_symlink()


def test_the_stub_names_what_the_core_has():
    stub = ast.parse((ROOT / "mixloader" / "_core.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)} | set(classes) | {"WEIGHT_ONE"}
    assert {name for name in names if not name.startswith("_")} == {
        name for name in dir(_core) if not name.startswith("_")
    }
    methods = {node.name for node in classes["Streamer"].body if isinstance(node, ast.FunctionDef)} - {"__init__"}
    assert methods == {name for name in dir(_core.Streamer) if not name.startswith("_")}


def test_the_constraints_leave_triton_to_torch():
    """A CUDA build of torch requires one version of triton; another pin would leave pip without a solution."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in lines)
    assert not any(line.startswith("triton") for line in lines)


def test_torch_is_no_build_requirement_and_the_extras_are_there():
    pyproject = (ROOT / "pyproject.toml").read_text()
    build = pyproject[pyproject.index("[build-system]") : pyproject.index("[project]")]
    assert "torch" not in build
    extras = {"triton", "hf", "mds", "lightning", "ray", "fit", "plot", "dev", "all"}
    declared = " ".join(requires("mixloader"))
    assert all(f'extra == "{extra}"' in declared for extra in extras)
    assert mixloader.__version__ == version("mixloader")
