"""The asynchronous front door: many tasks at once, none of which holds up another."""

import asyncio
import time

import jax
import numpy as np
import pytest
from engine_cases import SETTINGS, check_nothing_is_left

from fineserve_jax.async_llm import AsyncLLM
from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.errors import EngineError, ModelLoadError, RequestError
from fineserve_jax.models import random_params
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

FORMATS = ("bf16", "int8", "int4")
LONG = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.fixture
def make_async(make_llm):
    """As `make_llm`, whose models the loader has been replaced for."""

    def make(**settings) -> AsyncLLM:
        llm = AsyncLLM("tiny", **(SETTINGS | settings))
        llm.engine.runner.use_formats(SETTINGS["kv_formats"])
        return llm

    return make


def sampling(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=3 + i % 9, temperature=1.0, seed=i, ignore_eos=True)


async def text_of(llm, prompt, *arguments, **options) -> str:
    return "".join([piece async for piece in llm.stream(prompt, *arguments, **options)])


def test_hundreds_of_tasks_get_what_each_would_get_alone(make_async, make_llm):
    with make_llm() as alone:
        expected = [
            output.outputs[0].text
            for output in alone.generate(
                [f"task {i}" for i in range(200)],
                [sampling(i) for i in range(200)],
                kv_precision=[FORMATS[i % 3] for i in range(200)],
            )
        ]

    async def ask(llm, i):
        if i % 2:
            return await text_of(llm, f"task {i}", sampling(i), kv_precision=FORMATS[i % 3])
        (output,) = await llm.generate(f"task {i}", sampling(i), kv_precision=FORMATS[i % 3])
        return output.outputs[0].text

    async def main():
        async with make_async() as llm:
            found = await asyncio.gather(*(ask(llm, i) for i in range(200)))
            stats = await llm.stats()
        check_nothing_is_left(llm)
        return found, stats.num_steps

    found, num_steps = asyncio.run(main())
    assert found == expected
    assert num_steps < 200 * 7 / 3, "they were meant to be served together"


def test_the_event_loop_goes_on_while_a_step_is_computed(make_async, monkeypatch):
    """A step that takes 0.2 s holds nobody up for a tenth of that."""

    async def main():
        async with make_async() as llm:
            await llm.generate("warm", SamplingParams(max_tokens=2))
            schedule = llm.engine.scheduler.schedule
            monkeypatch.setattr(llm.engine.scheduler, "schedule", lambda now: (time.sleep(0.2), schedule(now))[1])
            task, ticks = asyncio.create_task(llm.generate("slow", SamplingParams(max_tokens=3, ignore_eos=True))), 0
            while not task.done():
                await asyncio.sleep(0.005)
                ticks += 1
            return ticks

    assert asyncio.run(main()) > 30  # of about 120


def test_a_task_that_is_cancelled_frees_its_memory_before_the_next_step(make_async):
    async def main():
        async with make_async() as llm:
            begun = asyncio.Event()

            async def read():
                async for _ in llm.stream("one", LONG):
                    begun.set()

            tasks = [asyncio.create_task(read()), asyncio.create_task(llm.generate(["two", "three"], LONG))]
            await begun.wait()
            steps = (await llm.stats()).num_steps
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stats = await llm.stats()
            assert all(task.cancelled() for task in tasks)
            assert stats.num_running == stats.num_waiting == 0
            assert stats.num_steps < steps + 20, "the answers were not computed to their end"
        check_nothing_is_left(llm)

    asyncio.run(main())


def test_a_stream_that_is_left_early_ends_its_request(make_async):
    async def main():
        async with make_async() as llm:
            stream = llm.stream("one", LONG)
            async for _ in stream:
                break
            await stream.aclose()
            assert (await llm.stats()).num_running == 0

    asyncio.run(main())


def test_one_llm_serves_several_event_loops_also_one_after_another(make_async):
    llm = make_async()
    first, second = (asyncio.run(text_of(llm, "hello", LONG)) for _ in range(2))
    assert first == second
    abandoned = asyncio.new_event_loop()
    task = abandoned.create_task(llm.generate("nobody waits for it", LONG))
    while not task.done() and not llm.engine.detokenizers:
        abandoned.run_until_complete(asyncio.sleep(0.001))
    task.cancel()
    abandoned.run_until_complete(asyncio.gather(task, return_exceptions=True))
    abandoned.close()
    assert asyncio.run(text_of(llm, "hello", LONG)) == first
    asyncio.run(llm.close())
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(llm.generate("a"))
    check_nothing_is_left(llm)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"stop": ["ab", "q"]}])
