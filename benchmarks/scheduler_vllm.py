"""What a scheduling decision costs in vLLM, on the queue of `scheduler_cost.py`: to be run where vLLM is installed.

    /path/to/vllm/bin/python benchmarks/scheduler_vllm.py [--running 256] [--waiting 1000 10000]

Needs vLLM (seen with the CPU build, 0.32) and no JAX, no weights and no device: its scheduler and block manager are
driven alone, with the shape of Llama-3.1-8B, 16-bit KV and as much memory as in `scheduler_cost.py`. Each step one row,
in turn, ends and one request arrives. A decision is `Scheduler.schedule`, timed in process seconds; the outcome is
entered by `update_from_output`, timed beside it. The last line is JSON.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
BLOCK_TOKENS = 16
TOKEN_BYTES = 2 * 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * SHAPE["head_dim"]  # type: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kv-bytes", type=float, default=30e9)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--no-prefix-cache", dest="prefix_cache", action="store_false")
    arguments = parser.parse_args()
    results = {}
    for waiting in arguments.waiting:
        decisions, updates, running = measure(arguments, waiting)
        median, high = (1e3 * float(value) for value in np.percentile(decisions, [50, 99]))
        update = 1e3 * float(np.median(updates))
        print(f"{waiting:,} waiting, {running} running: {median:.3f} ms, p99 {high:.3f} ms, update {update:.3f} ms")
        results[waiting] = {"median_ms": round(median, 3), "p99_ms": round(high, 3), "update_ms": round(update, 3)}
        results[waiting]["running"] = running
    print(json.dumps({**vars(arguments), "results": results}))


def measure(arguments: argparse.Namespace, waiting: int) -> tuple[list[float], list[float], int]:
    """Process seconds of each decision and of each update, and the rows in the last step."""
    scheduler, new_request = build(arguments)
    for number in range(arguments.running + waiting):
        scheduler.add_request(new_request(number))
    while not scheduler.running or any(r.num_output_tokens == 0 for r in scheduler.running):
        advance(scheduler, scheduler.schedule())
    decisions, updates, number = [], [], 10**7
    gc.collect()
    gc.freeze()
    for step in range(arguments.steps):
        start = time.process_time()
        plan = scheduler.schedule()
        planned = time.process_time()
        advance(scheduler, plan)
        updates.append(time.process_time() - planned)
        decisions.append(planned - start)
        ended = scheduler.running[step % len(scheduler.running)]
        scheduler.finish_requests(ended.request_id, type(ended.status).FINISHED_ABORTED)
        number += 1
        scheduler.add_request(new_request(number))
    return decisions, updates, len(scheduler.running)


def build(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """vLLM's scheduler, and what makes its requests."""
    import torch
    from vllm import SamplingParams
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(SHAPE))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=8192)
    num_blocks = int(arguments.kv_bytes // (TOKEN_BYTES * BLOCK_TOKENS))
    cache = CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=arguments.prefix_cache)
    cache.num_gpu_blocks = num_blocks
    scheduling = SchedulerConfig(
        max_num_seqs=arguments.running,
        max_num_batched_tokens=2048 + arguments.running,
        max_model_len=8192,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
    )
    config = VllmConfig(model_config=model, cache_config=cache, scheduler_config=scheduling)
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=SHAPE["num_key_value_heads"],
        head_size=SHAPE["head_dim"],
        dtype=torch.bfloat16,
    )
    layers = [f"layer.{i}" for i in range(SHAPE["num_hidden_layers"])]  # type: ignore[arg-type]
    groups = [KVCacheGroupSpec(layers, spec)]
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
    )
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_TOKENS, sha256) if arguments.prefix_cache else None

    def new_request(number: int) -> Any:
        length = arguments.prompt_tokens // 2 + number * 7919 % arguments.prompt_tokens
        return Request(
            request_id=str(number),
            prompt_token_ids=[number % 100_000] * length,
            sampling_params=SamplingParams(max_tokens=4096, ignore_eos=True),
            pooling_params=None,
            block_hasher=hasher,
        )

    return scheduler, new_request


def advance(scheduler: Any, plan: Any) -> None:
    """Enters one token for every row whose prompt the step completes."""
    from vllm.v1.outputs import ModelRunnerOutput

    ids = list(plan.num_scheduled_tokens)
    requests = [scheduler.requests[name] for name in ids]
    tokens = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
    output = ModelRunnerOutput(
        req_ids=ids, req_id_to_index={name: i for i, name in enumerate(ids)}, sampled_token_ids=tokens
    )
    scheduler.update_from_output(plan, output)


if __name__ == "__main__":
    main()
