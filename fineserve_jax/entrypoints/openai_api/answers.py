"""Whole answers as OpenAI's endpoints send them: chat completions, completions and errors."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fineserve_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fineserve_jax.entrypoints.openai_api.fields import Form
from fineserve_jax.entrypoints.openai_api.logprobs import Echo, Entries, chat_logprobs, text_logprobs
from fineserve_jax.entrypoints.openai_api.tool_calls import calls_message, find_calls
from fineserve_jax.request.request import FinishReason

STATUS = {
    "engine_fault": 500,
    "internal_error": 500,
    "not_finite": 500,
    "dead_end": 500,
    "late": 408,
    "model_not_found": 404,
}
"""HTTP status of errors by their code; 400 for all others that a request may make."""

LATE = (
    "the answer was not there in time, and the request asked to be ended then; give a longer deadline_s, or a longer "
    "ttft_slo_s where drop_when_late is set, or leave them out"
)


def completion_body(
    form: Form,
    token: str,
    created: int,
    outputs: Sequence[RequestOutput],
    entries: Sequence[Sequence[Entries | None]],
    echoes: Sequence[Echo],
    callable_names: Collection[str] = (),
) -> dict[str, Any]:
    """The body of an answer.

    Args:
        form: of its endpoint.
        token: what no other answer's id has.
        created: seconds of Unix time.
        outputs: of each prompt; one but for completions.
        entries: log-probabilities of each prompt's samples.
        echoes: each prompt. Where answers do not begin with it, log-probabilities of its tokens are a field of the
            body, a list for each prompt if there are several.
        callable_names: functions whose calls in a chat's text are told as such.
    """
    samples = [
        (sample, own, echo)
        for output, of_output, echo in zip(outputs, entries, echoes, strict=True)
        for sample, own in zip(output.outputs, of_output, strict=True)
    ]
    of_prompts = [echo.entries for echo in echoes if not echo.is_wanted and echo.entries is not None]
    return {
        **answer_head(form, token, created, outputs[0].model),
        "choices": [
            _chat_choice(index, sample, logprobs, token, callable_names)
            if form == "chat"
            else _text_choice(index, sample, logprobs, echo)
            for index, (sample, logprobs, echo) in enumerate(samples)
        ],
        "usage": usage_of(outputs),
        **({"prompt_logprobs": of_prompts[0] if len(outputs) == 1 else of_prompts} if of_prompts else {}),
    }


def answer_head(form: Form, token: str, created: int, model: str, *, is_chunk: bool = False) -> dict[str, Any]:
    """What an answer, or each chunk of one that is streamed, begins with."""
    kind = "text_completion" if form == "completions" else "chat.completion.chunk" if is_chunk else "chat.completion"
    name = f"{'chatcmpl' if form == 'chat' else 'cmpl'}-{token}"
    return {"id": name, "object": kind, "created": created, "model": model}


def usage_of(outputs: Iterable[RequestOutput]) -> dict[str, int]:
    """Tokens of prompts and of all their samples."""
    prompt = completion = 0
    for output in outputs:
        prompt += len(output.prompt_token_ids)
        completion += sum(len(sample.token_ids) for sample in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def timing_of(metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
    """How long answers took, in seconds; of several prompts the longest."""
    return {
        "queue_s": round(max(one.queue_s for one in metrics), 6),
        "ttft_s": round(max(one.ttft_s for one in metrics), 6),
        "total_s": round(max(one.total_s for one in metrics), 6),
        "num_preemptions": sum(one.num_preemptions for one in metrics),
    }


def error_body(message: str, code: str | None, status: int) -> dict[str, Any]:
    """{"error": ...} of a request that cannot be answered."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def finish_reason_of(reason: str | None, has_calls: bool) -> str | None:
    """Why an answer ended: of its own accord, after calls if it has some, or for another reason."""
    return "tool_calls" if has_calls and reason == FinishReason.STOP else reason


def _chat_choice(
    index: int, sample: CompletionOutput, entries: Entries | None, token: str, callable_names: Collection[str]
) -> dict[str, Any]:
    text, calls = find_calls(sample.text, callable_names)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": calls_message(calls, token, index)}
    return {
        "index": index,
        "message": message,
        "logprobs": None if entries is None else chat_logprobs(entries),
        "finish_reason": finish_reason_of(sample.finish_reason, bool(calls)),
    }


def _text_choice(index: int, sample: CompletionOutput, entries: Entries | None, echo: Echo) -> dict[str, Any]:
    return {
        "index": index,
        "text": echo.text + sample.text,
        "logprobs": text_logprobs(entries, echo),
        "finish_reason": sample.finish_reason,
    }
