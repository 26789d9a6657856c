"""What KV formats cost in answers: how many questions are answered right, and as a wide format answers them.

A question is a prompt and what its answer has to be; an answer is what a rule finds in the text that the model goes on
with greedily.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.engine.estimates import Estimate, draws_of, estimate
from fineserve_jax.engine.pressure import EngineUnderPressure
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.loaders.tokenizer import Tokenizer
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

LAST_NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"
"""The rule for answers that are numbers, as GSM8K's are."""
RECALL_TOKENS = 8
RECALL_RULE = r"^\D*(\d+)"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt's token ids, and the answer that is right."""

    prompt: tuple[int, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class AnswerQuality:
    """What a KV format makes of some questions.

    Attributes:
        kv_precision: the format, or "auto".
        right: share of questions that are answered right.
        same: share of questions that are answered as the wide format answers them, right or wrong.
        pressure: under which `auto` answered them; None: there was memory enough.
    """

    kv_precision: str
    right: Estimate
    same: Estimate
    pressure: float | None = None


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)
    question: str
    answer: str


def read_questions(path: Path, tokenizer: Tokenizer, template: str, rule: str, count: int) -> list[Question]:
    """The first `count` questions of a JSON-lines file with `question` and `answer`, in GSM8K's form or shorter.

    Args:
        template: of prompts; `{question}` stands for the question.
        rule: see `found_answer`. What it finds in `answer` is the right one, all of that if it finds nothing.

    Raises:
        ConfigError: an unreadable file or rule, or a line that is no such object.
    """
    if re.compile(rule).groups != 1:
        raise ConfigError(f"the rule {rule!r} has {re.compile(rule).groups} groups; give it one, around the answer")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the questions {path}: {error}") from None
    questions = []
    for number, line in [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:count]:
        try:
            row = _Row.model_validate_json(line)
        except ValidationError as error:
            raise ConfigError(f"{path}, line {number}: {error.errors()[0]['msg']}; a question needs both") from None
        prompt = tokenizer.encode(template.replace("{question}", row.question))
        questions.append(Question(tuple(prompt), found_answer(row.answer, rule) or row.answer.strip()))
    if len(questions) < 2:
        raise ConfigError(f"{path} has {len(questions)} questions; at least 2 are needed, for intervals")
    return questions


def recall_questions(
    tokenizer: Tokenizer, filler: Sequence[int], distance: int, count: int, seed: int = 0
) -> list[Question]:
    """Questions after a number of five digits that was told `distance` tokens before, with a text in between.

    Raises:
        RequestError: too short a text for `count` pieces of `distance` tokens.
    """
    if len(filler) < count * distance:
        raise RequestError(
            f"the text has {len(filler)} tokens; {count} questions {distance} tokens back need {count * distance}: "
            "ask fewer, or less far back"
        )
    rng, questions = np.random.default_rng(seed), []
    for i in range(count):
        number = str(rng.integers(10_000, 100_000))
        told = tokenizer.encode(f"The number of the safe is {number}. Remember: the number of the safe is {number}.\n")
        asked = tokenizer.encode("\nRemember: the number of the safe is", add_special_tokens=False)
        between = filler[i * distance : (i + 1) * distance]
        questions.append(Question((*told, *between, *asked), number))
    return questions


def found_answer(text: str, rule: str) -> str | None:
    """What the group of the regular expression holds where it last matches, without commas; None: nowhere."""
    matches = re.findall(rule, text)
    return matches[-1].replace(",", "").strip().removesuffix(".0") if matches else None


def measure_answers(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    kv_precisions: Sequence[str],
    wide: str,
    new_tokens: int,
    rule: str,
    under_pressure: Sequence[EngineUnderPressure] = (),
) -> list[AnswerQuality]:
    """How the questions are answered in each KV format, that of comparison first, and in `auto` under pressure.

    Args:
        engine: of one model, with nothing else to do meanwhile.
        wide: what the formats' answers are compared with.
        new_tokens: most tokens of an answer.
        under_pressure: engines of the same model, in which `auto` is asked.

    Raises:
        RequestError: a prompt that an engine has no room for.
    """
    names = [wide, *(name for name in dict.fromkeys(kv_precisions) if name != wide)]
    asked = [*((engine, name) for name in names), *((short, AUTO) for short in under_pressure)]
    answers = [
        [found_answer(text, rule) for text in _greedy_texts(own, tokenizer, questions, name, new_tokens)]
        for own, name in asked
    ]
    draws = draws_of(len(questions))

    def share(flags: Sequence[bool]) -> Estimate:
        return estimate(draws, lambda own: float(np.mean(own)), flags)

    return [
        AnswerQuality(
            name,
            share([given == question.answer for given, question in zip(own, questions, strict=True)]),
            share([given == of_wide for given, of_wide in zip(own, answers[0], strict=True)]),
            short.pressure if isinstance(short, EngineUnderPressure) else None,
        )
        for (short, name), own in zip(asked, answers, strict=True)
    ]


def _greedy_texts(
    engine: Engine, tokenizer: Tokenizer, questions: Sequence[Question], name: str, new_tokens: int
) -> list[str]:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)
    options = RequestOptions(kv_precision=name)
    requests: list[Request] = []
    try:
        requests += [engine.add_request(question.prompt, sampling, options) for question in questions]
        while engine.has_unfinished:
            engine.step()
    finally:
        for request in requests:
            engine.abort(request)
            engine.release(request)
    return [tokenizer.decode(_tokens(request)) for request in requests]


def _tokens(request: Request) -> list[int]:
    if request.error is not None:
        raise request.error
    return request.output_token_ids


def as_rows(found: Mapping[str, Sequence[AnswerQuality]]) -> dict[str, Any]:
    """For JSON: by task, of each format its shares."""
    return {
        task: [
            {
                "kv_precision": row.kv_precision,
                "pressure": row.pressure,
                "right": row.right._asdict(),
                "same": row.same._asdict(),
            }
            for row in rows
        ]
        for task, rows in found.items()
    }