def test_pieces_of_several_prompts_and_samples_add_up_to_their_outputs(make_async, fields):
    """Samples that end early are told of when they end, not when the last one does."""
    prompts = ["one", "two two"]
    sampling = SamplingParams(max_tokens=40, n=3, temperature=1.0, seed=3, **fields)

    async def main():
        async with make_async() as llm:
            inbox = llm.loop.inbox()
            tickets = [
                Ticket(llm.engine.prepare(llm.tokenizer.encode(prompt), sampling), inbox, prompt, i, wants_pieces=True)
                for i, prompt in enumerate(prompts)
            ]
            pieces = [found async for listed in llm.loop.pieces(inbox, tickets) for found in listed]
            outputs = [ticket.output() for ticket in tickets]
            whole = await llm.generate(prompts, sampling)
        check_nothing_is_left(llm)
        assert [output.outputs for output in outputs] == [output.outputs for output in whole]
        for ticket, output in zip(tickets, outputs, strict=True):
            for sample in output.outputs:
                own = [piece for of, piece in pieces if of is ticket and piece.sample == sample.index]
                assert "".join(piece.text for piece in own) == sample.text
                assert [token for piece in own for token in piece.token_ids] == sample.token_ids
                if "logprobs" in fields:
                    assert [entry for piece in own for entry in piece.logprobs] == sample.logprobs
                assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
                assert own[-1].finish_reason == sample.finish_reason
                assert len(own) > len(sample.token_ids) / 4

    asyncio.run(main())


def test_nothing_is_asked_and_nothing_is_answered(make_async):
    async def main():
        async with make_async() as llm:
            assert await llm.generate([]) == []

    asyncio.run(main())


def test_scores_are_those_of_the_synchronous_front_door(make_async, make_llm):
    prompts, completions = ["The sky is ", "Water boils at "], [["blue", "green"], ["100 degrees"]]
    with make_llm() as alone:
        expected = alone.score(prompts, completions, kv_precision="int8")

    async def main():
        async with make_async() as llm:
            scores = llm.score(prompts, completions, kv_precision="int8")
            found, _ = await asyncio.gather(scores, llm.generate("meanwhile", LONG))
            with pytest.raises(RequestError, match="prompt 1, completion 0: the completion is empty"):
                await llm.score(["a", "b"], [["c"], [""]])
            long = asyncio.create_task(llm.score("a" * 100, ["b" * 20] * 50))
            while not llm.engine.detokenizers:
                await asyncio.sleep(0.001)
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            stats = await llm.stats()
            assert stats.num_running == stats.num_waiting == 0
        check_nothing_is_left(llm)
        return found

    for ours, theirs in zip(asyncio.run(main()), expected, strict=True):
        assert [score.token_ids for score in ours] == [score.token_ids for score in theirs]
        totals = [[score.total for score in scores] for scores in (ours, theirs)]
        np.testing.assert_allclose(*totals, atol=1e-3)  # other sums, and other roundings to int8


def test_new_weights_and_sleep_are_awaited_while_tasks_go_on(make_async, tiny_model):
    """What is under way is answered by the old weights, what comes meanwhile by the new ones."""
    new = random_params(tiny_model.config, "fp32", seed=8, scale=0.2)
    old = jax.tree.map(lambda leaf: leaf.copy(), tiny_model.params)

    async def main():
        async with make_async() as llm:
            before = await text_of(llm, "hello", LONG)
            under_way = llm.stream("hello", LONG)
            begun = await anext(under_way)
            update = asyncio.create_task(llm.update_params(new))
            assert begun + "".join([piece async for piece in under_way]) == before
            await update
            after = await text_of(llm, "hello", LONG)
            assert after != before
            await llm.sleep()
            with pytest.raises(EngineError, match="asleep"):
                await llm.generate("hello")
            await llm.wake_up()
            assert await text_of(llm, "hello", LONG) == after
            with pytest.raises(ModelLoadError, match="the tree lacks"):
                await llm.update_params({"norm": {}})
            await llm.update_params(old)
            assert await text_of(llm, "hello", LONG) == before

    asyncio.run(main())


def test_options_and_refusals_are_those_of_the_synchronous_front_door(make_async):
    async def main():
        async with make_async() as llm:
            late = RequestOptions(ttft_slo_s=1e-9, drop_when_late=True, priority=4)
            first, second = await llm.generate(["a", "b"], LONG, [late, RequestOptions(kv_precision="int8")])
            assert [first.outputs[0].finish_reason, second.outputs[0].finish_reason] == ["late", "length"]
            with pytest.raises(RequestError, match="prompt 1: the prompt has 300 tokens"):
                await llm.generate(["fine", "x" * 300])
            with pytest.raises(RequestError, match="no chat template"):
                await llm.chat([{"role": "user", "content": "Hi"}])
            with pytest.raises(RequestError, match="n=2"):
                await text_of(llm, "a", SamplingParams(n=2))
            assert await llm.warm_up() >= 0

    asyncio.run(main())
