"""Tokenizers of Hugging Face directories (tokenizer.json and its companions), read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.hf_schema import HFTokenIds
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.loaders.known_keys import check_keys
from fineserve_jax.loaders.tokenizer import Tokenizer, end_of_turn_ids

_DUPLICATES = "fineserve_duplicate_tokens"  # in tokenizer_config.json of a converted checkpoint
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def hf_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory; raises ModelLoadError when tokenizer.json is absent or malformed.

    End-of-sequence ids come from generation_config.json, config.json, tokenizer_config.json and the
    end-of-turn tokens of the vocabulary, together.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelLoadError(
            f"{directory} has no tokenizer.json; save one with the model's tokenizer "
            f"(save_pretrained of a fast tokenizer)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ModelLoadError(f"{path} cannot be read as a tokenizer: {error}") from error
    backend.no_truncation()  # the file may carry training-time settings
    backend.no_padding()
    settings = _optional_json(directory / "tokenizer_config.json")
    named = {name: text for name in _NAMED if (text := _token_text(settings.get(name)))}
    bos = named.get("bos_token")
    return Tokenizer(
        backend=backend,
        eos_token_ids=_eos_token_ids(directory, backend, named.get("eos_token")),
        bos_token_id=backend.token_to_id(bos) if bos else None,
        chat_template=_chat_template(directory, settings),
        special_tokens=named,
        duplicates={int(index): same for index, same in (settings.get(_DUPLICATES) or {}).items()},
    )


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files `hf_tokenizer` reads."""
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = dict(tokenizer.special_tokens)
    if tokenizer.bos_token_id is not None:
        settings["bos_token"] = tokenizer.token_text(tokenizer.bos_token_id)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    if tokenizer.duplicates:
        settings[_DUPLICATES] = tokenizer.duplicates
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "generation_config.json", {"eos_token_id": list(tokenizer.eos_token_ids)})


def _eos_token_ids(directory: Path, backend: tokenizers.Tokenizer, eos_text: str | None) -> tuple[int, ...]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        stated = check_keys(HFTokenIds, _optional_json(directory / name), f"{directory / name}: ").eos_token_id
        found += stated if isinstance(stated, list) else [] if stated is None else [stated]
    if eos_text is not None and (index := backend.token_to_id(eos_text)) is not None:
        found.append(index)
    return tuple(dict.fromkeys([*found, *end_of_turn_ids(backend)]))


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The default template: in a file of its own, or in tokenizer_config.json, there maybe among others."""
    separate = directory / "chat_template.jinja"
    if separate.exists():
        return separate.read_text(encoding="utf-8")
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        return {entry["name"]: entry["template"] for entry in stated}.get("default")
    return stated


def _token_text(entry: Any) -> str | None:
    """A token is stated as text, or as an object with its matching rules."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
