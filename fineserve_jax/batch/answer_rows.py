"""The answer to a row, as it is written; see the package's docstring for its fields."""

import math
from typing import Any

from fineserve_jax.batch.row_ids import RowId
from fineserve_jax.engine.outputs import CompletionOutput, RequestOutput
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.runner.runner import TokenLogprobs


def answer_row(row_id: RowId, output: RequestOutput, tokenizer: Tokenizer, names_model: bool) -> dict[str, Any]:
    """What is written of an answered row.

    Args:
        tokenizer: of the model that answered.
        names_model: whether the answer names it.
    """
    samples = [_sample(sample, tokenizer) for sample in output.outputs]
    return {
        "id": row_id,
        **(samples[0] if len(samples) == 1 else {"samples": samples}),
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": sum(len(sample.token_ids) for sample in output.outputs),
        **({"model": output.model} if names_model else {}),
        "kv_precision": output.kv_precision,
        "kv_tokens": output.kv_tokens,
    }


def _sample(sample: CompletionOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    written: dict[str, Any] = {
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "output_tokens": len(sample.token_ids),
    }
    if sample.logprobs is not None:
        tokens = zip(sample.token_ids, sample.logprobs, strict=True)
        written["logprobs"] = [_logprobs(tokenizer, token, entry) for token, entry in tokens]
    return written


def _logprobs(tokenizer: Tokenizer, token: int, entry: TokenLogprobs) -> dict[str, Any]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token,
            "text": tokenizer.decode([token], skip_special_tokens=False),
            "bytes": list(tokenizer.token_bytes(token)),
            "logprob": logprob if math.isfinite(logprob) else None,
        }

    top = [named(other, logprob) for other, logprob in entry.top.items()]
    return named(token, entry.logprob) | ({"top": top} if top else {})
