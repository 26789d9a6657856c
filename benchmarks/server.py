"""What the server adds to its engine: processor time for each step, and time to the first token.

    python benchmarks/server.py --weights bf16 --kv-precision int8 --clients 32

Clients in a process of their own stream answers all at once, round after round. Of each step the server's part is the
processor time of the thread of its event loop, which decodes text, makes chunks and writes them; it stands beside the
processor time of a step when the same prompts are answered by `AsyncLLM` without a server, and beside that step's time
on the wall. For the time to the first token the same prompts are asked one by one, of the server and of `AsyncLLM` in
turn, while nothing else is being answered: percentiles of both, and what lies between them, are on the wall, and want a
machine that does nothing else.
"""

import asyncio
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax import AsyncLLM, SamplingParams
from fineserve_jax.engine.bench import percentiles, random_prompts
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.entrypoints.server.run import DrainingServer, listen, make_server
from fineserve_jax.entrypoints.server.server_config import ServerConfig
from fineserve_jax.entrypoints.server.service import Service

FIGURES = (
    *("engine_step_wall_s", "engine_step_cpu_s", "server_step_cpu_s", "event_loop_cpu_s_per_step"),
    *("share_of_a_steps_processor_time", "share_of_a_steps_wall_time"),
)
SHORT = {"max_tokens": 2}


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


async def stream(port: int, body: dict[str, Any]) -> float:
    """Seconds to the first token of an answer, from before the client connects. Reads all of the answer."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    first, events = 0.0, []
    while line := await reader.readline():
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - begun
            events.append(line[6:])
        elif line.startswith(b"HTTP/") and b" 200 " not in line:
            raise RuntimeError((line + await reader.read()).decode())
    writer.close()
    usage = json.loads(events[-2])["usage"]  # the last but [DONE]
    if usage["completion_tokens"] != body["max_tokens"]:
        raise RuntimeError(f"the answer has {usage}, and {body['max_tokens']} tokens were asked for")
    return first


async def clients(port: int, bodies: list[dict[str, Any]], at_once: bool) -> None:
    if at_once:
        seconds = await asyncio.gather(*(stream(port, body) for body in bodies))
    else:
        seconds = [await stream(port, body) for body in bodies]
    print(json.dumps(seconds))


def ask_all(port: int, bodies: list[dict[str, Any]], at_once: bool = True) -> list[float]:
    """Of each client, in a process of their own, the seconds to its first token."""
    command = [sys.executable, __file__, "--as-clients", str(port), str(int(at_once))]
    done = subprocess.run(command, input=json.dumps(bodies), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


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

    async def first_tokens() -> list[float]:
        """As `stream` measures it, one after the other, without a server."""
        seconds = []
        for prompt in prompts:
            begun = time.perf_counter()
            pieces = llm.stream(prompt, SamplingParams(**{**sampling, **SHORT}))
            await anext(pieces)
            seconds.append(time.perf_counter() - begun)
            await pieces.aclose()
        return seconds

    rounds: dict[str, list[dict[str, float]]] = {"engine": [], "server": []}
    server_s: list[float] = []
    ttft: dict[str, list[float]] = {"engine": [], "server": []}
    with running(llm) as (server, port):
        asyncio.run(alone())  # compiles
        ask_all(port, bodies)
        for _ in range(arguments.rounds):  # in turn, so that a busy machine slows both alike
            rounds["engine"].append(timed(llm, lambda: asyncio.run(alone())))
            before = thread_seconds(server)
            rounds["server"].append(timed(llm, lambda: ask_all(port, bodies)))
            server_s.append((thread_seconds(server) - before) / rounds["server"][-1]["steps"])
            ttft["engine"] += asyncio.run(first_tokens())
            ttft["server"] += ask_all(port, [body | SHORT for body in bodies], at_once=False)
    return told(arguments, rounds, server_s, ttft)


@contextlib.contextmanager
def running(llm: AsyncLLM) -> Iterator[tuple[DrainingServer, int]]:
    """A server, and the port that it listens at."""
    config = ServerConfig(port=0, max_wait_s=3600, warm_up=False)
    with listen(config) as listening:
        server = make_server(Service(llm, config))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server, listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def timed(llm: AsyncLLM, serve: Any) -> dict[str, float]:
    """Steps, and seconds of a step: processor time of the whole process, and on the wall."""
    steps, cpu, wall = asyncio.run(llm.stats()).num_steps, time.process_time(), time.perf_counter()
    serve()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    steps = asyncio.run(llm.stats()).num_steps - steps
    return {"steps": steps, "cpu_s": cpu / steps, "wall_s": wall / steps}


def told(
    arguments: Arguments,
    rounds: dict[str, list[dict[str, float]]],
    server_s: list[float],
    ttft: dict[str, list[float]],
) -> dict[str, Any]:
    """The figures; of steps the medians over the rounds."""
    step = {name: {key: statistics.median(one[key] for one in of) for key in of[0]} for name, of in rounds.items()}
    own = statistics.median(server_s)
    first = {name: percentiles([np.array(seconds)]) for name, seconds in ttft.items()}
    return {
        **dataclasses.asdict(arguments),
        "processor": processor_name(),
        "engine_step_cpu_s": step["engine"]["cpu_s"],
        "engine_step_wall_s": step["engine"]["wall_s"],
        "server_step_cpu_s": step["server"]["cpu_s"],
        "event_loop_cpu_s_per_step": own,
        "share_of_a_steps_processor_time": own / step["engine"]["cpu_s"],
        "share_of_a_steps_wall_time": own / step["engine"]["wall_s"],
        "ttft_s": first,
        "added_ttft_s": {name: first["server"][name] - first["engine"][name] for name in first["server"]},
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-clients"]:
        asyncio.run(clients(int(sys.argv[2]), json.load(sys.stdin), bool(int(sys.argv[3]))))
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
