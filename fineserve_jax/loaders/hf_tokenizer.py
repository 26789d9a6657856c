"""Tokenizers of Hugging Face directories (tokenizer.json and its companions), read and written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.hf_schema import (
    AddedTokenKeys,
    AddedTokensFile,
    HFTokenIds,
    HFTokenizerKeys,
    NamedTokenKeys,
)
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.loaders.known_keys import Schema, check_keys, shown
from fineserve_jax.loaders.tokenizer import Tokenizer, end_of_turn_ids

log = logging.getLogger(__name__)

DEFAULT = "default"


def hf_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory; raises ModelLoadError when tokenizer.json is absent or malformed.

    Named and added tokens come from tokenizer_config.json, special_tokens_map.json and added_tokens.json as well.
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
    settings = _checked(HFTokenizerKeys, directory / "tokenizer_config.json")
    in_map = _checked(NamedTokenKeys, directory / "special_tokens_map.json")
    named = in_map.texts() | settings.texts()
    _add_tokens(backend, settings, directory)
    _make_special(backend, [*in_map.special(), *settings.special()])
    bos = named.get("bos_token")
    _warn_of_absent(directory, backend, named)
    templates = _chat_templates(directory, settings)
    return Tokenizer(
        backend=backend,
        eos_token_ids=_eos_token_ids(directory, backend, named.get("eos_token")),
        bos_token_id=backend.token_to_id(bos) if bos else None,
        chat_template=templates.pop(DEFAULT, None),
        chat_templates=templates,
        special_tokens=named,
        duplicates={_index(text): same for text, same in (settings.fineserve_duplicate_tokens or {}).items()},
    )


def _add_tokens(backend: tokenizers.Tokenizer, settings: HFTokenizerKeys, directory: Path) -> None:
    """Tokens that only a companion of tokenizer.json names, in the order of their ids, as transformers adds them."""
    path = directory / "added_tokens.json"
    older = check_keys(AddedTokensFile, {"tokens": _optional_json(path)}, f"{path}: ").tokens
    wanted = {index: AddedTokenKeys(content=text) for text, index in older.items() if text}
    wanted |= {_index(text): token for text, token in (settings.added_tokens_decoder or {}).items() if token.content}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for index, token in sorted(wanted.items()):
        if token.content not in known:
            rules = token.model_dump(include={"special", "normalized", "lstrip", "rstrip", "single_word"})
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([tokenizers.AddedToken(token.content, **rules)])
        found = backend.token_to_id(token.content)
        if found != index:
            log.warning(
                "%s: the added token %a should have the id %d, but tokenizer.json gives it %s; save it again",
                directory, token.content, index, found,
            )  # fmt: skip


def _make_special(backend: tokenizers.Tokenizer, named: list[AddedTokenKeys]) -> None:
    """Tokens that a companion names are found in texts and left out of output, as in transformers."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for token in named:
        if token.content and token.content not in special and backend.token_to_id(token.content) is not None:
            rules = token.model_dump(include={"normalized", "lstrip", "rstrip", "single_word"})
            backend.add_special_tokens([tokenizers.AddedToken(token.content, special=True, **rules)])


def _warn_of_absent(directory: Path, backend: tokenizers.Tokenizer, named: dict[str, str]) -> None:
    """A text is begun and ended by tokens; those that are named and do not exist are not added, nor waited for."""
    for name in ("bos_token", "eos_token"):
        if (text := named.get(name)) and backend.token_to_id(text) is None:
            log.warning("%s: %s is %a, which is no token of tokenizer.json; it is not used", directory, name, text)


def _index(text: str) -> int:
    """A token id that JSON holds as a key."""
    if not (text.isascii() and text.isdigit() and len(text) < 11):
        raise ModelLoadError(f"tokenizer_config.json has {shown(text)} for a token id, must be a number")
    return int(text)


def check_texts_are_ended(directory: Path, tokenizer: Tokenizer) -> None:
    """Raises ModelLoadError for a directory that wants a text ended by a token which tokenizer.json does not add."""
    settings = _checked(HFTokenizerKeys, directory / "tokenizer_config.json")
    if settings.add_eos_token and tokenizer.encode("a")[-1] not in tokenizer.eos_token_ids:
        raise ModelLoadError(
            f"{directory}: tokenizer_config.json has add_eos_token on, and tokenizer.json adds none, by which the "
            "vector of a text would be another one; let the post-processor of tokenizer.json add it"
        )


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files `hf_tokenizer` reads."""
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = dict(tokenizer.special_tokens)
    if tokenizer.bos_token_id is not None:
        settings["bos_token"] = tokenizer.token_text(tokenizer.bos_token_id)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    if tokenizer.chat_templates:
        default = {} if tokenizer.chat_template is None else {DEFAULT: tokenizer.chat_template}
        named = (default | tokenizer.chat_templates).items()
        settings["chat_template"] = [{"name": name, "template": source} for name, source in named]
    if tokenizer.duplicates:
        settings["fineserve_duplicate_tokens"] = tokenizer.duplicates
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "generation_config.json", {"eos_token_id": list(tokenizer.eos_token_ids)})


def _eos_token_ids(directory: Path, backend: tokenizers.Tokenizer, eos_text: str | None) -> tuple[int, ...]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        stated = _checked(HFTokenIds, directory / name).eos_token_id
        found += stated if isinstance(stated, list) else [] if stated is None else [stated]
    if beyond := [index for index in found if backend.id_to_token(index) is None]:
        log.warning("%s: eos_token_id %d is no token of tokenizer.json; no text will end by it", directory, beyond[0])
    if eos_text is not None and (index := backend.token_to_id(eos_text)) is not None:
        found.append(index)
    return tuple(dict.fromkeys([*found, *end_of_turn_ids(backend)]))


def _chat_templates(directory: Path, settings: HFTokenizerKeys) -> dict[str, str]:
    """Name -> source: those in tokenizer_config.json, one alone being the default, and those in files of their own."""
    stated = settings.chat_template
    found = {DEFAULT: stated} if isinstance(stated, str) else {entry.name: entry.template for entry in stated or ()}
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (default := directory / "chat_template.jinja").exists():
        files[DEFAULT] = default
    for name, path in files.items():
        try:
            found[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read {path}: {error}") from error
    return found


def _checked(schema: type[Schema], path: Path) -> Schema:
    return check_keys(schema, _optional_json(path), f"{path}: ")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
