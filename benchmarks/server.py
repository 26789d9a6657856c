"""What the server adds to its engine: processor time for each step, and time to the first token.

    python benchmarks/server.py --weights bf16 --kv-precision int8 --clients 32

Clients in a process of their own stream answers all at once, round after round. Of each step the server's part is the
processor time of the thread of its event loop, which decodes text, makes chunks and writes them; it stands beside the
processor time of a step when the same prompts are answered by `AsyncLLM` without a server, and beside that step's time
on the wall. The added time to the first token is what a client sees, from before it connects, less what the engine
needed for that request; that is on the wall, and wants a machine that does nothing else.
"""

import asyncio
import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax import AsyncLLM, SamplingParams
from fineserve_jax.engine.bench import percentiles, random_prompts
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.server.run import DrainingServer, listen, make_server
from fineserve_jax.server.server_config import ServerConfig
from fineserve_jax.server.service import Service

FIGURES = (
    *("engine_step_wall_s", "engine_step_cpu_s", "server_step_cpu_s", "event_loop_cpu_s_per_step"),
    *("share_of_a_steps_processor_time", "share_of_a_steps_wall_time", "all_threads_added_share"),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    kv_precision: str = "int8"
    clients: int = 32
    prompt_tokens: int = 64
    output_tokens: int = 64
    rounds: int = 5


# -- the clients' process ------------------------------------------------------------------------------------------


async def stream(port: int, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token that a client sees, and those that the engine needed for it."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    first, events = None, []
    while line := await reader.readline():
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - begun
            events.append(line[6:])
        elif line.startswith(b"HTTP/") and b" 200 " not in line:
            raise RuntimeError((line + await reader.read()).decode())
    writer.close()
    told = json.loads(events[-2])  # the last but [DONE]
    assert told["usage"]["completion_tokens"] == body["max_tokens"], told
    return float(first or 0.0), told["timing"]["ttft_s"]


async def clients(port: int, bodies: list[dict[str, Any]]) -> None:
    print(json.dumps(await asyncio.gather(*(stream(port, body) for body in bodies))))


def ask_all(port: int, bodies: list[dict[str, Any]]) -> list[float]:
    """Of each client, in a process of their own, the seconds that the server added to its first token."""
    command = [sys.executable, __file__, "--as-clients", str(port)]
    done = subprocess.run(command, input=json.dumps(bodies), stdout=subprocess.PIPE, text=True, check=True)
    return [client - engine for client, engine in json.loads(done.stdout)]


# -- the server's process ------------------------------------------------------------------------------------------


def thread_seconds(server: DrainingServer) -> float:
    """Processor time of the event loop's thread so far."""

    async def read() -> float:
        return time.thread_time()

    return asyncio.run_coroutine_threadsafe(read(), server.event_loop).result()


def measure(arguments: Arguments) -> dict[str, Any]:
    sizes = {"max_batch_size": arguments.clients, "max_seq_len": arguments.prompt_tokens + arguments.output_tokens}
    llm = AsyncLLM(
        arguments.model, weights=arguments.weights, kv_precision=arguments.kv_precision, prefix_cache="off", **sizes
    )
    vocab_size = llm.engine.model.config.vocab_size
    prompts = random_prompts(vocab_size, arguments.clients, arguments.prompt_tokens)
    sampling = {"max_tokens": arguments.output_tokens, "ignore_eos": True, "temperature": 0.0}
    streamed = {**sampling, "model": llm.engine.model.name, "stream": True, "stream_options": {"include_usage": True}}
    bodies = [{"prompt": prompt, **streamed} for prompt in prompts]

    async def alone() -> None:
        await llm.generate(prompts, SamplingParams(**sampling))

    config = ServerConfig(port=0, max_wait_s=3600)
    listening = listen(config)
    server = make_server(Service(llm, config))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listening.getsockname()[1]
    asyncio.run(alone())  # compiles
    ask_all(port, bodies)
    rounds = {"engine": [], "server": []}
    server_s, added = [], []
    for _ in range(arguments.rounds):  # in turn, so that a busy machine slows both alike
        rounds["engine"].append(timed(llm, lambda: asyncio.run(alone())))
        before = thread_seconds(server)
        rounds["server"].append(timed(llm, lambda: added.extend(ask_all(port, bodies))))
        server_s.append((thread_seconds(server) - before) / rounds["server"][-1]["steps"])
    server.should_exit = True
    thread.join()
    return told(arguments, rounds, server_s, added)


def timed(llm: AsyncLLM, serve: Any) -> dict[str, float]:
    """Steps, and seconds of a step: processor time of the whole process, and on the wall."""
    steps, cpu, wall = asyncio.run(llm.stats()).num_steps, time.process_time(), time.perf_counter()
    serve()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    steps = asyncio.run(llm.stats()).num_steps - steps
    return {"steps": steps, "cpu_s": cpu / steps, "wall_s": wall / steps}


def told(
    arguments: Arguments, rounds: dict[str, list[dict[str, float]]], server_s: list[float], added: list[float]
) -> dict[str, Any]:
    """The figures, medians over the rounds."""
    step = {name: {key: statistics.median(one[key] for one in of) for key in of[0]} for name, of in rounds.items()}
    own = statistics.median(server_s)
    return {
        **dataclasses.asdict(arguments),
        "processor": processor_name(),
        "engine_step_cpu_s": step["engine"]["cpu_s"],
        "engine_step_wall_s": step["engine"]["wall_s"],
        "server_step_cpu_s": step["server"]["cpu_s"],
        "event_loop_cpu_s_per_step": own,
        "share_of_a_steps_processor_time": own / step["engine"]["cpu_s"],
        "share_of_a_steps_wall_time": own / step["engine"]["wall_s"],
        "all_threads_added_share": step["server"]["cpu_s"] / step["engine"]["cpu_s"] - 1,
        "added_ttft_s": percentiles([np.array(added)]),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-clients"]:
        asyncio.run(clients(int(sys.argv[2]), json.load(sys.stdin)))
    else:
        result = measure(tyro.cli(Arguments, description=__doc__))
        table = Table(title=f"{result['clients']} streaming clients, {result['model']}, {result['kv_precision']} KV")
        table.add_column("")
        table.add_column("", justify="right")
        for name in FIGURES:
            table.add_row(name.replace("_", " "), f"{result[name]:.6f}")
        for name, seconds in result["added_ttft_s"].items():
            table.add_row(f"added time to first token, {name}, s", f"{seconds:.4f}")
        Console().print(table)
        print(json.dumps(result))
