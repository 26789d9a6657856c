"""The engine as the rollout worker of tunix, which trains language models by reinforcement learning in JAX (the extra
`tunix`).

    llm = LLM(checkpoint, weights="fp32", kv_precision="int8")
    engine = functools.partial(FineServeRollout, llm=llm)
    ClusterConfig(rollout_engine=engine, ...)

`RLCluster` then generates with the engine, and gives it the trainer's weights after each step.
"""

from fineserve_jax.entrypoints.tunix.rollout import FineServeRollout
from fineserve_jax.entrypoints.tunix.tensors import tensors_of

__all__ = ["FineServeRollout", "tensors_of"]
