"""A server under load for a long time, while models come and go and clients are killed: what is lost, and what grows.

    python benchmarks/soak.py --minutes 30

Requests come open-loop at a share of what the server was measured to do, in several KV precisions, and stream their
answers; some cut their connections midway. Every so often a second model is loaded, asked beside the first, and
unloaded while its requests are under way. At the end the books are audited. One line of JSON is printed; the command
fails if a request was lost, the books are not exact, or memory grew.

    lost             requests that were neither answered, refused with a status that says why, nor left by their client
    books_are_exact  no request is left, no page held, and all books of the KV memory agree
    memory_growth    resident memory of the process behind the first quarter of the time, MiB an hour, by a fitted line
    memory_is_flat   the mean of its last quarter is at most 5 % above that of its second; null in less than ten
                     minutes, when programs are still compiled
"""

import asyncio
import dataclasses
import json
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import psutil
import tyro
from open_loop import Answer, ask, serving

from fineserve_jax import AsyncLLM
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.errors import FineServeError
from fineserve_jax.kv.errors import IntegrityError
from fineserve_jax.kv.integrity import check_integrity

ADMIN_KEY = "soak"
SECOND = "second"
FLAT = 1.05
"""Most of `memory_rise` that is no growth."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    second_weights: str = "int8"
    """Of the model that comes and goes, which is the same one."""
    minutes: float = 30.0
    load: float = 0.9
    """Of the requests a second that are answered when many are there at once."""
    mix: tuple[str, ...] = ("bf16", "int8", "int4", "auto")
    killed: float = 0.1
    """Share of the clients that leave midway."""
    changes_every_s: float = 30.0
    """From one loading or unloading to the next."""
    prompt_tokens: int = 64
    output_tokens: int = 32
    kv_memory: str = "48MiB"
    max_batch_size: int = 16
    measured_requests: int = 48
    """With which it is found out what the server can do."""
    seed: int = 0


class Soak:
    """One run."""

    def __init__(self, arguments: Arguments, llm: AsyncLLM, port: int) -> None:
        self.arguments, self.llm, self.port = arguments, llm, port
        self.draw, self.vocabulary = random.Random(arguments.seed), llm.engine.model.config.vocab_size
        self.outcomes: Counter[str] = Counter()
        self.details: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self.num_changes = 0
        self.names = [llm.engine.model.name]

    def body(self) -> dict[str, Any]:
        arguments = self.arguments
        count = self.draw.randint(1, 2 * arguments.prompt_tokens - 1)
        return {
            "model": self.draw.choice(self.names),
            "prompt": [self.draw.randrange(self.vocabulary // 2, self.vocabulary) for _ in range(count)],
            "max_tokens": self.draw.randint(1, 2 * arguments.output_tokens - 1),
            "kv_precision": self.draw.choice(arguments.mix),
            "ignore_eos": True,
        }

    async def capacity(self) -> float:
        """Requests a second when many are there at once."""
        clock = asyncio.get_running_loop().time
        start_s = clock()
        answers = await asyncio.gather(
            *(ask(self.port, self.body(), start_s) for _ in range(self.arguments.measured_requests))
        )
        for answer in answers:
            self.note(answer)
        return len(answers) / (clock() - start_s)

    async def run(self) -> float:
        """Everything; requests a second that were asked."""
        await self.capacity()  # once for what is not compiled yet
        rate = self.arguments.load * await self.capacity()
        clock = asyncio.get_running_loop().time
        end_s = clock() + 60 * self.arguments.minutes
        beside = [asyncio.create_task(self.change_models(end_s)), asyncio.create_task(self.watch_memory(end_s))]
        tasks: set[asyncio.Task[None]] = set()
        due_s = clock()
        while due_s < end_s:
            task = asyncio.create_task(self.client(due_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_s += self.draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due_s - clock()))
        await asyncio.gather(*beside, *tasks)
        return rate

    async def client(self, due_s: float) -> None:
        leaves = (
            self.draw.randint(0, self.arguments.output_tokens) if self.draw.random() < self.arguments.killed else None
        )
        self.note(await ask(self.port, self.body(), due_s, leaves))

    def note(self, answer: Answer) -> None:
        self.outcomes[f"refused {answer.status}" if answer.outcome == "refused" else answer.outcome] += 1
        if answer.outcome == "lost":
            self.details.append(answer.detail)

    async def change_models(self, end_s: float) -> None:
        """Loads the second model and unloads it, in turn."""
        clock = asyncio.get_running_loop().time
        while clock() + self.arguments.changes_every_s < end_s:
            await asyncio.sleep(self.arguments.changes_every_s)
            if SECOND in self.names:
                self.names.remove(SECOND)
                await self.admin("DELETE", f"/admin/models/{SECOND}")
            else:
                source = {"name": SECOND, "model": self.arguments.model, "weights": self.arguments.second_weights}
                await self.admin("POST", "/admin/models", source)
                self.names.append(SECOND)
            self.num_changes += 1

    async def admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        head += f"Authorization: Bearer {ADMIN_KEY}\r\nContent-Type: application/json\r\n\r\n"
        writer.write(head.encode() + data)
        answer = await reader.read()
        writer.close()
        if b" 200 " not in answer.partition(b"\r\n")[0]:
            raise RuntimeError(f"{method} {path}: {answer.decode(errors='replace')[-300:]}")

    async def watch_memory(self, end_s: float) -> None:
        clock, process = asyncio.get_running_loop().time, psutil.Process()
        while (now := clock()) < end_s:
            self.memory.append((now, process.memory_info().rss / 2**20))
            await asyncio.sleep(min(5.0, self.arguments.minutes))

    def memory_growth(self) -> float:
        """MiB an hour, of the time behind the first quarter."""
        times, sizes = np.array(self.memory[len(self.memory) // 4 :]).T
        return float(np.polyfit(times / 3600, sizes, 1)[0]) if len(times) > 1 else 0.0

    def memory_rise(self) -> float:
        """The mean of the last quarter of the time over that of the second: in the first, programs are compiled."""
        _, second, _, last = np.array_split([size for _, size in self.memory], 4)
        return float(last.mean() / second.mean()) if last.size else 1.0


def books_are_exact(llm: AsyncLLM, patience_s: float = 60.0) -> str:
    """What is wrong with the books when nobody is left; "" if nothing is."""
    engine, end = llm.engine, time.monotonic() + patience_s
    while engine.detokenizers and time.monotonic() < end:
        time.sleep(0.05)
    if engine.detokenizers or engine.kv.held:
        return f"{len(engine.detokenizers)} requests are left, {len(engine.kv.held)} hold pages"
    try:
        asyncio.run(llm.loop.each(lambda own: check_integrity(own.kv)))
        asyncio.run(llm.loop.each(lambda own: own.scheduler.quotas.check_integrity()))
    except (IntegrityError, FineServeError) as error:
        return str(error)
    return ""


def soak(arguments: Arguments) -> dict[str, Any]:
    """Runs it; what is printed."""
    sizes = {"max_batch_size": arguments.max_batch_size, "kv_memory": arguments.kv_memory}
    longest = 2 * (arguments.prompt_tokens + arguments.output_tokens)
    llm = AsyncLLM(arguments.model, weights=arguments.weights, max_seq_len=longest, **sizes)
    with serving(llm, [ADMIN_KEY], max_wait_s=3600) as port:
        asyncio.run(llm.warm_up(arguments.mix))
        run = Soak(arguments, llm, port)
        rate = asyncio.run(run.run())
        wrong = books_are_exact(llm)
        stats = asyncio.run(llm.stats())
    asyncio.run(llm.close())
    return {
        **dataclasses.asdict(arguments),
        "requests_per_s": round(rate, 3),
        "outcomes": dict(run.outcomes),
        "lost": run.outcomes["lost"],
        "lost_details": run.details[:5],
        "model_changes": run.num_changes,
        "books_are_exact": not wrong,
        "books": wrong,
        "memory_growth_mib_per_hour": round(run.memory_growth(), 1),
        "memory_rise": round(run.memory_rise(), 3),
        "memory_is_flat": run.memory_rise() <= FLAT if arguments.minutes >= 10 else None,
        "memory_mib": [round(size) for _, size in run.memory[:: max(1, len(run.memory) // 10)]],
        "steps": stats.num_steps,
        "preemptions": stats.num_preemptions,
        "answered_tokens": stats.num_output_tokens,
        "processor": processor_name(),
    }


def main() -> None:
    told = soak(tyro.cli(Arguments, description=__doc__))
    print(json.dumps(told))
    if told["lost"] or not told["books_are_exact"] or told["memory_is_flat"] is False:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
