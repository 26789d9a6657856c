"""Adds an order of admission and uses it.

    python examples/add_policy.py

A policy maps a waiting request to a key; the smallest is admitted first.
"""

from fineserve_jax import LLM, SamplingParams
from fineserve_jax.request import Request
from fineserve_jax.scheduler.policies import POLICIES, PolicyContext


def longest_first(request: Request, context: PolicyContext) -> int:
    return -request.num_prompt_tokens


def main() -> None:
    POLICIES["longest_first"] = longest_first
    llm = LLM("smollm2-135m", policy="longest_first", kv_memory="128MiB", max_batch_size=1, max_seq_len=512)
    prompts = ["Cats", "Cats and dogs", "Cats, dogs and mice"]
    for output in llm.generate(prompts, SamplingParams(max_tokens=4)):
        print(f"{output.prompt!r} waited {output.metrics.queue_s:.3f} s")


if __name__ == "__main__":
    main()
