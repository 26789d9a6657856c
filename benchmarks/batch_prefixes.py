"""A batch job whose rows share prefixes, in any order: what it saves to bring together those that begin alike.

    python benchmarks/batch_prefixes.py --groups 24 --rows-per-group 8 --prefix-tokens 384

Rows of all groups are shuffled, and the memory holds few of the prefixes at once. The job runs as it is, and with rows
in the order of the file; the two take turns. Printed are medians, their ratio, and a line of JSON.
"""

import dataclasses
import json
import random
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import tyro

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.entrypoints.batch import BatchJob, BatchSummary, JobOutput, read_rows
from fineserve_jax.entrypoints.batch import job as job_module
from fineserve_jax.entrypoints.batch.records import line_records
from fineserve_jax.loaders import load_model


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    kv_precision: str = "int8"
    kv_memory: str = "64MiB"
    max_batch_size: int = 8
    groups: int = 24
    rows_per_group: int = 8
    prefix_tokens: int = 384
    own_tokens: int = 16
    output_tokens: int = 8
    rounds: int = 3


def rows(arguments: Arguments, vocab_size: int, seed: int) -> list[bytes]:
    """Lines of a file of prompts; prefixes of their own for each seed."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10, vocab_size) for _ in range(count)]

    prefixes = [tokens(arguments.prefix_tokens) for _ in range(arguments.groups)]
    prompts = [[*prefix, *tokens(arguments.own_tokens)] for prefix in prefixes for _ in range(arguments.rows_per_group)]
    rng.shuffle(prompts)
    return [json.dumps({"prompt": prompt}).encode() for prompt in prompts]


def answer(engine: Engine, lines: list[bytes], planned: bool, arguments: Arguments) -> BatchSummary:
    """Answers the lines, in the order of the file unless planned."""
    num_planned = job_module.PLANNED_PER_ROW if planned else 0
    sampling = {"max_tokens": arguments.output_tokens, "ignore_eos": True, "temperature": 0.0}
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(job_module, "PLANNED_PER_ROW", num_planned),
        JobOutput(Path(folder) / "answers.jsonl") as output,
    ):
        return BatchJob(engine, output.begin(), sampling).run(read_rows(line_records(lines)))


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    config = EngineConfig(
        kv_precision=arguments.kv_precision,
        kv_formats=[arguments.kv_precision],
        kv_memory=arguments.kv_memory,
        max_batch_size=arguments.max_batch_size,
        max_seq_len=arguments.prefix_tokens + arguments.own_tokens + arguments.output_tokens,
    )
    engine = Engine(load_model(arguments.model, arguments.weights), config)
    engine.warm_up()
    found: dict[bool, list[BatchSummary]] = {True: [], False: []}
    for number in range(arguments.rounds):
        for planned, summaries in found.items():
            lines = rows(arguments, engine.model.config.vocab_size, seed=2 * number + planned)
            summaries.append(answer(engine, lines, planned, arguments))
    seconds = {planned: statistics.median(each.seconds for each in some) for planned, some in found.items()}
    shared = {planned: sum(each.hit_tokens for each in some) for planned, some in found.items()}
    common = sum(each.common_tokens for each in found[True])
    for planned, name in ((False, "in the order of the file"), (True, "planned")):
        print(f"{name}: {seconds[planned]:.1f} s, {shared[planned] / common:.1%} of the tokens in common were shared")
    print(
        json.dumps(
            {
                "benchmark": "batch_prefixes",
                "processor": processor_name(),
                **dataclasses.asdict(arguments),
                "seconds": {"file order": seconds[False], "planned": seconds[True]},
                "shared": {"file order": shared[False] / common, "planned": shared[True] / common},
                "speedup": seconds[False] / seconds[True],
            }
        )
    )


if __name__ == "__main__":
    main()
