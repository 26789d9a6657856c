"""Tokenizers rebuilt from GGUF metadata: BPE with its merges (`gpt2`, `gemma4`) and SentencePiece BPE (`llama`)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_schema import GGUFTokenizerKeys
from fineserve_jax.loaders.gguf_sentencepiece import USER_DEFINED, piece_texts, sentencepiece_backend, spell_spaces
from fineserve_jax.loaders.gguf_splitting import SPLITTINGS, Splitting
from fineserve_jax.loaders.known_keys import check_keys, shown
from fineserve_jax.loaders.tokenizer import END_OF_TURN_TOKENS, Tokenizer, end_of_turn_ids

log = logging.getLogger(__name__)

_UNKNOWN, _CONTROL = 2, 3  # values of tokenizer.ggml.token_type

_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
_KNOWN_KEYS = {field.alias for field in GGUFTokenizerKeys.model_fields.values()}
# Beginnings of keys of other kinds of tokenizers, of tokens that only filling in the middle uses, and of copies.
_HARMLESS_KEYS = tuple(
    f"tokenizer.{key}"
    for key in (
        *(
            "chat_template.",
            "chat_templates",
            "huggingface.",
            "rwkv.",
            "ggml.fim_",
            "ggml.prefix_token",
            "ggml.suffix_token",
        ),
        *("ggml.middle_token", "ggml.seperator_token", "ggml.cls_token", "ggml.mask_token", "ggml.token_type_count"),
        *("ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap", "ggml.normalizer.", "ggml.add_sep_token"),
    )
)
_LOOKS_SPECIAL = re.compile(r"<\|[^\s|<>]+\|>")

_TEMPLATE = "tokenizer.chat_template"


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises ModelLoadError when the file has none or one of an unsupported kind, or when its metadata are damaged. Warns
    of metadata that are absent and make a guess necessary.
    """
    meta = _checked_metadata(file)
    kind = meta["tokenizer.ggml.model"]
    backend = _build(_BUILDERS[kind], file, meta)
    _add_special_tokens(backend, meta, file)
    _add_sequence_ends(backend, meta, kind)
    return Tokenizer(
        backend=backend,
        eos_token_ids=_eos_token_ids(backend, meta),
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        chat_template=meta.get(_TEMPLATE),
        chat_templates=_named_templates(meta),
        special_tokens=_named_tokens(meta),
        duplicates=_duplicates(meta["tokenizer.ggml.tokens"]),
    )


def _named_templates(meta: dict[str, Any]) -> dict[str, str]:
    """Templates besides the default, which stand under its key and their name."""
    prefix = f"{_TEMPLATE}."
    named = {key.removeprefix(prefix): value for key, value in meta.items() if key.startswith(prefix)}
    return {name: source for name, source in named.items() if isinstance(source, str)}


def _checked_metadata(file: GGUFFile) -> dict[str, Any]:
    """The tokenizer's metadata, of the right types and lengths, its special ids inside the vocabulary."""
    where = f"{file.path}: "
    own = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    meta = check_keys(GGUFTokenizerKeys, own, where).model_dump(by_alias=True, exclude_none=True)
    for key in sorted(meta.keys() - _KNOWN_KEYS):
        if not key.startswith(_HARMLESS_KEYS):
            log.warning("%s has %a, which nothing here reads: tokens may be others than the file means", file.path, key)
    kind, tokens = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if kind is None or not tokens:
        raise ModelLoadError(
            f"{file.path} holds no tokenizer (metadata tokenizer.ggml.model and tokenizer.ggml.tokens); "
            "use a GGUF file converted together with its tokenizer"
        )
    if kind not in _BUILDERS:
        raise ModelLoadError(
            f"{file.path} has a tokenizer of kind {kind!a}, which is not supported; supported: {', '.join(_BUILDERS)}"
        )
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in meta and len(meta[key]) != len(tokens):
            raise ModelLoadError(f"{where}{key} has {len(meta[key])} entries for {len(tokens)} tokens")
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        index = meta.get(key := f"tokenizer.ggml.{name}_token_id")
        if index is not None and index >= len(tokens):
            raise ModelLoadError(f"{where}{key} is {index}, but the vocabulary has only {len(tokens)} tokens")
    return _default_ends(meta) | meta


def _default_ends(meta: dict[str, Any]) -> dict[str, int]:
    """A SentencePiece vocabulary begins with <unk>, <s> and </s> where the file does not say which they are."""
    begins = meta["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]
    if meta["tokenizer.ggml.model"] != "llama" or not begins:
        return {}
    return {f"tokenizer.ggml.{name}_token_id": index for index, name in enumerate(("unknown", "bos", "eos"))}


def _build(builder: Callable[[GGUFFile, dict[str, Any]], Backend], file: GGUFFile, meta: dict[str, Any]) -> Backend:
    try:
        return builder(file, meta)
    except ModelLoadError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise ModelLoadError(f"{file.path}: the vocabulary cannot be used: {error}") from error


def _duplicates(tokens: list[str]) -> dict[int, int]:
    """Ids whose text another token has, too: the last one is used in encoding, as in llama.cpp."""
    last = {token: index for index, token in enumerate(tokens)}
    return {index: last[token] for index, token in enumerate(tokens) if last[token] != index}


def _bpe(file: GGUFFile, meta: dict[str, Any]) -> Backend:
    splitting = _splitting(file, meta)
    if "tokenizer.ggml.merges" not in meta:
        raise ModelLoadError(f"{file.path} holds no tokenizer merges (metadata tokenizer.ggml.merges)")
    tokens = meta["tokenizer.ggml.tokens"] if splitting.in_bytes else piece_texts(meta)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges(file, vocabulary, meta["tokenizer.ggml.merges"])
    in_bytes = splitting.in_bytes
    model = BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges, byte_fallback=not in_bytes)
    backend = Backend(model)
    if not in_bytes:
        spell_spaces(backend, prefix=False)
        return backend
    if splitting.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitting(file: GGUFFile, meta: dict[str, Any]) -> Splitting:
    pre = _pre_name(meta)
    if pre is None:
        log.warning(
            "%s does not say how text is split before tokenization (metadata tokenizer.ggml.pre): GPT-2's rules are "
            "used, and tokens may differ from those the model was trained on; convert the model again",
            file.path,
        )
    if pre is not None and pre not in SPLITTINGS:
        raise ModelLoadError(
            f"{file.path} has the pre-tokenizer {shown(pre)}, which is not supported; "
            f"supported: {', '.join(sorted(SPLITTINGS))}"
        )
    return SPLITTINGS[pre or "default"]


