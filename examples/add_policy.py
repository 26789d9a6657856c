"""Adds an order of admission and uses it.

    python examples/add_policy.py

A policy maps a waiting request to a key; the smallest is admitted first. Wherever a policy's name is asked for,
`module:function` names one of yours: here, in a configuration file, or as `--policy` on the command line, where
`fineserve-jax simulate --policy my_module:my_function` tries it at the scale of a GPU. A package can offer policies
under plain names in the entry point group `fineserve_jax.policies`.
"""

from fineserve_jax import LLM, PolicyContext, Request, SamplingParams


def longest_first(request: Request, context: PolicyContext) -> int:
    return -request.num_prompt_tokens


def main() -> None:
    llm = LLM("smollm2-135m", policy=f"{__name__}:longest_first", kv_memory="128MiB", max_batch_size=1, max_seq_len=512)
    prompts = ["Cats", "Cats and dogs", "Cats, dogs and mice"]
    for output in llm.generate(prompts, SamplingParams(max_tokens=4)):
        print(f"{output.prompt!r} waited {output.metrics.queue_s:.3f} s")


if __name__ == "__main__":
    main()
