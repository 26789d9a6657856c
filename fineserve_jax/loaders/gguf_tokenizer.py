"""Tokenizers rebuilt from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_schema import GGUFTokenizerKeys
from fineserve_jax.loaders.known_keys import check_keys, shown
from fineserve_jax.loaders.tokenizer import END_OF_TURN_TOKENS, Tokenizer, end_of_turn_ids

log = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_LOOKS_SPECIAL = re.compile(r"<\|[^\s|<>]+\|>")

_TEMPLATE = "tokenizer.chat_template"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL


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
    return meta


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


def _byte_level_bpe(file: GGUFFile, meta: dict[str, Any]) -> Backend:
    pre = meta.get("tokenizer.ggml.pre")
    if pre is None:
        log.warning(
            "%s does not say how text is split before tokenization (metadata tokenizer.ggml.pre): GPT-2's rules are "
            "used, and tokens may differ from those the model was trained on; convert the model again",
            file.path,
        )
        pre = "default"
    if pre not in _PRE_TOKENIZERS:
        raise ModelLoadError(
            f"{file.path} has the pre-tokenizer {pre!a}, which is not supported; "
            f"supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    if "tokenizer.ggml.merges" not in meta:
        raise ModelLoadError(f"{file.path} holds no tokenizer merges (metadata tokenizer.ggml.merges)")
    vocabulary = _vocabulary(meta)
    merges = _merges(file, vocabulary, meta["tokenizer.ggml.merges"])
    model = BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3_NAMES)
    backend = Backend(model)
    if pre in _QWEN2_NAMES:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


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
    vocab = _vocabulary(meta)
    unknown = meta["tokenizer.ggml.tokens"][meta.get("tokenizer.ggml.unknown_token_id", 0)]
    scores = meta.get("tokenizer.ggml.scores")
    if scores is None:
        raise ModelLoadError(f"{file.path} holds no tokenizer scores (metadata tokenizer.ggml.scores)")
    model = BPE(
        vocab=vocab,
        merges=_merges_from_scores(vocab, scores, meta.get("tokenizer.ggml.token_type")),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=unknown,
    )
    backend = Backend(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    strip = []
    if meta.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        strip = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: list[float], types: list[int] | None) -> list[tuple[str, str]]:
    """SentencePiece merges whichever pair makes the best-scored piece; BPE wants the pairs in that order."""
    ranked = []
    for piece, index in vocab.items():
        if types is not None and types[index] != 1:  # only normal pieces take part in merging
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _vocabulary(meta: dict[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])}


def _gpt2_pre() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_pre() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_pre()])


def _split_pre(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits_pre,
    "default": _gpt2_pre,
    "gpt-2": _gpt2_pre,
    **dict.fromkeys(_LLAMA3_NAMES, lambda: _split_pre(_LLAMA3_SPLIT)),
    **dict.fromkeys(_QWEN2_NAMES, lambda: _split_pre(_QWEN2_SPLIT)),
}
_BUILDERS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}


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
        if kind == _CONTROL or token in END_OF_TURN_TOKENS or (index in ends and _LOOKS_SPECIAL.fullmatch(token))
    ]
    defined = [tokens[i] for i, kind in enumerate(types) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control if t])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined if t])


def _add_sequence_ends(backend: Backend, meta: dict[str, Any], kind: str) -> None:
    """What `add_special_tokens` adds. Where the file does not say, llama.cpp's defaults hold."""
    bos_by_default = kind == "llama" or meta.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
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
