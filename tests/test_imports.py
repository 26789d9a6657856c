"""What may import what. Imports under TYPE_CHECKING, and those inside functions, count like any others."""

import ast
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "fineserve_jax"

# Folders whose files and folders are rooms of their own; they only gather them.
HALLS = {"request", "entrypoints"}
# The storeys of the package, from the bottom to the top: a room imports from itself and from storeys below its own.
# Rooms that share a storey do not know each other. "" is the package's front, `fineserve_jax/__init__.py`.
STOREYS = [
    {"errors", *HALLS},
    {"validation"},
    {"request.structured", "request.logits_processor"},
    {"request.sampling_params", "request.request_options"},
    {"request.request"},
    {"pallas_kernels"},
    {"models", "kv"},
    {"loaders", "scheduler"},
    {"runner"},
    {"engine"},
    {"fleet"},
    {"llm", "entrypoints.openai_api", "entrypoints.metrics"},
    {"async_llm"},
    {"entrypoints.batch", "sim", "entrypoints.server", "entrypoints.lm_eval", "entrypoints.tunix"},
    {""},
    {"entrypoints.cli"},
]
# What can be used without the rest: these import nothing else of the package.
ALONE = {"pallas_kernels"}
# What plans on the host, and so runs where no JAX is installed: nothing that they import when they run leads to JAX.
WITHOUT_JAX = {
    "errors",
    "validation",
    "request.structured",
    "request.logits_processor",
    "request.sampling_params",
    "request.request_options",
    "request.request",
    "kv",
    "scheduler",
    "sim",
}
JAX = {"jax", "jaxlib", "flax", "jaxtyping", "orbax", "ml_dtypes"}


def find_modules() -> dict[str, Path]:
    """Dotted name -> file. Folders at the repository's root that are linked into the package are followed."""
    files = [path for top in (ROOT / PACKAGE).iterdir() for path in ([top] if top.is_file() else top.rglob("*.py"))]
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in files if path.suffix == ".py"}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): path for path, names in parts.items()}


def imports_of(path: Path, modules: dict[str, Path], *, as_run: bool = False) -> set[str]:
    """Modules that a file imports: the package's own by their full names, others by their first.

    With `as_run`, without those under TYPE_CHECKING: fronts import what they name when it is asked for.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if as_run:
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    own = {name if name in modules else name.rpartition(".")[0] for name in names if room_of(name) is not None}
    return own | {name.partition(".")[0] for name in names if room_of(name) is None}


def room_of(module: str) -> str | None:
    """The file or folder of the package's first level, or of a hall, that a module is in; None: not the package's."""
    package, *parts = module.split(".")
    if package != PACKAGE:
        return None
    return ".".join(parts[: 2 if parts and parts[0] in HALLS else 1])


MODULES = find_modules()
IMPORTS = {module: imports_of(path, MODULES) for module, path in MODULES.items()}
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}


def test_every_room_has_a_storey():
    assert {room_of(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_a_room_imports_from_storeys_below_it(room):
    for module in MODULES:
        if room_of(module) == room:
            others = {name: room_of(name) for name in IMPORTS[module] if room_of(name) not in (None, room)}
            above = {name for name, other in others.items() if room in ALONE or LEVEL[other] >= LEVEL[room]}
            assert not above, f"{module} imports {', '.join(sorted(above))}"


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("room", sorted(WITHOUT_JAX))
def test_the_hosts_rooms_do_without_jax(room):
    to_visit, seen = [module for module in MODULES if room_of(module) == room], set()
    while to_visit:
        module = to_visit.pop()
        if module not in seen:
            seen.add(module)
            imported = imports_of(MODULES[module], MODULES, as_run=True)
            assert not imported & JAX, f"{room} leads to {module}, which imports {', '.join(imported & JAX)}"
            # Importing a module runs the __init__ of every package around it.
            around = {module[:i] for i, letter in enumerate(module) if letter == "."}
            to_visit += [name for name in imported | around if name in MODULES]


def test_every_package_that_is_imported_is_declared():
    """Directly, not by way of what another dependency happens to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [
        name
        for extra in ("plot", "files", "remote", "ray", "lm-eval", "tunix", "serve")
        for name in project["optional-dependencies"][extra]
    ]
    declared = {requirement.split(">")[0].split("[")[0].lower() for requirement in project["dependencies"] + optional}
    distributions = {"yaml": "pyyaml", "orbax": "orbax-checkpoint", "absl": "absl-py", "tunix": "google-tunix"}
    used = {name for imported in IMPORTS.values() for name in imported if room_of(name) is None}
    missing = {
        distributions.get(name, name.replace("_", "-")) for name in used - set(sys.stdlib_module_names)
    } - declared
    assert not missing, f"pyproject.toml does not declare {', '.join(sorted(missing))}"
