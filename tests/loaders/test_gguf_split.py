"""Models in several GGUF files: whole from any part, refused where parts are missing or do not belong together."""

import shutil

import gguf
import jax
import numpy as np
import pytest
from gguf_files import finish, write_gguf

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders import convert, load_model
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_model import GGUFModel
from fineserve_jax.loaders.gguf_split import open_gguf
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer


def split(folder, count=3, case="qwen3", **stated):
    """A fixture case in parts, as gguf-split writes it: the metadata in the first part only; and the whole file.

    stated: what each part says of itself instead of the truth.
    """
    folder.mkdir(exist_ok=True)
    whole = write_gguf(folder / "whole.gguf", case)
    reader, parts = gguf.GGUFReader(whole), []
    for number in range(count):
        path = folder / f"model-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, "qwen3") if number == 0 else _bare_writer(path)
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                writer.add_key_value(field.name, field.contents(), *_types(field))
        writer.add_uint16("split.no", stated.get("number", number))
        writer.add_uint16("split.count", stated.get("count", count))
        writer.add_int32("split.tensors.count", stated.get("tensors", len(reader.tensors)))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        parts.append(finish(writer, path))
    return GGUFFile(whole), parts


def _bare_writer(path):
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # the package writes an architecture into every file
    return writer


def _types(field):
    return (field.types[0], field.types[1]) if len(field.types) > 1 else (field.types[0],)


@pytest.mark.parametrize("given", [0, 2])
def test_all_parts_are_one_model_whichever_is_given(tmp_path, given):
    whole, parts = split(tmp_path / "m")
    found = open_gguf(parts[given])
    assert set(found.tensors) == set(whole.tensors)
    for name in whole.tensors:
        np.testing.assert_array_equal(found.read(name), whole.read(name))
    assert GGUFModel(found).config == GGUFModel(whole).config
    assert gguf_tokenizer(found).encode("he") == gguf_tokenizer(whole).encode("he")
    with pytest.raises(ModelLoadError, match=r"and its other parts have no tensor 'x'"):
        found.read("x")


def test_a_model_in_parts_loads_and_converts(tmp_path):
    whole, parts = split(tmp_path / "m")
    found, expected = load_model(parts[1], "int8"), load_model(whole.path, "int8")
    for mine, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(mine, other)
    convert(parts[0], tmp_path / "converted", "int8")
    assert load_model(tmp_path / "converted", None).config == expected.config


def test_missing_parts_are_named(tmp_path):
    _, parts = split(tmp_path / "m")
    parts[1].unlink()
    with pytest.raises(
        ModelLoadError, match=r"one of 3 parts of a model, and 1 of them are not beside it: model-00002-"
    ):
        open_gguf(parts[0])


def test_a_renamed_part_is_told_what_it_should_be_called(tmp_path):
    _, parts = split(tmp_path / "m")
    with pytest.raises(ModelLoadError, match=r"one of 3 parts .* by their names only.*model-00001-of-00003\.gguf"):
        open_gguf(parts[0].rename(tmp_path / "m" / "mine.gguf"))


def test_parts_that_changed_places_are_refused(tmp_path):
    _, parts = split(tmp_path / "m")
    parts[1].rename(tmp_path / "m" / "x"), parts[2].rename(parts[1]), (tmp_path / "m" / "x").rename(parts[2])
    with pytest.raises(ModelLoadError, match=r"00002-of-00003\.gguf says that it is part 3 of 3, its name says 2 of 3"):
        open_gguf(parts[0])


def test_parts_of_different_models_are_refused(tmp_path):
    _, mine = split(tmp_path / "a")
    _, other = split(tmp_path / "b", case="qwen2")
    shutil.copy(other[1], mine[1])
    with pytest.raises(ModelLoadError, match=r"are parts of different models"):
        open_gguf(mine[0])


def test_a_part_that_is_there_twice_is_refused(tmp_path):
    _, three = split(tmp_path / "a")
    _, four = split(tmp_path / "b", count=4)
    again = split(tmp_path / "c", number=0)[1]
    shutil.copy(again[0], three[1])
    with pytest.raises(ModelLoadError, match=r"says that it is part 1 of 3, its name says 2 of 3"):
        open_gguf(three[0])
    assert open_gguf(four[3]).path == four[0]


def test_tensors_that_no_part_has_are_missed(tmp_path):
    _, parts = split(tmp_path / "m", tensors=99)
    with pytest.raises(ModelLoadError, match=r"says that all parts have 99 tensors, they have \d+;"):
        open_gguf(parts[0])
