"""Logits processors: what they do to the rows that name them, and that nobody else notices."""

import itertools
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import CHARACTERS, serve
from example_modules import example

from fineserve_jax import LogitsProcessor, NonFiniteError, RequestError, RequestOptions, SamplingParams
from fineserve_jax.engine.resuming import SampleSoFar
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request import logits_processor
from fineserve_jax.request.logits_processor import register
from fineserve_jax.request.request import FinishReason

PROMPTS = [[1 + i, 5, 6, 7 + i] for i in range(8)]
OPTIONS = {"max_tokens": 40, "ignore_eos": True}


class Frequency(LogitsProcessor):
    """What `frequency_penalty` does, told by its definition: the oracle is the sampler's own."""

    name = "frequency"

    def start(self, prompt, vocab_size, penalty=1.0):
        if not isinstance(penalty, int | float):
            raise ValueError(f"penalty={penalty!r} is no number")
        return {"counts": np.zeros(vocab_size, np.float32), "penalty": float(penalty)}

    def update(self, state, token):
        return state | {"counts": state["counts"].at[token].add(1)}

    def apply(self, state, logits):
        return logits - state["penalty"] * state["counts"]


class Only(LogitsProcessor):
    """Puts the token `allowed` above all others; of several such, the last one named decides."""

    def __init__(self, name):
        self.name = name

    def start(self, prompt, vocab_size, allowed):
        return np.int32(allowed)

    def apply(self, state, logits):
        return jnp.where(jnp.arange(len(logits)) == state, 5.0, 0.0)


class Custom(LogitsProcessor):
    def __init__(self, name, start=lambda: (), update=lambda state, token: state, apply=lambda state, logits: logits):
        self.name, self._start = name, start
        self.update, self.apply = update, apply

    def start(self, prompt, vocab_size, **arguments):
        return self._start(**arguments)


@pytest.fixture(scope="module", autouse=True)
def _processors():
    before = dict(logits_processor.PROCESSORS)
    for processor in (Frequency(), Only("only"), Only("b_only")):
        register(processor)
    yield
    logits_processor.PROCESSORS.clear()
    logits_processor.PROCESSORS.update(before)


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture
def custom(monkeypatch):
    """Registers a processor for one test."""
    monkeypatch.setattr(logits_processor, "PROCESSORS", dict(logits_processor.PROCESSORS))
    return lambda name, **functions: register(Custom(name, **functions))


def run(engine, params, formats=("bf16",), each_step=lambda: None):
    """Serves a prompt with each of these parameters, as many in a batch as there are; their output tokens."""
    requests = [
        engine.add_request(PROMPTS[i % 8], own, RequestOptions(kv_precision=formats[i % len(formats)]))
        for i, own in enumerate(params)
    ]
    while engine.has_unfinished:
        engine.step()
        each_step()
        check_integrity(engine.kv)
    return [request.output_token_ids for request in requests]


def pairs_of_params(count):
    """What the sampler does itself, and what a processor does in its place: greedy and random, of many penalties."""
    for i in range(count):
        other = {"temperature": 0.8 * (i % 2), "seed": i, **OPTIONS}
        penalty = 0.25 * (1 + i % 5)
        yield (
            SamplingParams(frequency_penalty=penalty, **other),
            SamplingParams(logits_processors={"frequency": {"penalty": penalty}}, **other),
        )


def test_a_stateful_processor_does_what_the_samplers_own_penalty_does(engine):
    own, processed = zip(*pairs_of_params(8), strict=True)
    expected = run(engine, own, ["bf16", "int8"])
    assert run(engine, processed, ["bf16", "int8"]) == expected
    without = run(engine, [SamplingParams(**OPTIONS)] * 8, ["bf16", "int8"])
    assert all(a != b for a, b in zip(expected, without, strict=True))


def test_rows_that_name_none_are_as_ever_beside_rows_that_do(engine):
    own, processed = zip(*pairs_of_params(8), strict=True)
    plain = [SamplingParams(seed=i, temperature=0.8, **OPTIONS) for i in range(8)]
    expected, alone = run(engine, own), run(engine, plain)
    mixed = run(engine, [processed[i] if i % 2 else plain[i] for i in range(8)])
    assert mixed == [expected[i] if i % 2 else alone[i] for i in range(8)]


