"""`fineserve-jax warm`: what it compiles is there at the next start."""

import json

import jax
import pytest

from fineserve_jax.entrypoints.cli import warm as command


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The compilation cache in a folder of its own, where even what compiles quickly is kept."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.mark.slow
def test_programs_are_compiled_into_the_cache(run, cache):
    """Of an engine with larger pages than those of other tests, whose programs are compiled already."""
    status, out, _ = run("warm", "MODEL", "--page-size", 32, "--kv-precisions", "int8")
    assert status == 0
    result = json.loads(out)
    assert result["directory"] == str(cache)
    assert result["programs"] > 0
    assert any(cache.iterdir())


def test_without_a_cache_there_is_nothing_to_do(run, monkeypatch):
    monkeypatch.setattr(command, "use_compilation_cache", lambda: None)
    status, _, err = run("warm", "MODEL")
    assert status != 0
    assert "JAX_ENABLE_COMPILATION_CACHE" in err
