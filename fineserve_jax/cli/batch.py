"""`fineserve-jax batch`: a file of prompts in, a file of answers out."""

from typing import Annotated

import tyro

from fineserve_jax.batch import run_batch
from fineserve_jax.cli.flag_types import Switch
from fineserve_jax.cli.options import ConfigFlag, EngineFlags, ModelFlags, SamplingFlags, settle


def batch(
    *,
    input: Annotated[str, tyro.conf.arg(aliases=["-i"], metavar="FILE")],
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")],
    resume: Switch = False,
    overwrite: Switch = False,
    model: ModelFlags = (),
    config: ConfigFlag = None,
    engine: EngineFlags,
    sampling: SamplingFlags,
) -> None:
    """Answer every row of a file of prompts, each with its KV cache in the precision it asks for.

    A row is a JSON object on a line, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.
    It may have "id", "model", "kv_precision" and the sampling options below, as "max_tokens", "temperature" and so
    on, which beat those given here. Each answer is written when it is complete, so their order is not that
    of the rows; the id, by default the line number, ties them. A bad row gives a row with "error", and the
    others are answered.

    Args:
        input: JSON lines, or - for stdin.
        output: where the answers go, or - for stdout. An existing file is refused without one of the next
            two.
        resume: keep what the output holds and answer only rows that have no answer there.
        overwrite: replace the output.
        model: alias, .gguf file, Hugging Face directory or converted directory. Several models are given as
            NAME=MODEL or NAME=MODEL:WEIGHTS, e.g. small=smollm2-135m:int8, and rows name theirs as "model".
        config: YAML file with `model` or `models` and defaults for the options below.
    """
    settings = settle(config, model, engine, sampling)
    summary = run_batch(
        settings.models or settings.model,
        input,
        output,
        settings.config(),
        settings.sampling,
        resume=resume,
        overwrite=overwrite,
    )
    if summary.interrupted:
        raise KeyboardInterrupt
