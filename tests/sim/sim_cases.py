"""A small world to simulate: one 8B model on an H100 with little KV memory."""

from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.sim import DEVICES, SYSTEMS, Cluster, Kind, Simulator, assign, build, draw, parse_model, prepare

MODEL = parse_model("llama-3.1-8b")
FORMATS = ("bf16", "int8", "int4")
TARGETS = {"ttft_slo_s": 1.0, "tpot_slo_s": 0.05}


def options(kv_precision, model=MODEL, **others):
    return RequestOptions(model=model.name, kv_precision=kv_precision, **others)


MIX = [Kind(1.0, options(name, **TARGETS)) for name in FORMATS]


def workload(rate=8.0, seconds=20.0, seed=0, mix=MIX):
    return assign(draw(rate, seconds, seed), mix, seed)


def cluster(kv_bytes=8e9, models=(MODEL,), formats=FORMATS):
    return Cluster(DEVICES["h100"], tuple(models), {model.name: formats for model in models}, kv_bytes)


def simulate(arrivals, system="fineserve", where=None, timers=None, settings=(), **arguments):
    """Runs a system; the run and its KV manager."""
    scheduler, kv, timers = build(SYSTEMS[system], where or cluster(), timers, **dict(settings))
    run = Simulator(scheduler, kv, timers, **arguments).run(prepare(SYSTEMS[system], arrivals))
    return run, kv
