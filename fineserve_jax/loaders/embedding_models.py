"""Checkpoints that look like language models' and make vectors or scores of texts: refused with a word that they do,
unless files of sentence-transformers say how."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fineserve_jax.errors import ModelLoadError

_BARE = re.compile(r"(?!.*(For|LMHead)).*Model")
_SCORING = re.compile(r".*For(SequenceClassification|TokenClassification|RewardModel|QuestionAnswering|TextEncoding)")
_REMEDY = "and cannot write text; use a language model (such as the instruct model of the same family)"
_FOR_VECTORS = "for vectors, a directory with modules.json of sentence-transformers, which says how they are made"


def with_head(raw: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """config.json with the architecture that has an output head on top of the one it states, such as Qwen3ForCausalLM
    on Qwen3Model, and whether it states such a one itself."""
    stated = raw.get("architectures")
    if not (isinstance(stated, list) and stated and isinstance(stated[0], str) and _BARE.fullmatch(stated[0])):
        return raw, True
    return {**raw, "architectures": [re.sub("(Text)?Model$", "ForCausalLM", stated[0])]}, False


def with_prefix(names: Collection[str]) -> dict[str, str]:
    """Of tensors that are called as in a model without a head: what the model with one calls them."""
    if not _are_bare(names):
        return {name: name for name in names}
    return {name: name if name.startswith("lm_head.") else f"model.{name}" for name in names}


def refuse_other_tasks(architecture: str) -> None:
    """Raises ModelLoadError for an architecture without an output head over the vocabulary."""
    if _BARE.fullmatch(architecture):
        what = "a model without an output head, as embedding models are, and no modules.json says how it makes vectors"
        remedy = f"{_REMEDY}, or, {_FOR_VECTORS}"
    elif _SCORING.fullmatch(architecture):
        what, remedy = "a model that scores or classifies texts", _REMEDY
    else:
        return
    raise ModelLoadError(f"architecture {architecture!a} is {what}: it makes vectors or scores of texts, {remedy}")


def refuse_bare_tensors(directory: Path, names: Collection[str], is_tied: bool) -> None:
    """Raises ModelLoadError for tensors that are called as in a model without a head, or that lack the head.

    names: of all tensors. is_tied: whether the embedding is the head, too.
    """
    if _are_bare(names):
        found = "its tensors are called as in a model without one (embed_tokens.weight)"
    elif (
        not is_tied and "model.embed_tokens.weight" in names and not any(name.startswith("lm_head.") for name in names)
    ):
        found = "it has no lm_head.weight, and config.json does not tie it to the embedding (tie_word_embeddings)"
    else:
        return
    raise ModelLoadError(
        f"{directory} has no output head: {found}. It is incomplete, or an embedding model, which makes vectors of "
        f"texts, {_REMEDY}, or, {_FOR_VECTORS}"
    )


def _are_bare(names: Collection[str]) -> bool:
    return "embed_tokens.weight" in names and "model.embed_tokens.weight" not in names
