"""Models that are made for vectors of texts: `LLM.embed` makes them as their files say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedding_model import CASE, END, LAST, write_embedding_model
from engine_cases import SETTINGS
from model_oracle import FIXTURES, causal_attend

from fineserve_jax.errors import RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.loaders.pooling_settings import PoolingSettings
from fineserve_jax.models import build_model, pack_params

ERROR = 1e-4  # of hidden states of about 1, between sums in two orders
TEXT = "what is asked for"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = write_embedding_model(tmp_path_factory.mktemp("models") / "vectors", LAST, "Normalize")
    settings = SETTINGS | {"kv_formats": ("fp32",), "max_batch_size": 2}
    return LLM(str(directory), weights="fp32", kv_precision="fp32", **settings)


@pytest.fixture(scope="module")
def hidden(llm):
    """f32[tokens, hidden] of the language model that the fixture is."""
    source, tokens = HFModel(FIXTURES / CASE), llm.engine.tokenizer.encode(TEXT)
    assert tokens[-1] == END
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    params = {"params": pack_params(source.config, "fp32", source)}
    attend = causal_attend(source.config, positions)
    model = build_model(source.config, "fp32")
    return np.asarray(jax.jit(lambda: model.apply(params, jnp.asarray(tokens), positions, attend))())


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_vectors_are_what_the_files_say_unless_a_caller_says_otherwise(llm, hidden):
    def vector(**said):
        (found,) = llm.embed(TEXT, **said)
        assert found.token_ids[-1] == END
        return found.vector

    np.testing.assert_allclose(vector(), unit(hidden[-1]), atol=ERROR)
    np.testing.assert_allclose(vector(normalize=False), hidden[-1], atol=ERROR)
    np.testing.assert_allclose(vector(pooling="mean"), unit(hidden.mean(axis=0)), atol=ERROR)
    np.testing.assert_allclose(vector(pooling="mean", normalize=False), hidden.mean(axis=0), atol=ERROR)
    assert abs(np.linalg.norm(hidden[-1]) - 1) > 0.1


def test_a_mean_that_is_not_normalised_is_what_files_may_say_too(llm, hidden, monkeypatch):
    served = llm.engine.served()
    model = dataclasses.replace(served.model, pooling=PoolingSettings("mean", False))
    monkeypatch.setitem(llm.engine.models, served.name, dataclasses.replace(served, model=model))
    (found,) = llm.embed(TEXT)
    np.testing.assert_allclose(found.vector, hidden.mean(axis=0), atol=ERROR)


def test_without_a_head_nothing_is_written_or_scored(llm):
    before = llm.stats().num_steps
    for call in (
        lambda: llm.generate(TEXT),
        lambda: list(llm.stream(TEXT)),
        lambda: llm.score(TEXT, ["a"]),
        lambda: llm.engine.add_request([5]),
    ):
        with pytest.raises(RequestError, match="'vectors' has no output head: it makes vectors of texts, and can"):
            call()
    assert llm.stats().num_steps == before


def test_a_language_model_is_told_how_to_pool(make_llm):
    with pytest.raises(RequestError, match="prompt 0: 'tiny' is a language model and not made for vectors: give pool"):
        make_llm(kv_precision="fp32").embed("a")
