"""The synchronous front door, on a tiny model."""

import pytest
from engine_cases import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.engine import prepare
from fineserve_jax.engine.detokenizer import IncrementalDetokenizer
from fineserve_jax.errors import RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

TOKENIZER = character_tokenizer()
TWENTY = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture
def llm(make_llm) -> LLM:
    return make_llm()


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["a" * length for length in (40, 3, 25, 9)]
    formats = ["int4", "bf16", "int8", "int4"]
    outputs = llm.generate(prompts, TWENTY, kv_precision=formats)
    assert [output.prompt for output in outputs] == prompts
    assert [output.kv_precision for output in outputs] == formats
    assert all(len(output.outputs[0].token_ids) == 20 for output in outputs)
    assert llm.stats().num_running == llm.stats().num_waiting == 0


def test_a_single_prompt_may_be_text_or_tokens(llm):
    text, tokens = llm.generate("hello", TWENTY), llm.generate(llm.tokenizer.encode("hello"), TWENTY)
    assert text[0].outputs[0].text == tokens[0].outputs[0].text
    assert tokens[0].prompt is None


def test_samples_of_a_prompt_differ_and_are_reproducible(llm):
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=4, n=3, ignore_eos=True)
    (first,), (again,) = llm.generate("hello", sampling), llm.generate("hello", sampling)
    texts = [sample.text for sample in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [sample.text for sample in again.outputs]


def test_a_bad_prompt_is_named_before_anything_is_computed(llm):
    with pytest.raises(RequestError, match="prompt 1: the prompt has 300 tokens"):
        llm.generate(["fine", "x" * 300], TWENTY)
    with pytest.raises(RequestError, match="kv_precision has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], TWENTY, kv_precision=["int8"])
    with pytest.raises(RequestError, match="empty"):
        llm.generate([""], TWENTY)
    assert llm.stats().num_steps == 0


OPTIONS = {
    "model": "tiny",
    "kv_precision": "int8",
    "min_kv_precision": "int4",
    "tenant": "alice",
    "priority": -1,
    "ttft_slo_s": 60.0,
    "tpot_slo_s": 30.0,
    "drop_when_late": True,
    "deadline_s": 90.0,
    "num_speculative_tokens": 0,
}


@pytest.mark.parametrize("given_as", ["options", "keywords"])
def test_every_option_reaches_the_request_by_every_way_in(llm, monkeypatch, given_as):
    assert OPTIONS.keys() == RequestOptions.model_fields.keys()
    queued, add = [], llm.engine.scheduler.add
    monkeypatch.setattr(llm.engine.scheduler, "add", lambda request: (queued.append(request), add(request)))
    options = RequestOptions(**OPTIONS)
    fields = OPTIONS if given_as == "keywords" else {"options": options}
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    llm.generate("hello", sampling, **fields)
    "".join(llm.stream("hello", sampling, **fields))
    llm.engine.abort(llm.engine.add_request([5], sampling, options))
    assert len(queued) == 3
    for request in queued:
        assert request.options == options
        assert (request.model, request.kv_precision, request.min_kv_precision) == ("tiny", "int8", "int4")


def test_each_prompt_may_have_options_of_its_own(llm):
    late = RequestOptions(ttft_slo_s=1e-9, drop_when_late=True)
    outputs = llm.generate(["a", "b"], TWENTY, [late, RequestOptions(kv_precision="int8")])
    assert [output.outputs[0].finish_reason for output in outputs] == ["late", "length"]
    outputs = llm.generate(["a", "b"], TWENTY, ttft_slo_s=[1e-9, None], drop_when_late=[True, False])
    assert [output.outputs[0].finish_reason for output in outputs] == ["late", "length"]


@pytest.mark.parametrize("name", ["check_tokens", "check_memory", "resolve_precision"])
def test_each_check_of_a_prompt_runs_once(llm, monkeypatch, name):
    calls, check = [], getattr(prepare, name)
    monkeypatch.setattr(prepare, name, lambda *arguments: (calls.append(arguments), check(*arguments))[1])
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, n=3)
    llm.generate(["a", "b"], sampling)
    assert len(calls) == 2
    "".join(llm.stream("a", SamplingParams(max_tokens=1)))
    assert len(calls) == 3


def test_ids_that_a_caller_gives_out_are_in_nobodys_way(llm):
    engine = llm.engine
    taken = engine.add_request([5], TWENTY, request_id=f"request-{engine._num_requests + 2}")
    (output,) = llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True, n=4))
    assert len(output.outputs) == 4
    engine.abort(taken)
    engine.release(taken)
    assert engine.detokenizers == {}


def test_pieces_of_a_stream_make_up_the_text(llm):
    (whole,) = llm.generate("hello", TWENTY)
    assert "".join(llm.stream("hello", TWENTY)) == whole.outputs[0].text


def test_streams_that_overlap_lose_nothing(llm):
    expected = [output.outputs[0].text for output in llm.generate(["one", "another"], TWENTY)]
    streams = llm.stream("one", TWENTY), llm.stream("another", TWENTY)
    pieces = [next(streams[0]), next(streams[1])]
    pieces[0] += "".join(streams[0])
    pieces[1] += "".join(streams[1])
    assert pieces == expected


def test_a_stream_that_is_left_early_or_never_read_holds_nothing(llm):
    unread = llm.stream("one", TWENTY)
    stream = llm.stream("two", SamplingParams(max_tokens=120, ignore_eos=True))
    next(stream)
    assert llm.stats().num_running == 1
    stream.close()
    assert llm.stats().num_running == llm.stats().num_waiting == 0
    del unread


def test_warm_up_leaves_nothing_to_compile(llm):
    llm.warm_up(["int8", "int4"])
    before = llm.stats().num_compilations
    llm.generate(["a", "b" * 90, "c"], TWENTY, kv_precision=["int8", "bf16", "int4"])
    assert llm.stats().num_compilations == before


@given(
    text=st.text("ab", min_size=1, max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_and_none_of_it_is_ever_shown(text, stop):
    growing = IncrementalDetokenizer(TOKENIZER, SamplingParams(stop=tuple(stop)))
    shown = ""
    for character in text:
        done = growing.push(TOKENIZER.encode(character)[0])
        shown += growing.take()
        if done:
            break
    growing.finish()
    shown += growing.take()
    seen = next((text[:end] for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)), text)
    starts = [seen.find(s) for s in stop if s in seen]
    assert shown == growing.text == (seen[: min(starts)] if starts else text)
