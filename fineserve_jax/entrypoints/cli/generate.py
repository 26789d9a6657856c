"""`fineserve-jax generate`: one prompt, answered as it is written."""

import sys
import time
from typing import Annotated, Any

import tyro

from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import (
    NOT_STREAMED,
    ConfigFlag,
    EngineFlags,
    GenerateFlags,
    ModelFlag,
    settle,
)
from fineserve_jax.entrypoints.cli.streams import read_stdin
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.request.sampling_params import SamplingParams


def generate(
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")],
    /,
    *,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    raw: Switch = False,
    engine: EngineFlags,
    sampling: GenerateFlags,
) -> None:
    """Answer one prompt, printing the answer as it comes.

    The prompt is what the user says in a chat, if the model has a chat template; with --raw, or without a
    template, it is a text to be continued. --max-batch-size is 1 here unless given.

    Args:
        prompt: the text, or - to read it from stdin.
        model: alias, .gguf file, Hugging Face directory or converted directory; or a name among the `models` of the
            file.
        config: YAML file with `model` or `models` and defaults for the options below.
        raw: continue the prompt as it stands, without the chat template.
    """
    settings = settle(config, model, engine, sampling)
    if sys.stdout is None:
        raise ConfigError("stdout is closed, so that the answer would be lost; open it, e.g. > answer.txt")
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise RequestError("the prompt is empty; give some text, or - to read it from stdin")
    llm = LLM(settings.model, **{"max_batch_size": 1, **settings.engine})
    as_chat = not raw and llm.tokenizer.chat_template is not None
    asked: Any = [{"role": "user", "content": text}] if as_chat else text
    # A file may set for other commands what does not concern this one.
    sampling_params = {name: value for name, value in settings.sampling.items() if name not in NOT_STREAMED}
    start = time.perf_counter()
    first = None
    pieces = llm.stream(asked, SamplingParams(**sampling_params))  # refuses the prompt, if anything does
    try:
        for piece in pieces:
            first = first or time.perf_counter()
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
        _report(llm, start, first or time.perf_counter())


def _report(llm: LLM, start: float, first: float) -> None:
    stats, now = llm.stats(), time.perf_counter()
    tokens = f"{stats.num_prompt_tokens} prompt and {stats.num_output_tokens} output tokens"
    rate = (stats.num_output_tokens - 1) / (now - first) if stats.num_output_tokens > 1 else 0.0
    print(
        f"[{tokens}; first text after {first - start:.2f} s, then {rate:.1f} tokens/s; "
        f"{llm.engine.config.kv_precision} KV, {llm.engine.model.weights} weights]",
        file=sys.stderr,
    )
