"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fineserve_jax.errors import ModelLoadError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ModelLoadError when it is absent or malformed."""
    content = _content(path)
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a file; raises ModelLoadError when it is absent or malformed."""
    content = _content(path)
    if not isinstance(content, list):
        raise ModelLoadError(f"{path} holds a JSON {type(content).__name__}, expected a list")
    return content


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    except RecursionError:
        raise ModelLoadError(f"{path} is not usable JSON: its lists or objects are nested too deeply") from None
