"""Flax definitions of the supported model families: pure functions of a parameter pytree.

`build_model(config, weights)` gives the module, `abstract_params(config, weights)` the shapes of its
parameters, `pack_params` and `random_params` the parameters themselves.
"""

if __name__ == "models":  # imported from the repository's root: a second copy, with registries of its own
    raise ImportError("import fineserve_jax.models instead of models; the folder is a package of fineserve_jax")


from fineserve_jax.models.model_config import LayerGroup, ModelConfig
from fineserve_jax.models.params import Params, abstract_params, pack_params, random_params
from fineserve_jax.models.registry import build_model, get_family, register_family
from fineserve_jax.models.rope_scaling import RopeScaling
from fineserve_jax.models.transformer import Attend, CausalLM, block_of
from fineserve_jax.models.weight_formats import WEIGHT_RECIPES

__all__ = [
    "WEIGHT_RECIPES",
    "Attend",
    "CausalLM",
    "LayerGroup",
    "ModelConfig",
    "Params",
    "RopeScaling",
    "abstract_params",
    "block_of",
    "build_model",
    "get_family",
    "pack_params",
    "random_params",
    "register_family",
]
