"""The shapes of models' pages: how a page lies in the arena, and how long it is in each KV format."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.models import LayerGroup, ModelConfig
from fineserve_jax.pallas_kernels.formats import FORMATS, get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry, choose_unit_words

WORD_BYTES = 2
MAX_PADDING = 0.015
"""Part of a page that may be lost by rounding its layers up to units, before units are made shorter."""


def page_geometry(model: ModelConfig, page_size: int, *, tpu: bool = False) -> PageGeometry:
    """How the model's pages lie in an arena of its own: in long units, which are gathered faster, or in units of half
    the length where long ones lose much to padding in some format and shorter ones less."""
    longest = choose_unit_words(model.head_dim, page_size, tpu=tpu)
    geometry = PageGeometry(model.num_layers, model.num_kv_heads, model.head_dim, page_size, longest)
    if tpu or padding(geometry) <= MAX_PADDING:
        return geometry
    return min(geometry, dataclasses.replace(geometry, unit_words=longest // 2), key=padding)


def padding(geometry: PageGeometry) -> float:
    """The part of a page that holds nothing, in the registered format that loses most."""
    held = [f.words_per_layer(geometry) / (f.units_per_layer(geometry) * geometry.unit_words) for f in FORMATS.values()]
    return 1 - min(held)


def page_geometries(
    models: Mapping[str, LoadedModel], page_size: int, *, tpu: bool = False, shards: int = 1
) -> dict[str, PageGeometry]:
    """How the pages of several models lie in one arena, or in that of each of `shards` devices that share the models:
    in units of one length, which suits all.

    Lengths of units are powers of two, so the least divides the others.
    """
    alone = {name: page_geometry(m.config.of_shard(shards), page_size, tpu=tpu) for name, m in models.items()}
    unit_words = min(geometry.unit_words for geometry in alone.values())
    return {name: dataclasses.replace(geometry, unit_words=unit_words) for name, geometry in alone.items()}


def geometry_in_units(
    name: str, model: ModelConfig, page_size: int, unit_words: int, *, tpu: bool = False
) -> PageGeometry:
    """How the pages of a model of that name lie in an arena that has units already.

    Raises:
        ConfigError: the block of a head is no whole number of such units.
    """
    longest = choose_unit_words(model.head_dim, page_size, tpu=tpu)
    if longest % unit_words:
        raise ConfigError(
            f"the arena has units of {unit_words * WORD_BYTES} bytes since the start, and a head of {name!r} "
            f"(head_dim={model.head_dim}) needs units of {longest * WORD_BYTES} bytes or a part of that; give the "
            "engine this model at the start"
        )
    return PageGeometry(model.num_layers, model.num_kv_heads, model.head_dim, page_size, unit_words)


def group_geometry(geometry: PageGeometry, group: LayerGroup) -> PageGeometry:
    """How the pages of one layer group lie in the arena, where `geometry` is that of pages of all layers."""
    return dataclasses.replace(geometry, num_layers=len(group.layers))


def page_classes(
    model: str,
    geometry: PageGeometry,
    formats: Iterable[str],
    groups: Sequence[LayerGroup] = (),
    step_tokens: int | None = None,
    recipes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[tuple[str, str], PageClass]:
    """The page class of each format, and of the residuals they need, by model and name.

    Args:
        geometry: of pages of all layers.
        formats: KV formats, and names of recipes.
        groups: the model's layers by how far back they attend, and by how recipes keep them; none: all are alike.
        step_tokens: most tokens of a request that a step computes; None: all of them.
        recipes: the format of each layer, by name.
    """
    groups = groups or [LayerGroup(tuple(range(geometry.num_layers)), None)]
    classes: dict[str, PageClass] = {}
    for number, group in reversed(list(enumerate(groups))):  # since a class names those of the groups behind it
        shape = group_geometry(geometry, group)
        window = None if group.window is None else max(2, group.window)
        span = None if window is None or step_tokens is None else window + step_tokens
        like = PageClass(model, "", 1, shape.page_size, 1, group=number, window=window, span=span)
        own = {name: (by_layer[group.layers[0]], frozenset(by_layer)) for name, by_layer in recipes.items()}
        classes = _classes_of_group(like, shape, formats, classes, own)
    return {(model, name): page_class for name, page_class in classes.items()}


def _classes_of_group(
    like: PageClass,
    geometry: PageGeometry,
    formats: Iterable[str],
    others: Mapping[str, PageClass],
    recipes: Mapping[str, tuple[str, frozenset[str]]],
) -> dict[str, PageClass]:
    """The page classes of a layer group, by KV precision.

    Args:
        like: says all but what follows from the format.
        geometry: of the group's pages.
        others: the classes of the groups behind it, each naming those that follow.
        recipes: the format of the group's layers, and those of all, by name.
    """
    classes: dict[str, PageClass] = {}

    def add(name: str) -> PageClass:
        if name not in classes:
            own, all_formats = recipes.get(name, (name, frozenset()))
            kv_format = get_format(own)
            for residual in sorted(filter(None, (get_format(other).residual for other in all_formats))):
                add(residual)  # in each group, whichever group's residual it is
            classes[name] = dataclasses.replace(
                like,
                kv_format=own,
                recipe=name if name in recipes else None,
                page_units=kv_format.page_units(geometry),
                page_bytes=geometry.num_layers * kv_format.words_per_layer(geometry) * WORD_BYTES,
                residual=None if kv_format.residual is None else add(kv_format.residual),
                others=others[name].groups if name in others else (),
            )
        return classes[name]

    for name in formats:
        add(name)
    return classes


def bytes_per_token(page_class: PageClass, geometry: PageGeometry) -> float:
    """Bytes that a cached token takes in pages of a precision's layer groups, scales and padding counted."""
    units = sum(group.page_units for group in page_class.groups)
    return WORD_BYTES * geometry.unit_words * units / geometry.page_size


def bits_per_value(page_class: PageClass, geometry: PageGeometry) -> float:
    """Bits that a cached key or value takes on average over a model's layers, scales and padding counted."""
    values = 2 * geometry.num_layers * geometry.kv_heads * geometry.head_dim
    return 8 * bytes_per_token(page_class, geometry) / values
