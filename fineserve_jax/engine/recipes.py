"""Recipes: KV precisions that keep some layers of a model in another format than the rest, by name.

    kv_recipes: {int4-edges: "int4, first 2 and last 2 layers bf16"}

A recipe is a format, and then exceptions, each behind a comma: `first 2 layers bf16`, `last layer int8`, `first 2 and
last 2 layers bf16`, `layers 10-12 int8`, `layer 7 fp32`. Layers are counted from 0; their numbers include both ends.
Layers that some recipe keeps apart are layer groups of their own, for requests in other precisions, too.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fineserve_jax.errors import ConfigError
from fineserve_jax.models import LayerGroup
from fineserve_jax.pallas_kernels.formats import get_format

EXAMPLE = "int4, first 2 and last 2 layers bf16"
AT_AN_END = re.compile(r"(first|last)(?: (\d+))?(?: and (first|last)(?: (\d+))?)? layers? (\S+)")
BY_NUMBER = re.compile(r"layers? (\d+)(?:-(\d+))? (\S+)")


class Layers(NamedTuple):
    """Layers that an exception is for, from `first` to `last`, both included. Negative numbers count from the end."""

    first: int
    last: int
    kv_format: str


class Recipe(NamedTuple):
    """What a recipe says.

    Attributes:
        text: as the user wrote it.
        kv_format: of the layers that no exception names.
        exceptions: the others.
    """

    text: str
    kv_format: str
    exceptions: tuple[Layers, ...]

    def by_layer(self, num_layers: int) -> tuple[str, ...]:
        """The KV format of each layer of a model.

        Raises:
            ConfigError: a layer that the model has not, or that two exceptions want in different formats.
        """
        formats: dict[int, str] = {}
        for first, last, kv_format in self.exceptions:
            start, end = (number + num_layers if number < 0 else number for number in (first, last))
            if start < 0 or end >= num_layers:
                beyond = f"{-first} layers" if first < 0 else f"layer {last}"
                raise ConfigError(f"recipe {self.text!r} names {beyond}; there are {num_layers}, numbered from 0")
            for layer in range(start, end + 1):
                if formats.setdefault(layer, kv_format) != kv_format:
                    raise ConfigError(
                        f"recipe {self.text!r} has layer {layer} of {num_layers} both in {formats[layer]} and in "
                        f"{kv_format}; name it once"
                    )
        return tuple(formats.get(layer, self.kv_format) for layer in range(num_layers))


def parse_recipe(text: str) -> Recipe:
    """What a recipe says. Raises `ValueError` for a text that is none, or that names a format that there is not."""
    base, *parts = (" ".join(part.split()) for part in text.split(","))
    if not parts:
        raise ValueError(f"recipe {text!r} has no exception; write it as {EXAMPLE!r}, or name the format itself")
    get_format(base)
    return Recipe(text, base, tuple(layers for part in parts for layers in _exception(text, part)))


def _exception(text: str, part: str) -> list[Layers]:
    if (found := AT_AN_END.fullmatch(part)) is not None:
        one, its_count, other, other_count, kv_format = found.groups()
        ends = [(one, int(its_count or 1))] + ([(other, int(other_count or 1))] if other else [])
        named = [Layers(0, n - 1, kv_format) if end == "first" else Layers(-n, -1, kv_format) for end, n in ends]
        empty = any(n < 1 for _, n in ends)
    elif (found := BY_NUMBER.fullmatch(part)) is not None:
        first, last, kv_format = found.groups()
        named = [Layers(int(first), int(last or first), kv_format)]
        empty = named[0].last < named[0].first
    else:
        raise ValueError(f"recipe {text!r}: {part!r} names no layers and their format; write it as {EXAMPLE!r}")
    if empty:
        raise ValueError(f"recipe {text!r}: {part!r} names no layer; leave it out, or give the smaller number first")
    get_format(kv_format)
    return named


def check_recipe(name: str, text: str) -> None:
    """Raises `ValueError` for a text that is no recipe, or a name that stands for a KV precision already."""
    if not name.strip() or "," in name:
        raise ValueError(f"a recipe is called {name!r}; requests name it, so give it a name without commas")
    if name == "auto" or _is_format(name):
        raise ValueError(f"recipe {name!r} is called as a KV precision that there is; choose another name")
    parse_recipe(text)


def _is_format(name: str) -> bool:
    try:
        get_format(name)
    except ValueError:
        return False
    return True


def formats_by_layer(recipes: Mapping[str, str], num_layers: int) -> dict[str, tuple[str, ...]]:
    """The KV format of each layer, by name of the recipe. Raises `ConfigError` for layers that there are not."""
    return {name: parse_recipe(text).by_layer(num_layers) for name, text in recipes.items()}


def split_layers(groups: Iterable[LayerGroup], recipes: Mapping[str, tuple[str, ...]]) -> tuple[LayerGroup, ...]:
    """A model's layer groups, divided so that each recipe (formats by layer) has a group's layers in one format: first
    those that most of a group's layers are like."""
    divided = []
    for group in groups:
        alike: dict[tuple[str, ...], list[int]] = {}
        for layer in group.layers:
            alike.setdefault(tuple(formats[layer] for formats in recipes.values()), []).append(layer)
        largest_first = sorted(alike.values(), key=lambda layers: (-len(layers), layers))
        divided += [LayerGroup(tuple(layers), group.window) for layers in largest_first]
    return tuple(divided)
