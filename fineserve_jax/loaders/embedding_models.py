"""Checkpoints that look like language models' and make vectors or scores of texts: refused with a word that they do."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from fineserve_jax.errors import ModelLoadError

_SENTENCE_TRANSFORMERS = ("modules.json", "config_sentence_transformers.json")
_BARE = re.compile(r"(?!.*(For|LMHead)).*Model")
_SCORING = re.compile(r".*For(SequenceClassification|TokenClassification|RewardModel|QuestionAnswering|TextEncoding)")
_REMEDY = "and cannot write text; use a language model (such as the instruct model of the same family)"


def refuse_embedding_directory(directory: Path) -> None:
    """Raises ModelLoadError for a directory with files of the package sentence-transformers."""
    for name in _SENTENCE_TRANSFORMERS:
        if (directory / name).exists():
            raise ModelLoadError(
                f"{directory} is an embedding model: {name} of sentence-transformers says so. It makes vectors of "
                f"texts, {_REMEDY}"
            )


def refuse_other_tasks(architecture: str) -> None:
    """Raises ModelLoadError for an architecture without an output head over the vocabulary."""
    if _BARE.fullmatch(architecture):
        what = "a model without an output head, as embedding models are"
    elif _SCORING.fullmatch(architecture):
        what = "a model that scores or classifies texts"
    else:
        return
    raise ModelLoadError(f"architecture {architecture!a} is {what}: it makes vectors or scores of texts, {_REMEDY}")


def refuse_bare_tensors(directory: Path, names: Collection[str], is_tied: bool) -> None:
    """Raises ModelLoadError for tensors that are called as in a model without a head, or that lack the head.

    names: of all tensors. is_tied: whether the embedding is the head, too.
    """
    if "embed_tokens.weight" in names and "model.embed_tokens.weight" not in names:
        found = "its tensors are called as in a model without one (embed_tokens.weight)"
    elif (
        not is_tied and "model.embed_tokens.weight" in names and not any(name.startswith("lm_head.") for name in names)
    ):
        found = "it has no lm_head.weight, and config.json does not tie it to the embedding (tie_word_embeddings)"
    else:
        return
    raise ModelLoadError(
        f"{directory} has no output head: {found}. It is incomplete, or an embedding model, which makes vectors of "
        f"texts, {_REMEDY}"
    )
