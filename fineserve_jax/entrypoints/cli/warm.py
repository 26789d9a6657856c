"""`fineserve-jax warm`: the programs of a deployment, compiled before anybody asks for anything."""

import json
import time
from typing import Annotated

import tyro

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.load import load_from
from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import ConfigFlag, EngineFlags, ModelFlags, settle
from fineserve_jax.errors import ConfigError


def warm(
    *,
    kv_precisions: Annotated[tuple[str, ...], tyro.conf.arg(name="kv-precisions")] = (),
    with_structured_outputs: Annotated[Switch, tyro.conf.arg(help_behavior_hint="")] = False,
    with_prompt_logprobs: Annotated[Switch, tyro.conf.arg(help_behavior_hint="")] = False,
    model: ModelFlags = (),
    config: ConfigFlag = None,
    engine: EngineFlags,
) -> None:
    """Compile all that serving can need into the compilation cache, so that the next start with the same settings, on
    such a machine, loads it instead.

    Programs depend on the models, the sizes and the memory: give the same options, or the same file, as to `serve` or
    `batch`. One line of JSON says how many there were and where they are kept.

    Args:
        kv_precisions: KV precisions that requests will name, besides the engine's own kv_precision.
        with_structured_outputs: also what requests with structured outputs need.
        with_prompt_logprobs: also what requests for the prompt's log-probabilities need.
        model: alias, .gguf file, Hugging Face directory or converted directory; several as NAME=MODEL.
        config: YAML file with `model` or `models` and defaults for the options below.
    """
    settings = settle(config, model, engine)
    directory = use_compilation_cache()
    if directory is None:
        raise ConfigError("JAX_ENABLE_COMPILATION_CACHE=false: there is no cache to compile into; leave it out")
    begun = time.perf_counter()
    served = load_from(settings.model or None, settings.models or None, settings.engine)
    num_programs = served.warm_up(
        kv_precisions,
        settings.config().min_kv_precision,
        structured_outputs=with_structured_outputs,
        prompt_logprobs=with_prompt_logprobs,
    )
    print(json.dumps({"programs": num_programs, "seconds": time.perf_counter() - begun, "directory": str(directory)}))
