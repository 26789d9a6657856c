"""What recipes say: which layer is in which KV format, and what is no recipe."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.model_settings import ModelSettings
from fineserve_jax.engine.recipes import parse_recipe, split_layers
from fineserve_jax.errors import ConfigError
from fineserve_jax.models import LayerGroup

NAMES = ("bf16", "int8", "int4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4, first 2 and last 2 layers bf16", "bb....bb"),
        ("int4, first and last layer bf16", "b......b"),
        ("int4, last layer bf16", ".......b"),
        ("int4,first 3 layers  bf16,layer 7 bf16", "bbb....b"),
        ("int4, layers 2-4 bf16, layer 6 bf16", "..bbb.b."),
        ("int4, first 8 layers bf16", "bbbbbbbb"),
        ("int4, first 5 and last 5 layers bf16", "bbbbbbbb"),
    ],
)
def test_a_recipe_names_layers_from_either_end_or_by_number(text, expected):
    formats = parse_recipe(text).by_layer(8)
    assert "".join("b" if name == "bf16" else "." for name in formats) == expected
    assert {*formats} <= {"bf16", "int4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4, first 9 layers bf16", "names layer 8; there are 8"),
        ("int4, last 9 layers bf16", "names 9 layers; there are 8"),
        ("int4, layers 6-8 bf16", "names layer 8; there are 8"),
        ("int4, first 5 layers bf16, last 4 layers int8", "layer 4 of 8 both in bf16 and in int8; name it once"),
    ],
)
def test_layers_that_a_model_has_not_or_that_are_named_twice_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(text).by_layer(8)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x", "int4", "no exception; write it as 'int4, first 2 and last 2 layers bf16', or name the format itself"),
        ("x", "int5, first layer bf16", "unknown KV precision 'int5'"),
        ("x", "int4, first layer int5", "unknown KV precision 'int5'"),
        ("x", "int4, first two layers bf16", "'first two layers bf16' names no layers and their format"),
        ("x", "int4, first 2 layers", "'first 2 layers' names no layers and their format"),
        ("x", "int4, first 0 layers bf16", "names no layer; leave it out"),
        ("x", "int4, layers 5-3 bf16", "names no layer; leave it out, or give the smaller number first"),
        ("x", "int4, ", "'' names no layers and their format"),
        ("int8", "int4, first layer bf16", "'int8' is called as a KV precision that there is"),
        ("k8v4", "int4, first layer bf16", "'k8v4' is called as a KV precision that there is"),
        ("auto", "int4, first layer bf16", "'auto' is called as a KV precision that there is"),
        ("a,b", "int4, first layer bf16", "give it a name without commas"),
        ("", "int4, first layer bf16", "give it a name without commas"),
    ],
)
def test_what_is_no_recipe_is_refused_at_once(name, text, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(kv_recipes={name: text})


def test_recipes_are_served_beside_the_formats_that_are_named():
    recipes = {"edges": "int4, first layer bf16"}
    assert EngineConfig(kv_recipes=recipes, kv_formats=["bf16"]).served_formats == ("bf16", "edges")
    assert EngineConfig(kv_recipes=recipes).served_formats == (*EngineConfig().served_formats, "edges")
    config = EngineConfig(kv_recipes=recipes, kv_precision="edges", min_kv_precision="edges", kv_formats=["edges"])
    assert config.served_formats == ("edges",)
    assert ModelSettings(kv_precision="edges").over(EngineConfig(kv_recipes=recipes)).kv_precision == "edges"
    for options in ({"kv_precision": "edges"}, {"kv_formats": ["edges"]}, {"min_kv_precision": "edges"}):
        with pytest.raises(ConfigError, match="unknown KV precision 'edges'"):
            EngineConfig(**options)


@given(
    windows=st.lists(st.sampled_from([None, 32]), min_size=1, max_size=12),
    recipes=st.lists(st.lists(st.sampled_from(NAMES), min_size=12, max_size=12), max_size=3),
)
def test_layers_are_of_one_group_if_nothing_tells_them_apart(windows, recipes):
    groups = [LayerGroup(tuple(i for i, own in enumerate(windows) if own == window), window) for window in (None, 32)]
    by_name = {str(number): tuple(formats) for number, formats in enumerate(recipes)}
    divided = split_layers([group for group in groups if group.layers], by_name)
    assert sorted(layer for group in divided for layer in group.layers) == list(range(len(windows)))
    kinds = [{(group.window, *(own[layer] for own in recipes)) for layer in group.layers} for group in divided]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(set.union(*kinds)) == len(divided)
    assert all({windows[layer] for layer in group.layers} == {group.window} for group in divided)
    assert [group.window for group in divided] == sorted((g.window for g in divided), key=lambda w: w is not None)
