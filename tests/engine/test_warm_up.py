"""What a warm-up has left out is said when it is compiled."""

import logging

import pytest
from engine_cases import serve

from fineserve_jax.engine.embedding import Embedding
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.scoring import Scoring
from fineserve_jax.engine.tickets import Inbox
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.request.structured.params import StructuredOutputsParams


@pytest.fixture(scope="module")
def warm(tiny_model) -> Engine:
    """Of sizes that no other test has: programs are shared."""
    sizes = {"max_seq_len": 80, "max_batch_size": 8, "max_chunk_tokens": 48, "kv_memory": "2MiB"}
    engine = Engine(tiny_model, EngineConfig(**sizes, kv_formats=("bf16", "int8")))
    engine.warm_up(prompt_logprobs=True)
    return engine


def after_the_warm_up(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "after the warm-up" in record.getMessage()]


def test_completions_are_scored_by_what_is_compiled_and_embeddings_have_a_program_of_their_own(warm, caplog):
    def serve_all(call):
        tickets = call.tickets(warm, Inbox())
        for ticket in tickets:
            warm.queue(ticket.prepared)
        while warm.has_unfinished:
            warm.step()
        return [ticket.prepared for ticket in tickets]

    with caplog.at_level(logging.WARNING, logger="fineserve_jax"):
        (prepared,) = serve_all(Scoring([[5, 6, 7]], [[[8, 9], [10, 11, 12]]], None, {}))
        assert len(prepared.branches) == 2
        assert not after_the_warm_up(caplog)
        serve_all(Embedding([[5, 6, 7]], "mean", False, None, {}))
    assert after_the_warm_up(caplog)
    assert all("hidden states are pooled" in message for message in after_the_warm_up(caplog))


@pytest.mark.parametrize(
    ("options", "kv_precision", "cause"),
    [
        ({}, "bf16", None),
        ({"structured_outputs": StructuredOutputsParams(regex="[ab]{8}")}, "bf16", "structured outputs"),
        ({}, "int8", "KV formats that were not served before"),
    ],
)
def test_a_program_that_is_compiled_after_the_warm_up_is_logged_with_its_cause(
    warm, caplog, options, kv_precision, cause
):
    with caplog.at_level(logging.WARNING, logger="fineserve_jax"):
        serve(warm, [[5, 6, 7, 8]] * 2, [kv_precision] * 2, SamplingParams(max_tokens=4, ignore_eos=True, **options))
    said = after_the_warm_up(caplog)
    assert bool(said) == (cause is not None)
    assert all(cause in message for message in said)
