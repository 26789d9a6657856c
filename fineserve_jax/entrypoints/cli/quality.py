"""`fineserve-jax quality`: what KV formats cost, with intervals, and which to take."""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.perplexity import read_text
from fineserve_jax.engine.quality import PROMPT_TOKENS, WIDE, Estimate, Quality, measure_quality
from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import ConfigFlag, ModelFlag, QualityFlags, settle
from fineserve_jax.pallas_kernels.formats import FORMATS

Precisions = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help_behavior_hint="(repeatable; default: all there are)")
]


def quality(
    *,
    text: Path,
    window: int = 1024,
    windows: int = 24,
    new_tokens: int = 64,
    kv_precision: Precisions = (),
    max_loss: float = 0.5,
    as_json: Annotated[Switch, tyro.conf.arg(name="json", help_behavior_hint="")] = False,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    engine: QualityFlags,
) -> None:
    """Measure what KV formats cost in quality, and say which to take.

    Windows are consecutive runs of tokens of the text, without special tokens, each by itself. Every format is
    compared with fp32: perplexity, KL divergence, the likeliest token, and how many tokens of a greedy answer are the
    same. Figures have 95 % intervals, bootstrapped over windows.

    Args:
        text: UTF-8 file.
        window: tokens of a window.
        windows: how many windows.
        new_tokens: tokens of a greedy answer to the beginning of each window.
        kv_precision: a KV format to be measured.
        max_loss: rise of perplexity, in per cent, that is allowed of the format to take.
        as_json: print one JSON object instead of a table.
        model: alias, .gguf file, Hugging Face directory or converted directory; or a name among the `models` of the
            file.
        config: YAML file with `model` or `models` and defaults for the options below.
    """
    settings = settle(config, model, engine)
    content = read_text(text, window, windows)
    names = [name for name in kv_precision or FORMATS if name != WIDE]
    options = settings.config(
        kv_formats=(WIDE, *names),
        kv_precision=WIDE,
        min_kv_precision=None,
        max_seq_len=max(window, min(window // 2, PROMPT_TOKENS) + new_tokens),
        max_batch_size=1 + len(names),
    )
    made = load_engine(settings.model, options)
    tokens = made.tokenizer.encode(content, add_special_tokens=False)
    found = measure_quality(made, tokens, names, window, windows, new_tokens, lambda done: _progress(done, windows))
    if as_json:
        chosen = found.choice(max_loss / 100)
        take = None if chosen is None else chosen.kv_precision
        print(json.dumps({**found.as_dict(), "max_loss": max_loss / 100, "choice": take}))
    else:
        print_quality(found, max_loss)


def print_quality(found: Quality, max_loss: float) -> None:
    """Prints a table, and which format to take if perplexity may rise by at most `max_loss` per cent."""
    _print_table(found)
    chosen, allowed = found.choice(max_loss / 100), f"a rise of perplexity of at most {max_loss:g} %"
    if chosen is None:
        print(f"none of these has {allowed} with its whole interval: take {found.wide}, or measure more windows")
    else:
        print(f"for {allowed}, take {chosen.kv_precision}: {chosen.bits_per_value:.2f} bits a value")


def _print_table(found: Quality) -> None:
    table = Table("KV format", "bits", "perplexity", "rise, %", "KL", "KL p99", "same top, %", "same greedily")
    for row in found.formats:
        table.add_row(
            row.kv_precision,
            f"{row.bits_per_value:.2f}",
            _shown(row.perplexity, 1, ".3f"),
            _shown(row.rise, 100, "+.2f"),
            _shown(row.kl, 1, ".4f"),
            _shown(row.kl_p99, 1, ".4f"),
            _shown(row.same_top, 100, ".1f"),
            _shown(row.same_greedy, 1, ".1f"),
        )
    wide = f"against {found.wide} with a perplexity of {_shown(found.wide_perplexity, 1, '.3f')}"
    text = f"{found.windows} windows of {found.window} tokens, greedy answers of {found.new_tokens}"
    print(f"{found.model} in {found.weights}, {wide}; {text}")
    Console(width=160).print(table)


def _shown(estimate: Estimate, unit: float, form: str) -> str:
    return "{} ({} to {})".format(*(format(unit * value, form) for value in estimate))


def _progress(done: int, windows: int) -> None:
    print(f"window {done} of {windows}", file=sys.stderr, flush=True)
