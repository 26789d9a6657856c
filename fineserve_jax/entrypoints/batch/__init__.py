"""The offline batch job: files of prompts in, a file of answers out.

An input is JSON lines, CSV or Parquet, perhaps compressed; its content tells which. A row is a JSON object on a line
of its own, or a row of a table, with `prompt` (text, or a list of token ids) or `messages` (a list of {"role": ...,
"content": ...}, rendered by the model's chat template), and, if wanted, with

    id                 its own, any JSON value, which its answer bears; else the line's number
    model              the name of its model, where there are several
    kv_precision       the KV format of this row, or "auto"
    min_kv_precision   the KV format to which its older tokens may be narrowed when memory is short
    tenant             whose it is: quotas and shares are kept by it
    priority           a whole number: smaller ones first
    ttft_slo_s         target for its first token, in seconds after it joined the queue
    tpot_slo_s         target for each further token, in seconds
    drop_when_late     true: no answer when the first token cannot be in time; `finish_reason` is then "late"
    deadline_s         seconds after which it ends with what it has, and the `finish_reason` "late"
    echo               true: its text begins with its prompt, of which `logprobs` tell, too
    num_speculative_tokens  tokens that it may be ahead in a step, at most; 0: none
    tools              functions that the model may call, for `messages`; likewise every other field of `ChatOptions`
    ...                every field of `SamplingParams`

that is, every field of `RequestOptions`, `ChatOptions` and `SamplingParams`, and the names that OpenAI's API has for
some of the latter: `max_completion_tokens` for `max_tokens`, `logprobs` true or false with `top_logprobs`, and
`response_format` for `structured_outputs`. Null
stands for a field's default, also where the job has another one. No two rows may have equal ids: numbers are equal by
value, objects whatever the order of their members, and values of different types never.

An answer is

    id, text, finish_reason, prompt_tokens, output_tokens, kv_precision, kv_tokens, timing

where `kv_tokens` says how many of its tokens were kept in each KV format when it ended, and `timing` how long it took,
in seconds, as `RequestMetrics` does, with `attempts`, how often it was begun; and, where there are several models,
`model`; where the row asked for them, `logprobs`: for each output token {"token", "text", "bytes", "logprob"}, with
"top", a list of such, for the most likely tokens, and "asked", for `logprob_token_ids`; and likewise `prompt_logprobs`,
for each token of the prompt, of which the first has none. A row with `n` above 1 has `samples` instead of `text`,
`finish_reason` and `logprobs`: a list of objects with those and `output_tokens`. A log-probability of minus
infinity (a token that the model excludes) is null, as JSON has no infinities. A row that cannot be answered, for
which the model computes NaN or infinity, whose answer cannot go on as its `structured_outputs` ask, or with which the
engine fails, gives {"id", "line", "error"}.

A row with `custom_id` is a request of OpenAI's batch API, see `openai_rows`, and is answered as one, see
`openai_answers`.

Answers are written as they are complete, in no order unless one is asked for; the ids tie them to their rows. A journal
beside the output, see `journal`, knows what is done, so that a job that ended in any way can go on.
"""

from fineserve_jax.entrypoints.batch.check import BatchCheck, Finding
from fineserve_jax.entrypoints.batch.inputs import Inputs
from fineserve_jax.entrypoints.batch.job import BatchJob
from fineserve_jax.entrypoints.batch.job_output import JobOutput
from fineserve_jax.entrypoints.batch.observers import JobObserver, JobStart, RowOutcome
from fineserve_jax.entrypoints.batch.predictor import FineServePredictor
from fineserve_jax.entrypoints.batch.report_sections import ReportSection
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow, read_rows
from fineserve_jax.entrypoints.batch.run import run_batch
from fineserve_jax.entrypoints.batch.summary import BatchSummary, FormatSummary

__all__ = [
    "BadRow",
    "BatchCheck",
    "BatchJob",
    "BatchRow",
    "BatchSummary",
    "Finding",
    "FineServePredictor",
    "FormatSummary",
    "Inputs",
    "JobObserver",
    "JobOutput",
    "JobStart",
    "ReportSection",
    "RowOutcome",
    "read_rows",
    "run_batch",
]