def test_states_outlive_preemption_and_steps_that_fail(make_engine, monkeypatch):
    """Under pressure requests lose their memory, and others take their states' places; a call that is cut short
    forgets all of them."""
    own, processed = zip(*pairs_of_params(14), strict=True)
    engine = make_engine(kv_memory="256KiB", max_batch_size=4, swap_memory=0, async_scheduling=True)
    expected = run(engine, own)
    head, steps = engine.runner.logits_processing.call_head, []

    def fails_at_times(*arguments):
        steps.append(arguments)
        result = head(*arguments)
        if len(steps) % 40 == 0:
            raise RuntimeError("no more memory")
        return result

    monkeypatch.setattr(engine.runner.logits_processing, "call_head", fails_at_times)
    requests = [engine.add_request(PROMPTS[i % 8], params) for i, params in enumerate(processed)]
    failures = 0
    while engine.has_unfinished:
        try:
            engine.step()
        except RuntimeError:
            failures += 1
    assert [request.output_token_ids for request in requests] == expected
    assert failures
    assert sum(request.num_preemptions for request in requests)


def test_a_sample_that_goes_on_in_another_process_has_the_state_of_its_tokens(engine):
    ((own, processed),) = pairs_of_params(1)
    (expected,) = run(engine, [own])
    prepared = engine.prepare(PROMPTS[0], processed, RequestOptions(kv_precision="bf16"))
    (request,) = engine.queue(prepared, [SampleSoFar(expected[:17])])
    while engine.has_unfinished:
        engine.step()
    assert request.output_token_ids == expected


def test_the_example_keeps_pairs_from_coming_twice(engine, monkeypatch):
    monkeypatch.setattr(logits_processor, "PROCESSORS", dict(logits_processor.PROCESSORS))
    module = example("add_logits_processor")
    register(module.NoRepeatedPairs())

    def repeated(penalty):
        """How often a pair stands among the pairs of the newest 64 tokens before it."""
        asked = {"no_repeated_pairs": {"penalty": penalty}}
        outputs = run(engine, [SamplingParams(logits_processors=asked, max_tokens=90, ignore_eos=True)] * 4)
        texts = [PROMPTS[i] + output for i, output in enumerate(outputs)]
        pairs = [list(itertools.pairwise(text)) for text in texts]
        return sum(own[i] in own[max(i - module.WINDOW + 1, 0) : i] for own in pairs for i in range(3, len(own)))

    assert repeated(0.0) > 20
    assert repeated(np.inf) == 0
    with pytest.raises(RequestError, match="penalty=-1 rewards what it should prevent"):
        engine.prepare([1], SamplingParams(logits_processors={"no_repeated_pairs": {"penalty": -1}}))


@pytest.mark.parametrize("named", [("only", "b_only"), ("b_only", "only")])
def test_processors_are_applied_in_the_order_in_which_a_request_names_them(engine, named):
    table = {name: {"allowed": 10 + place} for place, name in enumerate(named)}
    params = SamplingParams(max_tokens=2, logits_processors=table)
    assert run(engine, [params, SamplingParams(max_tokens=2, logits_processors={"only": {"allowed": 3}})]) == [
        [11, 11],
        [3, 3],
    ]


def test_what_the_sampler_excludes_stays_excluded_and_logprobs_are_the_models(engine):
    plain = SamplingParams(max_tokens=1, logprobs=3)
    (first,) = serve(engine, PROMPTS[:1], ["bf16"], plain)
    table = {"only": {"allowed": CHARACTERS.index("b")}}
    asked = SamplingParams(
        max_tokens=1, logprobs=3, structured_outputs={"regex": "[bc]"}, logit_bias={CHARACTERS.index("b"): -np.inf},
        logits_processors=table,
    )  # fmt: skip
    (request,) = serve(engine, PROMPTS[:1], ["bf16"], asked)
    assert request.output_token_ids == [CHARACTERS.index("c")]
    assert request.logprobs[0].top == first.logprobs[0].top


def test_other_arguments_and_rows_without_processors_compile_nothing(engine, caplog):
    def rows(penalty):
        return [SamplingParams(logits_processors={"frequency": {"penalty": penalty}}, **OPTIONS)] * 7

    run(engine, [*rows(0.5), SamplingParams(**OPTIONS)])
    run(engine, [SamplingParams(**OPTIONS)] * 8)
    with caplog.at_level(logging.INFO, "fineserve_jax"):
        run(engine, [*rows(3), SamplingParams(**OPTIONS)])
        run(engine, [SamplingParams(**OPTIONS)] * 8)
    assert not [message for message in caplog.messages if "compiled" in message]


