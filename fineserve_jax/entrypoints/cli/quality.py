"""`fineserve-jax quality`: what KV formats and weights cost, with intervals, and which to take."""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.answers import (
    LAST_NUMBER,
    RECALL_RULE,
    RECALL_TOKENS,
    AnswerQuality,
    as_rows,
    measure_answers,
    read_questions,
    recall_questions,
)
from fineserve_jax.engine.engine_config import EngineConfig, Weights
from fineserve_jax.engine.estimates import Estimate
from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.perplexity import read_text
from fineserve_jax.engine.pressure import EngineUnderPressure
from fineserve_jax.engine.quality import PROMPT_TOKENS, WIDE, Quality, measure_quality
from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import ConfigFlag, ModelFlag, QualityFlags, settle
from fineserve_jax.entrypoints.cli.quality_picture import draw_quality
from fineserve_jax.pallas_kernels.formats import FORMATS

Precisions = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help_behavior_hint="(repeatable; default: all there are)")
]
OtherWeights = Annotated[
    tuple[Weights, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help_behavior_hint="(repeatable; default: none)")
]
Pressures = Annotated[
    tuple[float, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help_behavior_hint="(repeatable; default: none)")
]
ROWS_OF_ANSWERS = 8


def quality(
    *,
    text: Path,
    window: int = 1024,
    windows: int = 24,
    new_tokens: int = 64,
    kv_precision: Precisions = (),
    pressure: Pressures = (),
    other_weights: OtherWeights = (),
    task: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    task_prompt: str = "Question: {question}\nAnswer:",
    task_rule: str = LAST_NUMBER,
    task_tokens: int = 256,
    recall: int = 0,
    questions: int = 100,
    max_loss: float = 0.5,
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    as_json: Annotated[Switch, tyro.conf.arg(name="json", help_behavior_hint="")] = False,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    engine: QualityFlags,
) -> None:
    """Measure what KV formats, auto under pressure and narrow weights cost in quality, and say which to take.

    Windows are consecutive runs of tokens of the text, without special tokens, each by itself. Every format is
    compared with fp32: perplexity, KL divergence, the likeliest token, and how many tokens of a greedy answer are the
    same; and, where asked, how many questions are answered right and as in fp32. Figures have 95 % intervals,
    bootstrapped over windows or questions.

    Args:
        text: UTF-8 file.
        window: tokens of a window.
        windows: how many windows.
        new_tokens: tokens of a greedy answer to the beginning of each window.
        kv_precision: a KV format to be measured, a pair such as k8v4, or a recipe; none: all formats that are
            registered, and all recipes.
        pressure: how many times the memory that there is requests are to want, while auto is measured: a window may
            hold its share, and its older tokens are narrowed to int8 and int4 for that, as they come.
        other_weights: a precision of the weights to be measured beside those of the engine, with a KV cache in fp32.
        task: questions, JSON lines of "question" and "answer", as GSM8K has them.
        task_prompt: prompts of the task; {question} is replaced.
        task_rule: regular expression whose group, where it last matches, is the answer.
        task_tokens: most tokens of an answer to a question of the task.
        recall: ask for a number that was told so many tokens before, with the text in between; 0: do not.
        questions: most questions of the task, and how many of recall.
        max_loss: rise of perplexity, in per cent, that is allowed of the format to take.
        as_json: print one JSON object instead of a table.
        model: alias, .gguf file, Hugging Face directory or converted directory; or a name among the `models` of the
            file.
        plot: file for a picture of bits a value and loss, PNG or SVG; needs matplotlib (extra `plot`).
        config: YAML file with `model` or `models` and defaults for the options below.
    """
    settings = settle(config, model, engine)
    content = read_text(text, window, windows)
    names = [name for name in kv_precision or (*FORMATS, *settings.config().kv_recipes) if name != WIDE]
    longest = max(window, min(window // 2, PROMPT_TOKENS) + new_tokens, recall + 128 if recall else 0)
    options = settings.config(
        kv_formats=(WIDE, *names),
        kv_precision=WIDE,
        min_kv_precision=None,
        max_seq_len=max(longest, 2048) if task else longest,
        max_batch_size=max(1 + len(names), ROWS_OF_ANSWERS if task or recall else 1),
    )
    made = load_engine(settings.model, options)
    tokenizer = made.tokenizer
    asked = {} if task is None else {task.stem: read_questions(task, tokenizer, task_prompt, task_rule, questions)}
    tokens = tokenizer.encode(content, add_special_tokens=False)
    recalled = recall_questions(tokenizer, tokens, recall, questions) if recall else []
    narrow = options.model_copy(update={"kv_formats": (WIDE,), "max_batch_size": 1})
    others = [load_engine(settings.model, narrow.model_copy(update={"weights": own})) for own in other_weights]
    served_by_auto = options.model_copy(update={"kv_formats": None})
    devices = made.arena.group.devices
    short = [EngineUnderPressure(made.model, served_by_auto, times, devices) for times in dict.fromkeys(pressure)]
    found = measure_quality(
        made,
        tokens,
        names,
        window,
        windows,
        new_tokens,
        lambda done: _progress(done, windows),
        others=others,
        under_pressure=short,
    )
    ask = functools.partial(measure_answers, made, tokenizer, kv_precisions=names, wide=WIDE, under_pressure=short)
    answers = {name: ask(questions=own, new_tokens=task_tokens, rule=task_rule) for name, own in asked.items()}
    if recalled:
        answers[f"recall, {recall} tokens"] = ask(questions=recalled, new_tokens=RECALL_TOKENS, rule=RECALL_RULE)
    if plot is not None:
        draw_quality(found, plot)
    if as_json:
        chosen = found.choice(max_loss / 100)
        take = None if chosen is None else chosen.kv_precision
        summary = {"answers": as_rows(answers), "max_loss": max_loss / 100, "choice": take}
        print(json.dumps({**found.as_dict(), **summary}))
    else:
        print_quality(found, max_loss)
        print_answers(answers)


def print_answers(answers: Mapping[str, Sequence[AnswerQuality]]) -> None:
    """Prints a table of each task: shares of questions that are answered right, and as in the wide format."""
    for task, rows in answers.items():
        table = Table("KV format", "right, %", "same answer, %", title=task)
        for row in rows:
            name = _named(row.kv_precision, row.pressure)
            table.add_row(name, _shown(row.right, 100, ".1f"), _shown(row.same, 100, ".1f"))
        Console(width=160).print(table)


def print_quality(found: Quality, max_loss: float) -> None:
    """Prints a table, and which format to take if perplexity may rise by at most `max_loss` per cent."""
    _print_table(found)
    chosen, allowed = found.choice(max_loss / 100), f"a rise of perplexity of at most {max_loss:g} %"
    if chosen is None:
        print(f"none of these has {allowed} with its whole interval: take {found.wide}, or measure more windows")
    else:
        settings = [] if chosen.kv_precision in FORMATS else [f"{chosen.kv_precision} in kv_formats"]
        if found.page_size != EngineConfig().page_size:
            settings.append(f"page_size={found.page_size}")
        served = f", served with {' and '.join(settings)}" if settings else ""
        print(f"for {allowed}, take {chosen.kv_precision}: {chosen.bits_per_value:.2f} bits a value{served}")


def _print_table(found: Quality) -> None:
    table = Table(
        "KV format", "bits", "bytes a token", "perplexity", "rise, %", "KL", "KL p99", "same top, %", "same greedily"
    )
    for row in (*found.formats, *found.under_pressure, *found.other_weights):
        name = _named(row.kv_precision, row.pressure)
        table.add_row(
            name if row.weights == found.weights else f"{name}, weights {row.weights}",
            f"{row.bits_per_value:.2f}",
            f"{row.kv_bytes_per_token:,.0f}",
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


def _named(kv_precision: str, pressure: float | None) -> str:
    return kv_precision if pressure is None else f"{kv_precision}, pressure {pressure:g}"


def _shown(estimate: Estimate, unit: float, form: str) -> str:
    return "{} ({} to {})".format(*(format(unit * value, form) for value in estimate))


def _progress(done: int, windows: int) -> None:
    print(f"window {done} of {windows}", file=sys.stderr, flush=True)
