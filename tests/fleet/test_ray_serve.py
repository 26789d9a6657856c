"""A plan on a real Ray cluster, of one machine: what the server says is what it says without, whatever dies."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from serving import eventually, serving

from fineserve_jax import AsyncLLM, ConfigError
from fineserve_jax.fleet.remote.ray_serve import RayServeOptions, serve_plan

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
# Which requests are computed together is up to time here, and must not be seen in the tokens.
ALIKE = {"settings": {"reproducible": True}}
REPLICAS = [{"devices": [0], "models": ["a", "b"]} | ALIKE, {"devices": [0], "models": ["a"]} | ALIKE]
OPTIONS = RayServeOptions(ray_cpus=0.5, ray_gpus=0, ray_health_s=1.0)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fineserve-jax[ray-serve]'")
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'fineserve-jax[ray-serve]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE.parents[1]))
        ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_a_plan_that_the_cluster_has_no_room_for_is_refused(ray, make_plan):
    with pytest.raises(ConfigError, match="take 2 GPUs, and the cluster has 0"):
        serve_plan(make_plan(REPLICAS, a={}, b={}), RayServeOptions(ray_gpus=1))
    with pytest.raises(ConfigError, match="take 6 CPUs, and the cluster has 2"):
        serve_plan(make_plan(REPLICAS, a={}, b={}), RayServeOptions(ray_cpus=3))


def test_an_engine_that_cannot_be_made_is_told_of(ray, make_plan):
    with pytest.raises(ConfigError, match=r"engine-0.*/no/such/model"):
        serve_plan(make_plan(REPLICAS[:1], a={"model": "/no/such/model"}, b={}), OPTIONS)


def test_the_server_answers_while_engines_die_and_are_replaced(ray, make_plan):
    plan = make_plan(REPLICAS, a={}, b={"kv_precision": "int8"})
    prompts = [f"prompt {i}" for i in range(8)]
    fleet = serve_plan(plan, OPTIONS)
    try:
        loops: dict[str, Any] = {name: replica.loop for name, replica in fleet.replicas.items()}
        with serving(AsyncLLM(plan=fleet)) as server:
            client, fields = server.client, {"ignore_eos": True}

            def ask(prompt: str) -> str:
                answer = client.completions.create(
                    model="a", prompt=prompt, max_tokens=100, temperature=0, extra_body=fields
                )
                return answer.choices[0].text

            expected = [ask(prompt) for prompt in prompts]
            found: dict[str, str] = {}
            asking = [
                threading.Thread(target=lambda prompt=prompt: found.update({prompt: ask(prompt)})) for prompt in prompts
            ]
            (process,) = loops["engine-1"].each(lambda engine: os.getpid())
            assert process not in (os.getpid(), *loops["engine-0"].each(lambda engine: os.getpid()))
            for thread in asking:
                thread.start()
            eventually(lambda: fleet.replicas["engine-1"].tickets())
            os.kill(process, signal.SIGKILL)
            for thread in asking:
                thread.join()
            assert [found[prompt] for prompt in prompts] == expected
            eventually(lambda: not loops["engine-1"].is_up)
            assert ask(prompts[0]) == expected[0]
            assert server.ask("/health")[0] == 200
            eventually(lambda: loops["engine-1"].is_up)
            (replacement,) = loops["engine-1"].each(lambda engine: os.getpid())
            assert replacement != process
            stream = client.completions.create(
                model="b", prompt="x", max_tokens=20, temperature=0, stream=True, extra_body=fields
            )
            assert sum(len(chunk.choices[0].text) for chunk in stream if chunk.choices)
            assert b"kv_cache" in server.ask("/metrics")[2]
    finally:
        fleet.close()
