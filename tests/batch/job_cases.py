"""What tests of the batch job compare with."""

import json

from fineserve_jax import SamplingParams
from fineserve_jax.entrypoints.batch import BatchJob, JobObserver, JobOutput, read_rows
from fineserve_jax.entrypoints.batch.records import line_records
from fineserve_jax.entrypoints.batch.resuming import unanswered
from fineserve_jax.request.request import RequestStatus
from fineserve_jax.request.request_options import RequestOptions

GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


def by_id(rows):
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def alone(engine, prompt, kv_precision, **sampling):
    """The text that the engine gives to a prompt with nothing else to do."""
    sampling = SamplingParams(**{**GREEDY, **sampling})
    request = engine.add_request(engine.tokenizer.encode(prompt), sampling, RequestOptions(kv_precision=kv_precision))
    while request.status is not RequestStatus.FINISHED:
        engine.step()
    text = engine.detokenizers[request].text
    engine.release(request)
    return text


class OnStep(JobObserver):
    """Calls a function with the summary after every step; what that raises ends the job, if it is no `Exception`."""

    def __init__(self, call):
        self._call = call

    def step(self, summary, stats):
        self._call(summary)


def run_job(engine, rows, path, sampling=None, *, resume=False, ordered=False, observers=(), **options):
    """Answers rows (objects, or raw lines) into a file, going on with what that holds or anew; returns the summary."""
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    with JobOutput(path, resume=resume, overwrite=not resume, ordered=ordered) as output:
        delivery = output.begin()
        job = BatchJob(engine, delivery, sampling, observers=observers, **options)
        return job.run(read_rows(unanswered(line_records(lines), delivery, job.summary.note_skipped)))


def written(path):
    """The rows of an output, in order, which hold no NaN and no infinity."""
    return [json.loads(line, parse_constant=_refuse) for line in path.read_bytes().splitlines()]  # at line ends alone


def without_timing(rows):
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def _refuse(name):
    raise ValueError(f"{name} is no JSON value")
