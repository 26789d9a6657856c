"""What the books of the KV cache cost on the host: time by page, bytes by page, and the audit of all of it.

    python benchmarks/kv_books.py

Nothing here touches a device. Times are sums over calls, of each call's best of several rounds, so that other work on
the machine counts little.
"""

import argparse
import json
import resource
import time
import timeit
import tracemalloc
from collections.abc import Callable

import numpy as np

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_size import choose_slab_units
from fineserve_jax.request.request import Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams

PAGE_SIZE = 16
UNIT_BYTES = 256
# Units of SmolLM2-135M's pages of 16 tokens.
UNITS = {"bf16": 1440, "int8": 750, "int4": 420}
TIMED_PAGES = 10_000
MANY_PAGES = 10_000_000
REQUESTS, PAGES_A_REQUEST = 256, 100
SAMPLING = SamplingParams()


def new_manager(num_pages: int, prefix_cache: str = "off", units: dict[str, int] = UNITS) -> KVManager:
    """A manager whose arena holds `num_pages` pages of the longest class, and a few slabs more."""
    classes = {
        ("m", name): PageClass("m", name, length, PAGE_SIZE, length * UNIT_BYTES) for name, length in units.items()
    }
    slab_units = choose_slab_units(units.values(), 1000 * max(units.values()))
    num_slabs = num_pages // (slab_units // max(units.values())) + 8
    allocator = SlabAllocator(num_slabs * slab_units, slab_units, unit_bytes=UNIT_BYTES)
    return KVManager(allocator, classes, prefix_cache=prefix_cache)


def new_request(kv_precision: str, num_pages: int, first_token: int = 0) -> Request:
    tokens = [first_token] * (num_pages * PAGE_SIZE)
    return Request("r", "m", kv_precision, SAMPLING, tokens, len(tokens), len(tokens), 0, RequestTimes(arrival_s=0.0))


def seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def time_pages(prefix_cache: str, num_requests: int, rounds: int) -> float:
    """Milliseconds to allocate and free 10,000 pages, shared out between so many requests of three formats."""
    kv = new_manager(TIMED_PAGES, prefix_cache)
    names = list(UNITS)
    requests = [new_request(names[i % 3], TIMED_PAGES // num_requests, i) for i in range(num_requests)]

    best = np.full((2, num_requests), np.inf)
    for _ in range(rounds):
        for i, request in enumerate(requests):
            best[0, i] = min(best[0, i], seconds(kv.grow, request, request.num_tokens))
            assert kv.holds(request).num_pages == request.num_tokens // PAGE_SIZE
        for i, request in enumerate(requests):
            best[1, i] = min(best[1, i], seconds(kv.release, request))
            request.num_computed_tokens = 0
    check_integrity(kv)
    return 1000 * float(best.sum())


def time_checks(rounds: int) -> tuple[float, float]:
    """Milliseconds of the integrity check, in full and as for every step, with 256 requests of 100 pages, all of them
    kept in the prefix cache."""
    kv = new_manager(REQUESTS * PAGES_A_REQUEST, "exact")
    names = list(UNITS)
    for i in range(REQUESTS):
        request = new_request(names[i % 3], PAGES_A_REQUEST, i)
        assert kv.grow(request, request.num_tokens)
        request.num_computed_tokens = request.num_tokens - 1
        kv.note_computed(request)
    checks = lambda: check_integrity(kv), lambda: check_integrity(kv, thorough=False)
    full, quick = (1000 * min(timeit.repeat(check, number=1, repeat=rounds)) for check in checks)
    return full, quick


def bytes_of_many(num_pages: int) -> tuple[int, int]:
    """Bytes of the books of so many pages in use: of what is left allocated, and at the most while they grew."""
    tokens = [0] * (num_pages // 100 * PAGE_SIZE)
    tracemalloc.start()
    kv = new_manager(num_pages, units={"int4": 8, "int8": 15, "bf16": 28})
    for i in range(100):
        times = RequestTimes(arrival_s=0.0)
        request = Request("r", "m", "int4", SAMPLING, tokens, len(tokens), len(tokens), i, times, shares_prefix=False)
        assert kv.grow(request, len(tokens))
    assert sum(kv.holds(request).num_pages for request in kv.requests) == num_pages
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return now, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each timing, the best of which counts")
    parser.add_argument("--pages", type=int, default=MANY_PAGES, help="pages in use while memory is measured")
    options = parser.parse_args()
    result: dict[str, float] = {}
    for prefix_cache in ("off", "exact"):
        for num_requests in (1, 100):
            name = f"allocate_and_free_ms prefix_cache={prefix_cache} requests={num_requests}"
            result[name] = round(time_pages(prefix_cache, num_requests, options.rounds), 3)
    full, quick = time_checks(options.rounds)
    result["check_integrity_ms"], result["check_integrity_every_step_ms"] = round(full, 3), round(quick, 3)
    now, peak = bytes_of_many(options.pages)
    result["bytes"], result["peak_bytes"] = now, peak
    result["rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    for name, value in result.items():
        print(f"{name:60} {value:>16,}")
    print(json.dumps({"benchmark": "kv_books", "pages": options.pages, **result}))


if __name__ == "__main__":
    main()
