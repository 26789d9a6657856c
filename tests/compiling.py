"""The tests that make JAX compile, and `pytest --fast`, which leaves them out.

Compiling takes nearly all of the tests' time. A test file that is not listed here tests the host's side alone: a test
in it that compiles something fails, whether `--fast` is given or not.

Compiled programs are kept in pytest's cache, for all processes of a run and for the next run; `pytest --cache-clear`
forgets them.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
COMPILING = (
    "batch/test_batch_job.py",
    "batch/test_batch_models.py",
    "batch/test_check.py",
    "batch/test_echo.py",
    "batch/test_half_done.py",
    "batch/test_ray_job.py",
    "batch/test_reproducible_jobs.py",
    "benchmarks/test_aot_mesh.py",  # traces steps of large models
    "benchmarks/test_aot_parsers.py",
    "benchmarks/test_aot_step_cases.py",
    "benchmarks/test_aot_workers.py",  # compiles nothing, but starts processes that import jax
    "benchmarks/test_server_benchmarks.py",
    "cli/test_bench.py",
    "cli/test_commands.py",
    "cli/test_model_commands.py",
    "cli/test_perplexity.py",
    "cli/test_quality.py",
    "cli/test_real_batch.py",
    "cli/test_slabs.py",
    "cli/test_streams.py",  # starts such processes, too
    "cli/test_warm.py",
    "engine",
    "entrypoints",
    "fleet",
    "loaders/test_all_is_used.py",
    "loaders/test_gguf_model.py",
    "loaders/test_gguf_split.py",
    "loaders/test_load_model.py",
    "loaders/test_loading_memory.py",
    "loaders/test_quantized_checkpoints.py",
    "loaders/test_smollm2.py",
    "models",
    "pallas_kernels",
    "runner",
    "server/test_admin.py",
    "server/test_completions.py",
    "server/test_fuzzed_requests.py",
    "server/test_page.py",
    "server/test_stress.py",
    "server/test_tool_calls.py",
    "test_readme.py",
    "test_shapes.py",
)
COMPILATION = "/jax/core/compile/backend_compile_duration"

num_compilations = 0


def is_listed(path: Path) -> bool:
    """Whether a test file, or a folder, is among those that compile."""
    return any(path.is_relative_to(TESTS / listed) for listed in COMPILING)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the tests that make JAX compile")


def pytest_configure(config: pytest.Config) -> None:
    """Where JAX keeps programs, unless the caller has said so: read when JAX is imported, here or by a child."""
    if config.cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("xla")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--fast") and is_listed(collection_path) else None


@pytest.fixture(scope="session", autouse=True)
def _compilations_are_counted() -> None:
    """Counts from now on; a host that never imports jax is not made to."""
    if "jax" in sys.modules:
        sys.modules["jax"].monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(autouse=True)
def _host_tests_compile_nothing(request: pytest.FixtureRequest):
    before = num_compilations
    yield
    compiled = num_compilations - before
    if compiled and not is_listed(request.path):
        pytest.fail(
            f"{request.path.relative_to(TESTS)} compiled {compiled} programs, which host tests do not; "
            "compute with numpy, or move the test to a file that is listed in tests/compiling.py"
        )


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs that are compiled in half the time, for tests of what the engine does rather than of its numbers."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def _count(event: str, duration: float, **_: object) -> None:
    global num_compilations
    num_compilations += event == COMPILATION
