"""The life of requests in an engine: how they end, what is left behind, what is refused."""

import pytest
from engine_cases import CHARACTERS, EOS, serve

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.request.request import FinishReason, RequestStatus
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

PROMPT = list(range(1, 20))


def only(text: str) -> dict[int, float]:
    """A bias that lets the model say nothing but the characters of `text`."""
    return {CHARACTERS.index(character) if character != "$" else EOS: 1000.0 for character in text}


def test_a_request_ends_at_max_tokens(make_engine):
    (request,) = serve(make_engine(), [PROMPT], ["int8"], SamplingParams(max_tokens=5, ignore_eos=True))
    assert request.finish_reason is FinishReason.LENGTH
    assert request.num_output_tokens == 5


def test_a_request_ends_at_max_seq_len(make_engine):
    engine = make_engine()
    (request,) = serve(engine, [[1] * 250], ["int4"], SamplingParams(ignore_eos=True))
    assert request.finish_reason is FinishReason.LENGTH
    assert request.num_tokens == 256


def test_a_request_ends_at_the_end_of_sequence_token(make_engine):
    engine = make_engine()
    (request,) = serve(engine, [PROMPT], ["bf16"], SamplingParams(max_tokens=9, logit_bias=only("$")))
    assert request.finish_reason is FinishReason.STOP
    assert request.output_token_ids == [EOS]
    assert engine.detokenizers[request].text == ""


def test_min_tokens_holds_the_end_back(make_engine):
    sampling = SamplingParams(max_tokens=9, min_tokens=4, logit_bias=only("$") | {5: 900.0})
    (request,) = serve(make_engine(), [PROMPT], ["bf16"], sampling)
    assert request.output_token_ids == [5, 5, 5, 5, EOS]


def test_a_stop_token_ends_the_output_and_is_not_part_of_the_text(make_engine):
    engine = make_engine()
    sampling = SamplingParams(max_tokens=9, logit_bias=only("a"), stop_token_ids=[CHARACTERS.index("a")])
    (request,) = serve(engine, [PROMPT], ["bf16"], sampling)
    assert request.finish_reason is FinishReason.STOP
    assert engine.detokenizers[request].text == ""


def test_a_stop_string_ends_the_text_where_it_begins(make_engine):
    engine = make_engine()
    sampling = SamplingParams(max_tokens=9, logit_bias=only("a"), stop=["aaa"], ignore_eos=True)
    (request,) = serve(engine, [PROMPT], ["bf16"], sampling)
    assert request.finish_reason is FinishReason.STOP
    assert request.num_output_tokens == 3
    assert engine.detokenizers[request].text == ""


def test_logprobs_are_those_of_the_model_before_bias(make_engine):
    engine = make_engine()
    plain = SamplingParams(max_tokens=1, logprobs=3, ignore_eos=True)
    biased = SamplingParams(max_tokens=1, logprobs=3, ignore_eos=True, logit_bias=only("a"))
    (first,), (second,) = (serve(engine, [PROMPT], ["fp32"], sampling) for sampling in (plain, biased))
    assert first.logprobs[0].top == pytest.approx(second.logprobs[0].top, abs=1e-5)  # of cached pages: other sums
    assert first.logprobs[0].logprob == pytest.approx(max(first.logprobs[0].top.values()))
    assert second.logprobs[0].logprob < first.logprobs[0].logprob


def test_an_aborted_request_gives_its_memory_back_and_keeps_its_tokens(make_engine):
    engine = make_engine()
    kept, dropped = (engine.add_request(PROMPT, SamplingParams(max_tokens=30)) for _ in range(2))
    for _ in range(4):
        engine.step()
    tokens = list(dropped.token_ids)
    engine.abort(dropped)
    engine.abort(dropped)  # a second time is no error
    assert dropped.status is RequestStatus.FINISHED
    assert dropped.finish_reason is FinishReason.ABORT
    assert dropped.token_ids == tokens
    while engine.has_unfinished:
        engine.step()
    assert kept.finish_reason is not FinishReason.ABORT
    assert all(usage.owned_pages == 0 for usage in engine.stats().kv.values())


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(make_engine):
    engine = make_engine(max_seq_len=320)  # a shape of its own, which no other test has compiled
    assert engine.runner.warm_up() > 0
    before = engine.stats().num_compilations
    rich = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.5, logprobs=2, presence_penalty=1.0)
    for count, sampling in ((1, rich), (7, SamplingParams(max_tokens=20)), (12, rich)):
        prompts = [list(range(1, 5 + 7 * i)) for i in range(count)]
        serve(engine, prompts, [("bf16", "int8", "int4")[i % 3] for i in range(count)], sampling)
    assert engine.stats().num_compilations == before