def _pre_name(meta: dict[str, Any]) -> str | None:
    """A vocabulary of kind "gemma4" is split in one way only."""
    stated: str | None = meta.get("tokenizer.ggml.pre")
    return "gemma4" if meta["tokenizer.ggml.model"] == "gemma4" else stated


def _merges(file: GGUFFile, vocabulary: dict[str, int], merges: list[str]) -> list[tuple[str, str]]:
    """Pairs of tokens; raises ModelLoadError for a merge that is no pair, or of tokens that do not exist."""
    pairs = []
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not right or not {left, right, left + right} <= vocabulary.keys():
            raise ModelLoadError(
                f"{file.path}: tokenizer.ggml.merges[{index}] is {shown(merge)}, must be two tokens of the vocabulary "
                "with a space between, which together are a token, too"
            )
        pairs.append((left, right))
    return pairs


def _sentencepiece_bpe(file: GGUFFile, meta: dict[str, Any]) -> Backend:
    scores = meta.get("tokenizer.ggml.scores")
    if scores is None:
        raise ModelLoadError(f"{file.path} holds no tokenizer scores (metadata tokenizer.ggml.scores)")
    return sentencepiece_backend(meta, scores)


_BUILDERS = {"gpt2": _bpe, "gemma4": _bpe, "llama": _sentencepiece_bpe}


def _add_special_tokens(backend: Backend, meta: dict[str, Any], file: GGUFFile) -> None:
    """Control tokens are matched in text and skipped in output; user-defined ones are only matched."""
    types = meta.get("tokenizer.ggml.token_type")
    tokens = meta["tokenizer.ggml.tokens"]
    if types is None:
        log.warning(
            "%s does not say which tokens are special (metadata tokenizer.ggml.token_type): those that look like "
            "<|name|> are taken for it; convert the model again",
            file.path,
        )
        types = [_CONTROL if _LOOKS_SPECIAL.fullmatch(token) else 1 for token in tokens]
    ends = {meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    control = [
        token
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        # As in llama.cpp: what ends a turn is a control token, whatever the file says.
        if kind in (_UNKNOWN, _CONTROL)
        or token in END_OF_TURN_TOKENS
        or (index in ends and _LOOKS_SPECIAL.fullmatch(token))
    ]
    spelt = piece_texts(meta) if backend.pre_tokenizer is None else tokens
    defined = [spelt[i] for i, kind in enumerate(types) if kind == USER_DEFINED]
    strips = _swallows_space(file, meta["tokenizer.ggml.model"])
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=strips and t not in _PHI3_PLAIN) for t in control if t]
    )
    backend.add_tokens([AddedToken(t, special=False, normalized=False, rstrip=strips) for t in defined if t])


def _swallows_space(file: GGUFFile, kind: str) -> bool:
    """Whether special tokens take the white space behind them: those of Phi-3 do, which its files do not say.

    Its architecture is that of Phi-4, too, whose vocabulary is of another kind. llama.cpp goes by the model's name.
    """
    name, architecture = file.metadata.get("general.name"), file.metadata.get("general.architecture")
    named = isinstance(name, str) and any(phi in name.lower() for phi in ("phi-3", "phi3"))
    return kind == "llama" and (named or architecture == "phi3")


def _add_sequence_ends(backend: Backend, meta: dict[str, Any], kind: str) -> None:
    """What `add_special_tokens` adds. Where the file does not say, llama.cpp's defaults hold."""
    bos_by_default = kind in ("llama", "gemma4") or SPLITTINGS[meta.get("tokenizer.ggml.pre", "default")].add_bos
    ends = {
        "bos": meta.get("tokenizer.ggml.add_bos_token", bos_by_default),
        "eos": meta.get("tokenizer.ggml.add_eos_token", False),
    }
    names = {end: meta.get(f"tokenizer.ggml.{end}_token_id") for end, wanted in ends.items() if wanted}
    added = {end: (meta["tokenizer.ggml.tokens"][index], index) for end, index in names.items() if index is not None}
    if not added:
        return
    before = [added["bos"][0]] if "bos" in added else []
    after = [added["eos"][0]] if "eos" in added else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=list(added.values())
    )


def _eos_token_ids(backend: Backend, meta: dict[str, Any]) -> tuple[int, ...]:
    stated = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys([*(i for i in stated if i is not None), *end_of_turn_ids(backend)]))


def _named_tokens(meta: dict[str, Any]) -> dict[str, str]:
    ids = {
        "bos_token": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token": meta.get("tokenizer.ggml.eos_token_id"),
        "unk_token": meta.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": meta.get("tokenizer.ggml.padding_token_id"),
    }
    tokens = meta["tokenizer.ggml.tokens"]
    return {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
