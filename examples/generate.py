"""Use from Python: prompts with KV caches of different precisions, in one batch.

python examples/generate.py
"""

from fineserve_jax import LLM, SamplingParams


def main() -> None:
    llm = LLM("smollm2-135m", weights="bf16", kv_memory="256MiB", max_batch_size=8)

    # The same prompt in three precisions: same weights, same batch, same memory.
    precisions = ["bf16", "int8", "int4"]
    prompts = ["The three primary colours are"] * len(precisions)
    for output in llm.generate(prompts, SamplingParams(max_tokens=24), kv_precision=precisions):
        (answer,) = output.outputs
        print(f"{output.kv_precision}: {answer.text!r} ({answer.finish_reason})")

    # A chat, streamed as it is written.
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    for piece in llm.stream(conversation, SamplingParams(max_tokens=32), kv_precision="int8"):
        print(piece, end="", flush=True)
    print()

    stats = llm.stats()
    print(f"{stats.num_output_tokens} tokens, {stats.num_compilations} compilations")


if __name__ == "__main__":
    main()
