"""The host's part of a step over several devices: weak scaling, on devices that are parts of one CPU.

    python benchmarks/mesh_host.py --devices 1 2 4 8

Every device has the same heads, MLP width and pages, however many there are; a process of its own serves each number
of devices, since JAX is told of them before it starts. What is measured is processor time of the thread that takes the
steps: planning, laying out inputs and handing programs to the devices, whose own work is done by other threads and is
not in it. So other work on the machine matters little, but for what it does to caches. The last line printed is JSON.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    devices: tuple[int, ...] = (1, 8)
    layers: int = 32
    rows: int = 32
    prompt_tokens: int = 64
    steps: int = 60
    """Steps that count, of each round."""
    rounds: int = 3
    """Processes of each number of devices, one after the other in turn; medians are told."""
    here: bool = False
    """Serve the first number of devices in this process, and print its milliseconds alone."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.here:
        print(json.dumps(serve(arguments, arguments.devices[0])))
        return
    found: dict[int, list[float]] = {count: [] for count in arguments.devices}
    for _ in range(arguments.rounds):
        for count in arguments.devices:
            found[count].append(in_a_process(arguments, count))
    host_ms = {count: statistics.median(times) for count, times in found.items()}
    first = host_ms[arguments.devices[0]]
    for count, milliseconds in host_ms.items():
        ratio = milliseconds / first
        print(
            f"{count} devices: {milliseconds:.2f} ms of the host's processor time a step, {ratio:.2f} times the first"
        )
    sizes = {name: getattr(arguments, name) for name in ("layers", "rows", "prompt_tokens", "steps", "rounds")}
    over_first = {count: milliseconds / first for count, milliseconds in host_ms.items()}
    print(json.dumps({"host_ms_per_step": host_ms, "over_first": over_first, **sizes}))


def in_a_process(arguments: Arguments, count: int) -> float:
    """Milliseconds of the host's thread a step, with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    options = [f"--{name}={getattr(arguments, name)}" for name in ("layers", "rows", "prompt_tokens", "steps")]
    command = [sys.executable, __file__, "--devices", str(count), "--here", *options]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    milliseconds: float = json.loads(done.stdout.splitlines()[-1])
    return milliseconds


def serve(arguments: Arguments, count: int) -> float:
    """The median of a decode step's milliseconds, of the thread that takes it."""
    import numpy as np
    import tokenizers

    from fineserve_jax.engine.compilation_cache import use_compilation_cache
    from fineserve_jax.engine.engine import Engine
    from fineserve_jax.engine.engine_config import EngineConfig
    from fineserve_jax.loaders import LoadedModel, Tokenizer
    from fineserve_jax.models import ModelConfig, random_params
    from fineserve_jax.request.sampling_params import SamplingParams

    use_compilation_cache()
    shape = ModelConfig(
        family="llama",
        vocab_size=512 * count,
        hidden_size=128,
        num_layers=arguments.layers,
        num_heads=4 * count,
        num_kv_heads=2 * count,
        head_dim=32,
        intermediate_size=128 * count,
        max_position=4096,
    )
    no_text = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token="")), eos_token_ids=())
    model = LoadedModel("random", shape, random_params(shape, "bf16"), no_text, "bf16")
    length = arguments.prompt_tokens + 8 * arguments.rows + arguments.steps + 16
    config = EngineConfig(
        kv_formats=("bf16",),
        kv_memory="64MiB",
        max_batch_size=arguments.rows,
        max_seq_len=length,
        prefix_cache="off",
        tensor_parallel=count,
    )
    engine = Engine(model, config)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=length - arguments.prompt_tokens, ignore_eos=True)
    requests = [
        engine.add_request(rng.integers(0, 512, arguments.prompt_tokens).tolist(), sampling)
        for _ in range(arguments.rows)
    ]
    while any(request.num_output_tokens < 4 for request in requests):
        engine.step()
    times = []
    for _ in range(arguments.steps):
        start = time.thread_time()
        engine.step()
        times.append(time.thread_time() - start)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