def test_stats_say_how_much_memory_is_needed_reserved_and_free(make_engine):
    engine = make_engine()
    engine.add_request(PROMPT, SamplingParams(max_tokens=30), RequestOptions(kv_precision="int8"))
    engine.step()
    stats = engine.stats()
    usage = stats.kv["int8"]
    assert stats.num_running == 1
    assert usage.cached_tokens == len(PROMPT)
    assert 0 < usage.needed_bytes <= usage.reserved_bytes <= stats.kv_bytes
    assert usage.reserved_bytes + usage.free_bytes <= stats.kv_bytes


@pytest.mark.parametrize(
    ("prompt", "sampling", "kv_precision", "message"),
    [
        ([], {}, "bf16", "prompt is empty"),
        ([5, 96], {}, "bf16", "token 96; tiny has tokens 0 to 95"),
        ([1] * 256, {}, "bf16", "256 tokens; with max_seq_len=256 it may have 255"),
        ([1], {}, "int5", "kv_precision='int5' is not served; choose one of fp32, bf16"),
        ([1], {"logit_bias": {200: 1.0}}, "bf16", "logit_bias has token 200"),
        ([1], {"stop_token_ids": [96]}, "bf16", "stop_token_ids has token 96"),
        ([1], {"min_tokens": 1, "stop_token_ids": range(1, 70)}, "bf16", "hold back 70 tokens"),
        ([1] * 100, {"min_tokens": 200}, "bf16", "min_tokens=200 after a prompt of 100 tokens"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(make_engine, prompt, sampling, kv_precision, message):
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, SamplingParams(**sampling), RequestOptions(kv_precision=kv_precision))
    assert not engine.has_unfinished


def test_an_id_that_is_in_use_is_refused(make_engine):
    engine = make_engine()
    assert engine.add_request(PROMPT, request_id="mine").request_id == "mine"
    with pytest.raises(RequestError, match="request_id='mine' is in use"):
        engine.add_request(PROMPT, request_id="mine")


def test_a_request_that_does_not_fit_its_share_is_refused(make_engine):
    engine = make_engine(
        kv_memory="2MB",
        kv_formats=["int8", "fp32"],
        kv_precision="int8",
        slab_policy="partitioned",
        slab_shares={"int8": 9, "fp32": 1},
    )
    with pytest.raises(RequestError, match="up to 256 tokens in fp32 does not fit the KV memory, which holds"):
        engine.add_request([1] * 100, SamplingParams(max_tokens=156), RequestOptions(kv_precision="fp32"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_memory": "100KB"}, "kv_memory=97.7 KiB is too small for one request"),
        (
            {"kv_memory": "256KB", "kv_precision": "fp32"},
            "too small for one request: it holds .* tokens in fp32",
        ),
        ({"kv_memory": "900TB"}, "more than the .* of"),
        ({"kv_memory": "many"}, "kv_memory='many' is not a size"),
        ({"kv_memory": -5}, "no memory at all"),
        ({"kv_memory": "50%"}, "kv_memory='50%' is not a size"),
        ({"kv_memory": "inf"}, "kv_memory='inf' is not a size"),
        ({"max_seq_len": 513}, "max_seq_len=513 is more than the 512 tokens"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tiny_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_model, EngineConfig(**({"max_seq_len": 256} | settings)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_precision": "int5"}, "unknown KV precision 'int5'; choose one of fp32, bf16"),
        ({"weights": "int2"}, "weights='int2'"),
        ({"kv_precison": "int8"}, "unknown setting 'kv_precison'"),
        ({"kv_formats": ["int8"], "kv_precision": "bf16"}, "not among kv_formats"),
        ({"slab_shares": {"int8": 1}}, "slab_shares has no meaning"),
        ({"policy": "random"}, "unknown policy"),
        ({"max_chunk_tokens": 100}, "not a multiple of page_size=16; use 112"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_the_host_has_its_part_of_the_steps_that_compile_nothing(make_engine):
    engine = make_engine()
    assert engine.stats().host_s_per_step is None
    for _ in range(2):  # the first compiles, perhaps
        serve(engine, [[1, 2, 3]], ["int8"], SamplingParams(max_tokens=3, ignore_eos=True))
    stats = engine.stats()
    assert 0 < stats.host_s_per_step < stats.num_output_tokens / stats.output_tokens_per_s
