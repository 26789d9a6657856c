"""What a job is: the inputs, the models and the options that its answers depend on, to be compared when it goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.entrypoints.batch.inputs import InputFile
from fineserve_jax.request.sampling_params import SamplingParams

ANSWERS_DEPEND_ON = (
    *("weights", "kv_precision", "min_kv_precision", "kv_formats", "max_seq_len", "page_size", "prefix_cache", "seed"),
    *("narrow_keep_pages", "reproducible", "kv_recipes"),
)
"""Fields of `EngineConfig` that change answers. The others change how fast rows are answered, not with what."""

BITS_DEPEND_ON = ("max_batch_size", "max_chunk_tokens")
"""Fields that are the size of a step where answers are to be reproducible, and so change the last bit of sums."""

Identity = dict[str, Any]


def job_identity(
    model: str | Path | Mapping[str, Any],
    config: EngineConfig,
    sampling: Mapping[str, Any],
    fingerprints: Sequence[Mapping[str, Any]],
    *,
    ordered: bool,
    timing: bool,
) -> Identity:
    """What a job is, as JSON. `fingerprints`: see `Inputs.survey`."""
    models = model if isinstance(model, Mapping) else {"": model}
    settings = (*ANSWERS_DEPEND_ON, *(BITS_DEPEND_ON if config.reproducible else ()))
    return {
        "models": {name: _source(source) for name, source in models.items()},
        "engine": {name: config.model_dump(mode="json")[name] for name in settings},
        "sampling": SamplingParams(**sampling).model_dump(mode="json"),
        "ordered": ordered,
        "timing": timing,
        "inputs": [dict(fingerprint) for fingerprint in fingerprints],
    }


def what_changed(before: Identity, now: Identity) -> list[str]:
    """How the options of a job differ from those of before, in words; nothing about its inputs."""
    changes = []
    for part in ("engine", "sampling"):
        for name in sorted(before[part].keys() & now[part].keys()):
            was, is_now = before[part][name], now[part][name]
            if was != is_now:
                changes.append(f"{name} was {was!r} and is {is_now!r}")
    for name in sorted(before["models"].keys() | now["models"].keys()):
        was, is_now = before["models"].get(name), now["models"].get(name)
        if was != is_now:
            which = f"model {name!r}" if name else "model"
            changes.append(f"{which} was {_told(was)} and is {_told(is_now, was)}")
    if before["ordered"] != now["ordered"]:
        changes.append("it was begun with --ordered" if before["ordered"] else "it was begun without --ordered")
    if before["timing"] != now["timing"]:
        changes.append("it was begun without --no-timing" if before["timing"] else "it was begun with --no-timing")
    return changes


def what_changed_in_inputs(before: Identity, files: Sequence[InputFile], now: Identity) -> list[str]:
    """How the inputs differ from those of before, in words; rows or files that were only added are no difference."""
    were, are = before["inputs"], now["inputs"]
    if len(are) < len(were):
        return [f"there were {len(were)} inputs and there are {len(are)}"]
    changes = []
    for number, (was, is_now, file) in enumerate(zip(were, are, files, strict=False)):
        grown = was != is_now and number == len(were) - 1 and "bytes" in was
        if was != is_now and not (grown and file.begins_with(was["bytes"], was["sha256"])):
            changes.append(f"{file.path} is not what it was: it had {_size(was)} and has {_size(is_now)}")
    return changes


def _source(source: Any) -> dict[str, Any]:
    """A model's name and settings, and the files behind it."""
    settings = source.model_dump(mode="json") if isinstance(source, ModelSource) else source
    settings = dict(settings) if isinstance(settings, Mapping) else {"model": str(settings)}
    path = Path(str(settings.get("model"))).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        settings["files"] = {str(file.relative_to(path)): file.stat().st_size for file in files}
    elif path.is_file():
        settings["files"] = {path.name: path.stat().st_size}
    return {name: value for name, value in settings.items() if value is not None}


def _told(source: Mapping[str, Any] | None, other: Mapping[str, Any] | None = None) -> str:
    if source is None:
        return "not there"
    settings = {name: value for name, value in source.items() if name != "files"}
    if other is not None and settings == {name: value for name, value in other.items() if name != "files"}:
        return "made of other files"
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _size(fingerprint: Mapping[str, Any]) -> str:
    return f"{fingerprint['bytes']} bytes" if "bytes" in fingerprint else f"version {fingerprint.get('version')}"
