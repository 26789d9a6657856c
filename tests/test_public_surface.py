"""The front of the package: what it offers, what importing it costs, and that examples need nothing behind it."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fineserve_jax

ROOT = Path(__file__).parents[1]
BESIDE_THE_FRONT = {"fineserve_jax.entrypoints.tunix"}  # is made for a package that the front does without
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def imported_modules(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_all_that_is_public_is_declared_for_type_checkers():
    stub = ast.parse(Path(fineserve_jax.__file__).with_suffix(".pyi").read_text())
    (listed,) = (ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(listed) == fineserve_jax.__all__
    assert all(getattr(fineserve_jax, name) is not None for name in listed)


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fineserve_jax.__version__ == project["version"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = fineserve_jax.Engin  # type: ignore[attr-defined]


def test_importing_the_package_imports_no_library():
    script = "import sys, fineserve_jax; print(*({'jax', 'numpy', 'pydantic', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_nothing_behind_the_front(example):
    behind = {name for name in imported_modules(example.read_text()) if name.startswith("fineserve_jax.")}
    assert behind <= BESIDE_THE_FRONT


def test_the_readme_imports_nothing_behind_the_front():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert not [name for block in blocks for name in imported_modules(block) if name.startswith("fineserve_jax.")]
