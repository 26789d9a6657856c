"""How a directory of the package sentence-transformers makes vectors of texts; what is not computed here is refused.

modules.json                        the modules, in order: Transformer, Pooling, perhaps Normalize
1_Pooling/config.json               which hidden states a vector is made of
sentence_bert_config.json           how texts are prepared
config_sentence_transformers.json   prompts to put in front of texts, which is left to the caller
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.json_file import read_json, read_json_list
from fineserve_jax.loaders.known_keys import shown
from fineserve_jax.loaders.pooling_settings import Pooling, PoolingSettings

log = logging.getLogger(__name__)

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
_SERVED = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_POOLINGS: dict[str, Pooling] = {"mean": "mean", "lasttoken": "last"}
_FLAG = "pooling_mode_"
# What flags call the modes that the newer `pooling_mode` calls otherwise.
_MODE_OF_FLAG = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "weightedmean_tokens": "weightedmean"}
_SIZES = ("word_embedding_dimension", "embedding_dimension")  # the hidden size, which config.json says, too
_REMEDY = "use a model of mean or last-token pooling, or sentence-transformers itself"


def pooling_settings(directory: Path) -> PoolingSettings | None:
    """What the files say, with a head assumed; None for a directory without such files.

    Raises ModelLoadError for files that are malformed, and for what this engine does not compute: other modules or
    poolings, prompts that do not count, texts in lower case.
    """
    if not (directory / MODULES).exists():
        if (directory / SETTINGS).exists():
            raise ModelLoadError(
                f"{directory} is an embedding model, as {SETTINGS} says, but has no {MODULES}, which says how its "
                "vectors are made; fetch all files of the model"
            )
        return None
    modules = [_module(directory / MODULES, entry) for entry in read_json_list(directory / MODULES)]
    kinds = [kind for kind, _ in modules]
    if kinds not in _SERVED:
        raise ModelLoadError(
            f"{directory / MODULES} lists {shown(kinds)}, which this engine does not compute; it computes Transformer, "
            f"Pooling and then, perhaps, Normalize; {_REMEDY}"
        )
    if path := modules[0][1]:
        raise ModelLoadError(
            f"{directory / MODULES} has the Transformer in {shown(path)}; move the files there beside {MODULES}, and "
            "let its path be empty"
        )
    _check_texts(directory)
    return PoolingSettings(_pooling(directory / modules[1][1] / "config.json"), kinds[-1] == "Normalize")


def refuse_other_attention(raw: Mapping[str, Any]) -> None:
    """Raises ModelLoadError for the config.json of a model whose tokens see those behind them, or that is computed by
    code of its own, in which they may."""
    for key, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        if (value := raw.get(key)) is not None and value is not causal:
            raise ModelLoadError(
                f"config.json: {key} = {shown(value)}: tokens see those behind them, and this engine computes causal "
                "attention; use a causal embedding model, or sentence-transformers itself"
            )
    if raw.get("auto_map"):
        raise ModelLoadError(
            f"config.json: auto_map = {shown(raw['auto_map'])}: the model is computed by code of its own, whose "
            "attention may not be causal; remove auto_map if it computes what transformers does, or use "
            "sentence-transformers itself"
        )


def _module(path: Path, entry: Any) -> tuple[str, str]:
    """The class of a module, without its package, and its folder."""
    kind, folder = (entry.get(key) if isinstance(entry, dict) else None for key in ("type", "path"))
    if not (isinstance(kind, str) and isinstance(folder, str)):
        raise ModelLoadError(f"{path} has the module {shown(entry)}; each needs a type and a path, both text")
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise ModelLoadError(f"{path} has a module in {shown(folder)}; its path must be inside the directory")
    return kind.rpartition(".")[2], folder


def _pooling(path: Path) -> Pooling:
    config = read_json(path)
    flags = {key: value for key, value in config.items() if key.startswith(_FLAG)}
    if wrong := [key for key in [*flags, "include_prompt"] if not isinstance(config.get(key, True), bool)]:
        raise ModelLoadError(f"{path}: {wrong[0]} is {shown(config[wrong[0]])}; it must be true or false")
    if not config.get("include_prompt", True):
        raise ModelLoadError(
            f"{path}: include_prompt = False: tokens of a prompt do not count, and this engine does not tell them from "
            f"the text's; {_REMEDY}"
        )
    if unknown := sorted(config.keys() - flags.keys() - {*_SIZES, "include_prompt", "pooling_mode"}):
        raise ModelLoadError(f"{path}: {unknown[0]} = {shown(config[unknown[0]])} is not known here; {_REMEDY}")
    modes = _modes(path, config.get("pooling_mode"), flags)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelLoadError(
            f"{path}: pooling {shown(modes)} is not supported; supported is one of {', '.join(_POOLINGS)}; {_REMEDY}"
        )
    return _POOLINGS[modes[0]]


def _modes(path: Path, stated: Any, flags: Mapping[str, bool]) -> list[str]:
    """The poolings that are on, of which sentence-transformers joins the vectors. `mean` is, unless they say it is
    not."""
    if stated is None:
        names = [key.removeprefix(_FLAG) for key, is_on in {_FLAG + "mean_tokens": True, **flags}.items() if is_on]
        return [_MODE_OF_FLAG.get(name, name) for name in names]
    modes = stated if isinstance(stated, list) else [stated]
    if flags or not all(isinstance(mode, str) for mode in modes):
        wrong = f"beside {next(iter(flags))}" if flags else "neither text nor a list of texts"
        raise ModelLoadError(f"{path}: pooling_mode = {shown(stated)} is {wrong}; keep what the model was made with")
    return modes


def _check_texts(directory: Path) -> None:
    """Raises ModelLoadError for texts that are changed before they are tokens; warns of a prompt that is not added."""
    path = directory / "sentence_bert_config.json"
    if path.exists() and read_json(path).get("do_lower_case"):
        raise ModelLoadError(
            f"{path}: do_lower_case is on, and this engine leaves texts as they are; give it texts in lower case, and "
            "turn it off there"
        )
    path = directory / SETTINGS
    if path.exists() and (name := read_json(path).get("default_prompt_name")) is not None:
        log.warning("%s: the prompt %s is not put in front of texts; do so where it is wanted", path, shown(name))
