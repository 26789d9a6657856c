"""Adds a logits processor: no pair of tokens comes twice within the newest 64 tokens.

    python examples/add_logits_processor.py

A request names it, alone or with arguments. It is compiled into the step, for the rows that name it; steps in which no
request names any are computed as ever. A package can offer processors in the entry point group
`fineserve_jax.logits_processors`, where the command line and the server find them, too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax import LLM, LogitsProcessor, SamplingParams, register_logits_processor

WINDOW = 64


class NoRepeatedPairs(LogitsProcessor):
    """Its state: the newest tokens, -1 ahead of the first, and what repeating costs."""

    name = "no_repeated_pairs"

    def start(self, prompt: Sequence[int], vocab_size: int, penalty: float = np.inf) -> dict[str, Any]:
        if not penalty >= 0:
            raise ValueError(f"penalty={penalty} rewards what it should prevent; give 0 or more")
        recent = np.full(WINDOW, -1, np.int32)
        recent[-len(prompt[-WINDOW:]) :] = prompt[-WINDOW:]
        return {"recent": recent, "penalty": np.float32(penalty)}

    def update(self, state: dict[str, jax.Array], token: jax.Array) -> dict[str, jax.Array]:
        return state | {"recent": jnp.append(state["recent"][1:], token)}

    def apply(self, state: dict[str, jax.Array], logits: jax.Array) -> jax.Array:
        recent = state["recent"]
        followed = jnp.where(recent[:-1] == recent[-1], recent[1:], len(logits))  # the newest token before; else nobody
        would_repeat = jnp.zeros(len(logits), bool).at[followed].set(True, mode="drop")
        return jnp.where(would_repeat, logits - state["penalty"], logits)


def main(model: str = "smollm2-135m") -> None:
    register_logits_processor(NoRepeatedPairs())
    llm = LLM(model, kv_memory="128MiB", max_batch_size=4, max_seq_len=256)
    asked = {"as ever": {}, "never": {"no_repeated_pairs": {}}, "seldom": {"no_repeated_pairs": {"penalty": 1.5}}}
    params = [SamplingParams(max_tokens=48, ignore_eos=True, logits_processors=named) for named in asked.values()]
    for how, output in zip(asked, llm.generate(["The sky is blue because"] * len(params), params), strict=True):
        print(f"{how}:{output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
