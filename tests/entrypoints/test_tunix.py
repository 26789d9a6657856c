"""The engine as tunix's rollout worker: its log-probabilities are those of tunix's own models."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import write_tiny_model

pytest.importorskip("tunix", reason="google-tunix is not installed; it wants other releases of tokenizers")

from example_modules import example

from fineserve_jax import LLM, ConfigError, ModelLoadError, RequestError, load_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of tunix and what it imports
    from flax import nnx
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import common, rl_cluster
    from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig

    from fineserve_jax.entrypoints.tunix import FineServeRollout, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["The sea is", "a", "In the morning ("]
CONFIG = {"max_tokens_to_generate": 12, "max_prompt_length": 20, "temperature": 1.0, "seed": 3, "return_logprobs": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def module():
    return example("tunix_rollout")


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory, weights="fp32", kv_formats=("fp32",), kv_precision="fp32", kv_memory="8MiB", max_seq_len=64)


@pytest.fixture(scope="module")
def trainer(module, directory):
    return module.trainer_of(load_model(directory, "fp32"))


@pytest.fixture
def rollout(module, llm, trainer):
    """With the trainer's weights."""
    worker = FineServeRollout(trainer, module.Words(llm), llm=llm, tensors=module.without_biases)
    worker.update_params(nnx.state(trainer, nnx.Param))
    return worker


def trainers_logps(rollout, trainer, output, pad_to=12):
    tokens = np.full((len(output.tokens), pad_to), rollout.pad_id(), np.int32)
    for row, own in zip(tokens, output.tokens, strict=True):
        row[: len(own)] = own
    graph, state = nnx.split(trainer)
    ends = {"pad_id": rollout.pad_id(), "eos_id": rollout.eos_id()}
    return tokens, common.compute_per_token_logps(graph, state, output.left_padded_prompt_tokens, tokens, **ends)


def test_log_probabilities_are_the_trainers(rollout, trainer):
    output = rollout.generate(PROMPTS, RolloutConfig(**CONFIG))
    tokens, expected = trainers_logps(rollout, trainer, output)
    for own, logprobs, row in zip(output.tokens, output.logprobs, np.asarray(expected), strict=True):
        assert len(own) == len(logprobs)
        np.testing.assert_allclose(logprobs, row[: len(own)], atol=1e-4)
    found = np.asarray(rollout.get_per_token_logps(jnp.asarray(output.left_padded_prompt_tokens), jnp.asarray(tokens)))
    for own, one, row in zip(output.tokens, found, np.asarray(expected), strict=True):
        np.testing.assert_allclose(one[: len(own)], row[: len(own)], atol=1e-4)
        assert not one[len(own) :].any()


def test_new_weights_are_those_that_generate(rollout, module, directory):
    before = rollout.generate(PROMPTS, RolloutConfig(**CONFIG))
    other = module.trainer_of(load_model(directory, "fp32"))
    state = nnx.state(other, nnx.Param)
    moved = jax.tree.map(lambda leaf: leaf * 1.3, state)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, old, new: old if "_bias" in jax.tree_util.keystr(path) else new, state, moved
    )
    nnx.update(other, moved)
    rollout.update_params(moved, (nnx.Param,))
    output = rollout.generate(PROMPTS, RolloutConfig(**CONFIG))
    _, expected = trainers_logps(rollout, other, output)
    for own, logprobs, row in zip(output.tokens, output.logprobs, np.asarray(expected), strict=True):
        np.testing.assert_allclose(logprobs, row[: len(own)], atol=1e-3)
    assert [one.tolist() for one in output.tokens] != [one.tolist() for one in before.tokens]


def test_what_is_generated_is_in_tunix_form(rollout, llm):
    output = rollout.generate(PROMPTS, RolloutConfig(**CONFIG))
    assert isinstance(rollout, BaseRollout)
    assert output.left_padded_prompt_tokens.shape == (3, 20)
    for prompt, row in zip(PROMPTS, output.left_padded_prompt_tokens, strict=True):
        tokens = llm.tokenizer.encode(prompt)
        assert row[20 - len(tokens) :].tolist() == tokens
        assert set(row[: 20 - len(tokens)]) <= {rollout.pad_id()}
    again = rollout.generate(PROMPTS, RolloutConfig(**CONFIG | {"return_logprobs": False}))
    assert [one.tolist() for one in again.tokens] == [one.tolist() for one in output.tokens]  # of one seed
    assert again.logprobs is None
    assert output.text == [llm.tokenizer.decode(one.tolist()) for one in output.tokens]


def test_eos_tokens_end_completions_and_are_in_them(rollout):
    config = RolloutConfig(**CONFIG | {"eos_tokens": list(range(96))})
    assert [len(own) for own in rollout.generate(PROMPTS, config).tokens] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        ({"max_prompt_length": 5}, RequestError, "a prompt has 16 tokens, and max_prompt_length=5"),
        ({"tensor_parallel_size": 2}, ConfigError, "tensor_parallel_size=2; say so when the LLM is made"),
        ({"data_type": jnp.bfloat16}, ConfigError, "data_type="),
        ({"temperature": -1.0}, RequestError, "temperature=-1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(rollout, fields, error, reason):
    with pytest.raises(error, match=reason):
        rollout.generate(PROMPTS, RolloutConfig(**CONFIG | fields))


@pytest.mark.parametrize(
    ("family", "make", "of_family"),
    [
        (llama3, llama3.Llama3, "self_attn.v_proj.weight"),
        (qwen2, qwen2.Qwen2, "self_attn.k_proj.bias"),
        (qwen3, qwen3.Qwen3, "self_attn.q_norm.weight"),
    ],
    ids=["llama3", "qwen2", "qwen3"],
)
def test_the_parameters_of_tunix_models_have_the_names_of_checkpoints(family, make, of_family):
    sizes = {"num_layers": 2, "vocab_size": 96, "embed_dim": 64, "hidden_dim": 48, "num_heads": 4, "num_kv_heads": 2}
    config = family.ModelConfig(**sizes, head_dim=16, rope_theta=10000, norm_eps=1e-6)
    shapes = {
        name: array.shape for name, array in tensors_of(nnx.state(make(config, rngs=nnx.Rngs(0)), nnx.Param)).items()
    }
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (96, 64)
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (64, 64)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 48)
    assert f"model.layers.0.{of_family}" in shapes


def test_parameters_of_other_models_are_refused():
    with pytest.raises(ModelLoadError, match=r"'layers.0.attn.q_proj.w_lora_a' is none of tunix's"):
        tensors_of({"layers": {0: {"attn": {"q_proj": {"w_lora_a": np.zeros(3)}}}}})


@pytest.mark.slow
def test_the_example_runs(module, directory, capsys):
    module.main(directory, steps=2, max_tokens=8)
    assert capsys.readouterr().out.count("KL") == 2 * len(module.FORMATS)


def test_a_cluster_takes_it_as_its_engine(module, llm, trainer):
    """`RLCluster` makes the worker, generates with it, and gives it the trainer's weights."""
    import optax

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=trainer,
        tokenizer=module.Words(llm),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=functools.partial(FineServeRollout, llm=llm, tensors=module.without_biases),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.sgd(1e-3), eval_every_n_steps=1, max_steps=1
            ),
            rollout_config=RolloutConfig(**CONFIG),
        ),
    )
    cluster.sync_weights()
    output = cluster.generate(PROMPTS)
    _, expected = trainers_logps(cluster.rollout, trainer, output)
    for own, logprobs, row in zip(output.tokens, output.logprobs, np.asarray(expected), strict=True):
        np.testing.assert_allclose(logprobs, row[: len(own)], atol=1e-4)
