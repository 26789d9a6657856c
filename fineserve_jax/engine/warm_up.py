"""Compiling ahead all programs that requests in some KV formats can need."""

import itertools
from collections.abc import Iterable, Sequence

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.engine.prepare import precision_of, use_precision
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.runner.page_operations import PageOperations

PagePair = tuple[PageClass, PageClass]


def warm_up(
    models: Iterable[ServedModel],
    kv: KVManager,
    operations: PageOperations,
    kv_precisions: Sequence[str],
    min_kv_precision: str | None,
    *,
    converts: bool,
    structured_outputs: bool,
    prompt_logprobs: bool,
) -> None:
    """Compiles steps and page operations for these KV formats and each model's own.

    Args:
        kv_precisions: KV formats, or "auto".
        min_kv_precision: what requests in them will name as such; None: nothing.
        converts: whether the prefix cache serves a request from pages in a wider format.
        structured_outputs, prompt_logprobs: whether requests with such are to be served.
    """
    pairs: list[PagePair] = []
    for served in models:
        precisions = [precision_of(served, kv, None, None)]
        precisions += [precision_of(served, kv, name, min_kv_precision) for name in kv_precisions]
        for precision in precisions:
            pairs += _copies_and_requantizations(use_precision(served, kv, precision))
        served.runner.warm_up(structured_outputs, prompt_logprobs)
        if structured_outputs:
            served.tokenizer.vocabulary(served.model.config.vocab_size)
    if converts:
        used = {page_class for pair in pairs for page_class in pair}
        alike = ((a, b) for a in used for b in used if (a.model, a.group) == (b.model, b.group))
        pairs += [(a, b) for a, b in alike if a.page_bytes > b.page_bytes]
    operations.warm_up(pairs, transfers=kv.host_bytes > 0)


def _copies_and_requantizations(classes: Sequence[PageClass]) -> list[PagePair]:
    """(source, target) of what is done to a request's pages: copied within a class, or encoded anew in the next."""
    pairs: list[PagePair] = []
    for group in zip(*(page_class.groups for page_class in classes), strict=True):
        residuals = [page_class.residual for page_class in group if page_class.residual]
        pairs += [*itertools.pairwise(group), *((page_class, page_class) for page_class in (*group, *residuals))]
    return pairs
