"""What structured outputs cost: decode throughput with a JSON schema in every row against the same rows without.

    python benchmarks/constrained.py --rows 32 --new-tokens 64

Both cases take turns. Decode tokens per second count the steps from when every row has its first token until the first
row ends; the schemas are such that none ends by itself. Beside the medians and their ratio stands what the masks took
on the host in a step, and in how many steps the device had computed the layers before they were there: only then does
anybody wait for them.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.bench import random_prompts
from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import load_model
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.runner import runner as runner_module

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "roles": {"type": "array", "items": {"enum": ["reader", "writer", "owner"]}, "maxItems": 3},
    },
    "required": ["name", "age", "roles"],
    "additionalProperties": False,
}
EVENT = {
    "type": "object",
    "properties": {
        "at": {"type": "string", "format": "date-time"},
        "kind": {"anyOf": [{"const": "start"}, {"type": "object", "additionalProperties": {"type": "number"}}]},
        "id": {"type": "string", "pattern": "^[a-f0-9]{8}-[0-9]{4}$"},
    },
    "required": ["at", "kind", "id"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["value", "children"],
    "additionalProperties": False,
}
SCHEMAS = [
    {"type": "array", "minItems": 500, "items": item, "$defs": {"tree": TREE}}
    for item in (PERSON, EVENT, {"$ref": "#/$defs/tree"}, {"type": "string", "minLength": 20})
]


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    rows: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 5
    kv_memory: str = "512MiB"


@dataclasses.dataclass
class Masks:
    """What the masks of all steps so far took, and whether they were waited for."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    late: int = 0

    def watch(self) -> None:
        """Times the masks from now on, and looks whether the layers are ready when the head is called."""
        build, programs_of = runner_module.build_masks, runner_module.step_programs

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            masks = build(*arguments, **options)
            if masks is not None:
                self.seconds.append(time.perf_counter() - start)
            return masks

        def watched(spec: Any) -> Any:
            programs = programs_of(spec)
            if not hasattr(programs.head, "watched"):
                programs.head = self._watched(programs.head)
            return programs

        runner_module.build_masks, runner_module.step_programs = timed, watched  # type: ignore[assignment]

    def _watched(self, head: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Any, stream: Any, inputs: Any, sampling: Any, allowed: Any) -> Any:
            self.late += allowed is not None and stream.x.is_ready()
            return head(params, stream, inputs, sampling, allowed)

        call.watched = True  # type: ignore[attr-defined]
        return call


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    engine = Engine(load_model(arguments.model, arguments.weights), settings(arguments))
    free = SamplingParams(max_tokens=arguments.new_tokens, ignore_eos=True, temperature=1.0)
    cases = {
        "free": [free] * len(SCHEMAS),
        "json": [
            free.model_copy(update={"structured_outputs": StructuredOutputsParams(json=schema)}) for schema in SCHEMAS
        ],
    }
    prompts = random_prompts(engine.model.config.vocab_size, arguments.rows, arguments.prompt_tokens)
    for sampling in cases.values():
        decode(engine, prompts, sampling)  # compiles
    masks = Masks()
    masks.watch()
    speeds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for case, sampling in cases.items():
            speeds[case].append(decode(engine, prompts, sampling))
    report(arguments, speeds, masks)


def settings(arguments: Arguments) -> EngineConfig:
    return EngineConfig(
        kv_memory=arguments.kv_memory,
        max_batch_size=arguments.rows,
        max_seq_len=arguments.prompt_tokens + arguments.new_tokens,
        prefix_cache="off",
    )


def decode(engine: Engine, prompts: list[list[int]], sampling: list[SamplingParams]) -> float:
    """Serves all prompts once; decoded tokens a second while all rows decode."""
    requests = [
        engine.add_request(prompt, sampling[i % len(sampling)].model_copy(update={"seed": i}))
        for i, prompt in enumerate(prompts)
    ]
    while any(request.num_output_tokens == 0 for request in requests):
        engine.step()
    if any(request.finish_reason for request in requests):
        raise SystemExit("rows have ended before all had begun; give more --new-tokens, or fewer --prompt-tokens")
    start, early = time.perf_counter(), sum(request.num_output_tokens for request in requests)
    while not any(request.finish_reason for request in requests):
        engine.step()
    seconds, decoded = time.perf_counter() - start, sum(request.num_output_tokens for request in requests) - early
    while engine.has_unfinished:
        engine.step()
    ended = {str(request.finish_reason) for request in requests}
    if ended != {"length"}:
        raise SystemExit(f"rows ended by {ended}; all were to be cut: {[str(r.error) for r in requests if r.error]}")
    for request in requests:
        engine.release(request)
    return decoded / seconds


def report(arguments: Arguments, speeds: dict[str, list[float]], masks: Masks) -> None:
    medians = {case: statistics.median(runs) for case, runs in speeds.items()}
    table = Table("rows", "decode tokens/s")
    for case, value in medians.items():
        table.add_row(case, f"{value:.1f}")
    Console().print(table)
    ratios = [json_ / free for free, json_ in zip(speeds["free"], speeds["json"], strict=True)]
    print(
        json.dumps(
            {
                **dataclasses.asdict(arguments),
                "decode_tokens_per_s": {case: round(value, 1) for case, value in medians.items()},
                "ratio": round(statistics.median(ratios), 3),
                "mask_ms_per_step": round(1000 * statistics.median(masks.seconds), 2),
                "longest_mask_ms": round(1000 * max(masks.seconds), 2),
                "steps_with_masks": len(masks.seconds),
                "steps_that_waited_for_masks": int(masks.late),
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main()
