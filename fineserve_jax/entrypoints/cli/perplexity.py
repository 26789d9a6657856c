"""`fineserve-jax perplexity`: what a KV format or a weight precision costs in quality."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.perplexity import measure_perplexity, read_text
from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import ConfigFlag, ModelFlag, PerplexityFlags, settle


def perplexity(
    *,
    text: Path,
    window: int = 1024,
    windows: int = 8,
    as_json: Annotated[Switch, tyro.conf.arg(name="json", help_behavior_hint="")] = False,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    engine: PerplexityFlags,
) -> None:
    """Measure a model's perplexity on a text, its keys and values kept as requests would keep them.

    The windows are consecutive runs of tokens of the text, without special tokens. Each is scored by itself,
    from its second token on.

    Args:
        text: UTF-8 file.
        window: tokens of a window.
        windows: how many windows.
        as_json: print one JSON object instead of a sentence.
        model: alias, .gguf file, Hugging Face directory or converted directory; or a name among the `models` of the
            file.
        config: YAML file with `model` or `models` and defaults for the options below.
    """
    settings = settle(config, model, engine)
    content = read_text(text, window, windows)
    options = settings.config(max_batch_size=1, max_seq_len=window)
    made = load_engine(settings.model, options)
    tokens = made.tokenizer.encode(content, add_special_tokens=False)
    result = measure_perplexity(made, tokens, window, windows, on_window=lambda i, ppl: _progress(i, windows, ppl))
    print(json.dumps(asdict(result)) if as_json else result)


def _progress(done: int, windows: int, ppl: float) -> None:
    print(f"window {done} of {windows}: perplexity so far {ppl:.4f}", file=sys.stderr, flush=True)