@pytest.mark.slow
def test_after_a_warm_up_only_requests_that_name_one_have_something_compiled(make_engine):
    engine = make_engine(kv_formats=("bf16",), max_batch_size=2, max_chunk_tokens=32)
    engine.warm_up()
    before = engine.stats().num_compilations
    run(engine, [SamplingParams(temperature=0.5, **OPTIONS)] * 2)
    assert engine.stats().num_compilations == before
    run(engine, [SamplingParams(logits_processors=["frequency"], **OPTIONS)] * 2)
    with_processor = engine.stats().num_compilations
    assert with_processor > before
    run(engine, [SamplingParams(temperature=0.5, **OPTIONS)] * 2)
    assert engine.stats().num_compilations == with_processor


# -- what is refused ----------------------------------------------------------------------------------------------


def test_names_that_nothing_bears_are_refused_with_those_there_are():
    with pytest.raises(RequestError, match=r"unknown logits processor 'louder'; known: b_only, frequency, only;"):
        SamplingParams(logits_processors=("frequency", "louder"))


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (["frequency", "frequency"], "can be named once"),
        (7, "give names of logits processors, or a table"),
        ({"frequency": 3}, "valid dictionary"),
        ([f"p{i}" for i in range(9)], "at most 8"),
    ],
)
def test_what_is_no_list_of_names_and_no_table_is_refused(named, reason):
    with pytest.raises(RequestError, match=reason):
        SamplingParams(logits_processors=named)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"penalty": "much"}, r"'frequency' refuses {'penalty': 'much'}: ValueError: penalty='much' is no number"),
        ({"strength": 1}, r"unexpected keyword argument 'strength'"),
    ],
)
def test_arguments_that_a_processor_refuses_refuse_the_request(engine, arguments, reason):
    with pytest.raises(RequestError, match=reason):
        engine.prepare([1], SamplingParams(logits_processors={"frequency": arguments}))


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        (
            {"apply": lambda state, logits: logits[:5]},
            r"apply\(\) of .* gives float32\[2, 5\] for 2 rows; it must give",
        ),
        ({"apply": lambda state, logits: logits if logits[0] > 0 else -logits}, r"apply\(\) of .* cannot be compiled"),
        (
            {"start": lambda: 1, "update": lambda state, token: 1.5},
            r"update\(\) of .* gives float32\[2\] .* int32\[2\]",
        ),
    ],
    ids=["shape", "branch", "dtype"],
)
def test_functions_that_do_not_fit_a_step_refuse_the_request(engine, custom, functions, reason):
    custom("bad", **functions)
    with pytest.raises(RequestError, match=reason):
        engine.prepare([1], SamplingParams(logits_processors=["bad"]))


def test_states_of_all_requests_have_one_shape(engine, custom):
    custom("wide", start=lambda width=2: np.zeros(width))
    engine.prepare([1], SamplingParams(logits_processors=["wide"]))
    with pytest.raises(RequestError, match=r"starts with float32\[3\], and did with float32\[2\] for an earlier"):
        engine.prepare([1], SamplingParams(logits_processors={"wide": {"width": 3}}))


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_row_whose_processor_leaves_no_numbers_ends_and_costs_no_other(engine, custom, value):
    custom("spoils", apply=lambda state, logits: jnp.full_like(logits, value))
    spoilt = engine.add_request(PROMPTS[0], SamplingParams(logits_processors=["spoils"], **OPTIONS))
    good = engine.add_request(PROMPTS[1], SamplingParams(**OPTIONS))
    while engine.has_unfinished:
        engine.step()
    assert spoilt.finish_reason is FinishReason.ERROR
    assert isinstance(spoilt.error, NonFiniteError)
    assert "logits_processors=['spoils']" in str(spoilt.error)
    assert good.finish_reason is FinishReason.LENGTH


def test_a_reproducible_engine_refuses_them(make_engine):
    engine = make_engine(reproducible=True, kv_formats=("bf16",))
    with pytest.raises(RequestError, match="the engine is reproducible; leave them out"):
        engine.prepare([1], SamplingParams(logits_processors=["frequency"]))


def test_another_processor_of_the_same_name_is_refused():
    with pytest.raises(ValueError, match="'frequency' is registered already"):
        register(Frequency())
    with pytest.raises(ValueError, match="no LogitsProcessor with a name"):
        register(Frequency)
