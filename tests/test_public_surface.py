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
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def imported_modules(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", fineserve_jax.__all__)
def test_a_public_name_is_what_it_is_declared_to_be(name):
    """Type checkers and the API pages read the imports under TYPE_CHECKING, which do not run."""
    declared = {}
    for node in ast.walk(ast.parse(Path(fineserve_jax.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            declared |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    value = getattr(fineserve_jax, name)
    if name != "__version__":
        module, own_name = declared[name]
        assert value is getattr(sys.modules[module], own_name)


def test_all_that_is_declared_is_public():
    hidden = {"Any", "TYPE_CHECKING"}
    tree = ast.parse(Path(fineserve_jax.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    declared = {alias.asname or alias.name for node in imports for alias in node.names}
    assert declared - hidden == set(fineserve_jax.__all__) - {"__version__"}


def test_the_version_is_that_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fineserve_jax.__version__ == project["version"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = fineserve_jax.Engin


def test_importing_the_package_imports_no_library():
    script = "import sys, fineserve_jax; print(*({'jax', 'numpy', 'pydantic', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_nothing_behind_the_front(example):
    behind = {name for name in imported_modules(example.read_text()) if name.startswith("fineserve_jax.")}
    assert not behind


def test_the_readme_imports_nothing_behind_the_front():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert not [name for block in blocks for name in imported_modules(block) if name.startswith("fineserve_jax.")]
