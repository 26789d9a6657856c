"""Answers that must have a form have it, whatever happens to their requests; requests without one notice nothing."""

import dataclasses
import json
import math

import pytest
import tokenizers
from engine_cases import random_model
from schema_cases import SCHEMAS, validator
from tokenizers import decoders, models, pre_tokenizers

from fineserve_jax import DeadEndError, Engine, EngineConfig, RequestError, SamplingParams
from fineserve_jax.engine import load as load_engine
from fineserve_jax.engine.request_text import RequestText
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import LoadedModel, Tokenizer
from fineserve_jax.request.request import FinishReason, Request, RequestStatus
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.structured.matcher import TokenMatcher

SETTINGS = {
    "max_seq_len": 512,
    "max_batch_size": 8,
    "max_chunk_tokens": 64,
    "kv_memory": "32MiB",
    "kv_formats": ["bf16"],
}
EOS = 256
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"enum": ["ä", "b"]}}, "required": ["x", "y"]}
CLOSED = {**POINT, "additionalProperties": False}


def byte_tokenizer(turned: bool = False) -> Tokenizer:
    """A token for each byte and one for the end; `turned`: with other ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=turned)
    backend = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    return Tokenizer(backend, (EOS,))


def byte_model(name: str = "bytes", turned: bool = False) -> LoadedModel:
    return dataclasses.replace(random_model(name, vocab_size=260), tokenizer=byte_tokenizer(turned))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return byte_model()


def make_engine(model, **settings) -> Engine:
    return Engine(model, EngineConfig(**{**SETTINGS, **settings}))


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return make_engine(model)


def serve(engine: Engine, requests: list[Request]) -> list[str]:
    """Serves requests to the end; their texts."""
    while engine.has_unfinished:
        engine.step()
    check_integrity(engine.kv)
    texts = [engine.detokenizers[request].text for request in requests]
    for request in requests:
        engine.release(request)
    return texts


def add(engine: Engine, seed: int, model: str | None = None, **params) -> Request:
    sampling = SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 400, **params})
    return engine.add_request([1 + seed % 100, 5, 6], sampling, RequestOptions(model=model))


def ask(engine: Engine, prompts: int, **params) -> tuple[list[Request], list[str]]:
    requests = [add(engine, seed, **params) for seed in range(prompts)]
    return requests, serve(engine, requests)


# -- answers have the form that they must have ------------------------------------------------------------------


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_answers_of_a_hundred_schemas_are_valid_and_rows_without_one_are_as_ever(engine, every):
    schemas = list(SCHEMAS.values())[::every]
    free = [add(engine, seed, max_tokens=60) for seed in range(8)]
    expected = serve(engine, free)
    constrained = [add(engine, i, structured_outputs={"json": schema}) for i, schema in enumerate(schemas)]
    among = [add(engine, seed, max_tokens=60) for seed in range(8)]
    texts = serve(engine, constrained + among)
    assert texts[len(constrained) :] == expected
    ended = 0
    for request, text, schema in zip(constrained, texts, schemas, strict=False):
        if request.finish_reason is FinishReason.LENGTH:
            assert request.num_output_tokens == 400
            continue
        assert (request.finish_reason, request.error) == (FinishReason.STOP, None)
        validator(schema).validate(json.loads(text))
        ended += 1
    assert ended >= 0.9 * len(schemas)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"choice": ["yes", "no", "ünsure"]}, {"yes", "no", "ünsure"}),
        ({"regex": "[ab]{2}"}, {"aa", "ab", "ba", "bb"}),
        ({"grammar": 'start: "<" inner ">"\ninner: "a" | "b" inner?'}, None),
    ],
)
def test_other_forms_than_json(engine, fields, expected):
    requests, texts = ask(engine, 8, structured_outputs=fields)
    assert {request.finish_reason for request in requests} == {FinishReason.STOP}
    if expected is None:
        assert all(text[0] == "<" and text[-1] == ">" and set(text[1:-1]) <= {"a", "b"} for text in texts)
    else:
        assert set(texts) <= expected
    assert len(set(texts)) > 1


def test_an_answer_ends_where_nothing_may_follow_without_another_token(engine):
    (request,), (text,) = ask(engine, 1, structured_outputs={"choice": ["abc"]})
    assert (text, request.num_output_tokens, request.finish_reason) == ("abc", 3, FinishReason.STOP)


def test_what_may_go_on_ends_by_the_end_of_sequence_or_is_cut_and_said_so(engine):
    requests, texts = ask(engine, 24, structured_outputs={"regex": "[a-z]+"}, max_tokens=30)
    for request, text in zip(requests, texts, strict=True):
        ends = request.output_token_ids[-1] == EOS
        assert request.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)
        assert len(text) == request.num_output_tokens - ends
    assert {request.finish_reason for request in requests} == {FinishReason.STOP, FinishReason.LENGTH}


def test_a_complete_answer_of_just_max_tokens_is_not_called_cut(engine):
    (request,), _ = ask(engine, 1, structured_outputs={"choice": ["abc"]}, max_tokens=3)
    assert request.finish_reason is FinishReason.STOP
    (request,), _ = ask(engine, 1, structured_outputs={"choice": ["abc"]}, max_tokens=2)
    assert request.finish_reason is FinishReason.LENGTH


# -- with everything else that a request may ask ----------------------------------------------------------------


def test_samples_of_one_prompt_go_their_own_ways(engine):
    sampling = SamplingParams(temperature=1.0, seed=3, n=6, max_tokens=400, structured_outputs={"json": CLOSED})
    samples = engine.queue(engine.prepare([4, 5], sampling))
    texts = serve(engine, samples)
    assert len(set(texts)) > 3
    for text in texts:
        validator(CLOSED).validate(json.loads(text))


def test_preemption_changes_no_answer(model, engine):
    schemas = list(SCHEMAS.values())[:12]

    def answers(engine: Engine) -> list[str]:
        return serve(engine, [add(engine, i, structured_outputs={"json": schema}) for i, schema in enumerate(schemas)])

    tight = make_engine(model, kv_memory="300KB", preemption="recompute", growth_reserve_pages=0)
    found = answers(tight)
    assert tight.stats().num_preemptions > 0
    assert found == answers(engine)


def test_a_step_that_is_cut_short_changes_no_answer(engine, monkeypatch):
    """At any of the places where a token is half taken in."""
    _, expected = ask(engine, 4, structured_outputs={"json": CLOSED})
    calls, accept, take_in = 0, TokenMatcher.accept, RequestText.accept

    def sometimes(function, text):
        nonlocal calls
        calls += 1
        if calls % 37 == 0:
            raise KeyboardInterrupt
        function(text)

    monkeypatch.setattr(RequestText, "accept", lambda text: sometimes(take_in, text))
    monkeypatch.setattr(TokenMatcher, "accept", lambda self, token: sometimes(lambda it: accept(it, token), self))
    requests = [add(engine, seed, structured_outputs={"json": CLOSED}) for seed in range(4)]
    interrupts = 0
    while engine.has_unfinished:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts > 2
    assert serve(engine, requests) == expected


def test_models_have_vocabularies_of_their_own(model):
    engine = make_engine({"one": model, "other": byte_model("other", turned=True)})
    requests = [add(engine, i, name, structured_outputs={"json": CLOSED}) for i in range(4) for name in engine.models]
    for text in serve(engine, requests):
        validator(CLOSED).validate(json.loads(text))


def test_min_tokens_hold_back_the_end_but_not_for_ever(engine):
    requests, texts = ask(engine, 12, structured_outputs={"regex": "[a-z]*"}, min_tokens=20, max_tokens=40)
    assert all(20 <= len(text) <= 40 for text in texts)
    assert FinishReason.STOP in {request.finish_reason for request in requests}
    (request,), texts = ask(engine, 1, structured_outputs={"choice": ["ab"]}, min_tokens=20)
    assert (texts, request.finish_reason) == (["ab"], FinishReason.STOP)


def test_an_end_of_sequence_that_is_ignored_is_not_sampled(engine):
    requests, texts = ask(engine, 8, structured_outputs={"regex": "[a-z]*"}, ignore_eos=True, max_tokens=40)
    assert all(len(text) == 40 for text in texts)
    assert not any(EOS in request.output_token_ids for request in requests)
    (request,), texts = ask(engine, 1, structured_outputs={"choice": ["ab"]}, ignore_eos=True)
    assert (texts, request.finish_reason) == (["ab"], FinishReason.STOP)


def test_stop_strings_and_stop_tokens_end_it_before(engine):
    params = {"structured_outputs": {"regex": "[ab]{40}"}, "stop": ["ba"]}
    requests, texts = ask(engine, 8, **params)
    for request, text in zip(requests, texts, strict=True):
        assert request.finish_reason is FinishReason.STOP
        assert "ba" not in text
        assert set(text) <= {"a", "b"}
    assert sum(len(text) < 40 for text in texts) > 4
    (b,) = engine.tokenizer.encode("b")
    _, texts = ask(engine, 8, structured_outputs={"regex": "[ab]{40}"}, stop_token_ids=[b])
    assert all(set(text) <= {"a"} and len(text) < 40 for text in texts)


def test_log_probabilities_are_those_of_the_model(engine):
    (free,), _ = ask(engine, 1, logprobs=5, max_tokens=1)
    (request,), _ = ask(engine, 1, logprobs=5, structured_outputs={"choice": ["zzz"]})
    assert request.logprobs[0].top == pytest.approx(free.logprobs[0].top)
    assert len(request.logprobs) == 3
    assert all(entry.logprob < 0 for entry in request.logprobs)


def test_penalties_and_biases_weigh_only_what_is_allowed(engine):
    params = {"structured_outputs": {"regex": "[abc]{30}"}, "presence_penalty": 2.0, "repetition_penalty": 2.0}
    _, texts = ask(engine, 4, logit_bias={7: 100.0}, **params)
    assert all(set(text) <= {"a", "b", "c"} and len(text) == 30 for text in texts)


def test_an_aborted_request_leaves_the_others_alone(engine):
    _, expected = ask(engine, 4, structured_outputs={"json": CLOSED})
    requests = [add(engine, seed, structured_outputs={"json": CLOSED}) for seed in range(4)]
    others = [add(engine, 50 + seed, structured_outputs={"json": CLOSED}) for seed in range(4)]
    engine.step()
    engine.step()
    for request in others:
        engine.abort(request)
    assert serve(engine, [*requests, *others])[:4] == expected


# -- dead ends --------------------------------------------------------------------------------------------------


def test_an_answer_that_cannot_go_on_has_an_error_and_the_others_go_on(engine):
    banned = dict.fromkeys(engine.tokenizer.encode("cd"), -math.inf)
    stuck = add(engine, 1, structured_outputs={"regex": "ab[cd]"}, logit_bias=banned)
    other = add(engine, 2, structured_outputs={"choice": ["abc"]})
    assert serve(engine, [stuck, other]) == ["ab", "abc"]
    assert (stuck.finish_reason, stuck.num_output_tokens) == (FinishReason.ERROR, 2)
    assert isinstance(stuck.error, DeadEndError)
    assert "after 2 output tokens: logit_bias bans all tokens that may follow" in str(stuck.error)
    assert other.error is None


def test_an_endless_form_has_an_error(engine):
    (request,), _ = ask(engine, 1, structured_outputs={"json": {"$ref": "#"}})
    assert "no token of the model continues the text" in str(request.error)


def test_a_tokenizer_whose_tokens_depend_on_each_other_is_refused(model, engine):
    tokenizer = byte_tokenizer()
    tokenizer.backend.decoder = decoders.WordPiece()
    other = make_engine(dataclasses.replace(model, tokenizer=tokenizer))
    with pytest.raises(RequestError, match="structured_outputs need a tokenizer each of whose tokens stands for"):
        other.prepare([1], SamplingParams(structured_outputs={"regex": "a"}))
    with pytest.raises(RequestError, match="structured_outputs cannot be kept to"):
        engine.prepare([1], SamplingParams(structured_outputs={"grammar": "start: <nothing>"}))


# -- the front doors --------------------------------------------------------------------------------------------


@pytest.fixture
def llm(model, monkeypatch) -> LLM:
    monkeypatch.setattr(load_engine, "load_model", lambda *_: model)
    return LLM("bytes", **SETTINGS)


def test_a_stream_is_of_the_form_or_raises(llm):
    params = SamplingParams(temperature=1.0, seed=1, structured_outputs={"json": CLOSED}, max_tokens=400)
    validator(CLOSED).validate(json.loads("".join(llm.stream("a", params))))
    with pytest.raises(DeadEndError, match="the answer cannot go on"):
        list(llm.stream("a", SamplingParams(structured_outputs={"json": {"$ref": "#"}})))
    (output,) = llm.generate("a", SamplingParams(structured_outputs={"json": {"$ref": "#"}}))
    assert output.outputs[0].finish_reason == "error"
    assert "the answer cannot go on" in output.outputs[0].error
    assert llm.stats().num_running == 0


def test_after_a_warm_up_for_it_nothing_compiles(llm):
    llm.warm_up(structured_outputs=True)
    compiled = llm.stats().num_compilations
    sampling = SamplingParams(temperature=1.0, seed=1, structured_outputs={"json": CLOSED}, max_tokens=400)
    llm.generate(["a" * (1 + 17 * i) for i in range(12)], [sampling, SamplingParams(max_tokens=9)] * 6)
    assert llm.stats().num_compilations == compiled
    assert llm.engine.scheduler.num_running == 0


def test_a_request_without_a_form_has_no_masks(engine, monkeypatch):
    made = []
    monkeypatch.setattr("fineserve_jax.runner.token_masks.fill_bitmask", lambda *arguments: made.append(arguments))
    (request,), _ = ask(engine, 1, max_tokens=3)
    assert (request.status, made) == (RequestStatus.FINISHED, [])
