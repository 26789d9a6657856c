"""Writes the map of the modules in CONTRIBUTING.md: what each file's docstring says first.

python docs/module_map.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- module map: docs/module_map.py writes it -->\n", "<!-- end of the module map -->\n"
FOLDERS = ("fineserve_jax", "models", "pallas_kernels")


def first_sentence(path: Path) -> str:
    """What a module's docstring says before its first full stop, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = re.split(r"(?<=[^.][.?])\s", " ".join(docstring.split("\n\n")[0].split()), maxsplit=1)[0]
    return first.rstrip(".:")


def module_map() -> str:
    """A list of folders, and of the modules in each."""
    lines = []
    for top in FOLDERS:
        packages = sorted(path.parent for path in (ROOT / top).rglob("__init__.py"))
        for package in packages:
            lines.append(
                f"\n**`{package.relative_to(ROOT)}/`** {first_sentence(package / '__init__.py')}".rstrip() + "\n"
            )
            modules = sorted(path for path in package.glob("*.py") if path.name != "__init__.py")
            lines += [f"- `{path.name}`: {first_sentence(path)}" for path in modules]
    return "\n".join(lines).lstrip("\n") + "\n"


def with_map(guide: str) -> str:
    """The guide with the map as it is now between its two marks."""
    before, rest = guide.split(BEGIN)
    return before + BEGIN + "\n" + module_map() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    GUIDE.write_text(with_map(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
