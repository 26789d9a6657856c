"""Reading of GGUF containers: values as the gguf package decodes them, and damage found before use."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import add_byte_tokenizer, add_tensor, finish, write_gguf

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import SUPPORTED_TYPES, GGUFFile


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_decode_to_what_was_quantised(tmp_path, quant):
    matrix = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    add_tensor(writer, "first", matrix[:3], Type[quant])
    add_tensor(writer, "second", matrix, Type[quant])
    file = GGUFFile(finish(writer, tmp_path / "one.gguf"))
    expected = gguf.dequantize(gguf.quantize(matrix, Type[quant]), Type[quant])
    np.testing.assert_array_equal(file.read("second"), expected)
    np.testing.assert_array_equal(file.read("first"), expected[:3])
    assert np.abs(expected - matrix).max() < 0.5


def test_all_types_are_read_that_the_gguf_package_dequantises():
    """Others it refuses to take apart."""
    for kind in Type:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            known = gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind).size == block
        except NotImplementedError:
            known = False
        assert (kind.name in SUPPORTED_TYPES) == known, kind.name


@pytest.mark.parametrize("quant", [name for name in SUPPORTED_TYPES if gguf.GGML_QUANT_SIZES[Type[name]][0] > 1])
def test_quantised_blocks_decode_in_pieces_as_in_one(tmp_path, quant):
    """More values than one piece holds, and an uneven rest."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[Type[quant]]
    rows, width = 1029, 2 * block
    raw = np.random.default_rng(0).integers(0, 60, (rows, 2 * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("k", raw, raw_dtype=Type[quant])
    file = GGUFFile(finish(writer, tmp_path / "k.gguf"))
    assert file.read("k").shape == (rows, width)
    expected = gguf.dequantize(raw, Type[quant])
    np.testing.assert_array_equal(file.read("k"), expected)
    np.testing.assert_array_equal(file.read("k", rows=slice(3, 700, 2)), expected[3:700:2])


def test_a_matrix_of_a_stack_is_read_by_itself(tmp_path):
    stack = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama")
    writer.add_tensor("s", gguf.quantize(stack, Type.Q8_0), raw_dtype=Type.Q8_0)
    writer.add_tensor("v", stack[:, :, 0].copy())
    file = GGUFFile(finish(writer, tmp_path / "s.gguf"))
    expected = gguf.dequantize(gguf.quantize(stack, Type.Q8_0), Type.Q8_0)
    np.testing.assert_array_equal(file.read("s", 2, slice(1, 4)), expected[2, 1:4])
    np.testing.assert_array_equal(file.read("v", 1), stack[1, :, 0])
    np.testing.assert_array_equal(file.read("v", 1, slice(2, 4)), stack[1, 2:4, 0])


def test_metadata_of_every_type_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint8("a", 200)
    writer.add_int64("b", -(2**40))
    writer.add_float64("c", 0.1)
    writer.add_bool("d", True)
    writer.add_string("e", "Grüße 🙂")
    writer.add_array("f", ["x", "", "日本"])
    writer.add_array("g", [1, -2, 3])
    writer.add_array("h", [1.5, 2.5])
    metadata = GGUFFile(finish(writer, tmp_path / "m.gguf")).metadata
    expected = {
        "a": 200, "b": -(2**40), "c": 0.1, "d": True, "e": "Grüße 🙂",
        "f": ["x", "", "日本"], "g": [1, -2, 3], "h": [1.5, 2.5],
    }  # fmt: skip
    assert {key: metadata[key] for key in expected} == expected


def test_string_arrays_larger_than_a_reading_piece_are_whole(tmp_path):
    words = [f"{i}" * (i % 40) for i in range(40_000)] + ["y" * (5 << 20), "end"]
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "llama")
    writer.add_array("words", words)
    writer.add_uint32("after", 7)
    metadata = GGUFFile(finish(writer, tmp_path / "s.gguf")).metadata
    assert metadata["words"] == words
    assert metadata["after"] == 7


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelLoadError, match=r"model\.gguf is not a GGUF file: it begins with b'PK"):
        GGUFFile(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"not a GGUF file: it has 4 bytes"):
        GGUFFile(path)


def test_a_big_endian_or_ancient_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(100))
    with pytest.raises(ModelLoadError, match=r"big-endian"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ModelLoadError, match=r"version 1 .*versions 2 and 3"):
        GGUFFile(path)


def test_a_file_cut_anywhere_is_refused_as_truncated(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", "smollm2").read_bytes()
    cut = tmp_path / "cut.gguf"
    GGUFFile(tmp_path / "whole.gguf")
    for length in [*range(24, 6000, 97), len(whole) // 2, len(whole) - 40]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf is truncated"):
            GGUFFile(cut)


def test_an_absurd_count_is_refused_without_allocating(tmp_path):
    path = tmp_path / "model.gguf"
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    for kind in (8, 4):  # strings, u32
        array = kind.to_bytes(4, "little") + (2**50).to_bytes(8, "little")
        head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
        path.write_bytes(head + key + array + bytes(64))
        with pytest.raises(ModelLoadError, match=r"truncated"):
            GGUFFile(path)


def test_an_unsupported_tensor_type_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "iq.gguf", "llama")
    _, block_bytes = gguf.GGML_QUANT_SIZES[Type.Q8_K]
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, block_bytes), np.uint8), raw_dtype=Type.Q8_K)
    with pytest.raises(ModelLoadError, match=r"attn_q\.weight is of type Q8_K.*supported: F32, F16"):
        GGUFFile(finish(writer, tmp_path / "iq.gguf"))


def test_reading_an_absent_tensor_is_an_error(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_byte_tokenizer(writer)
    with pytest.raises(ModelLoadError, match=r"no tensor 'output.weight'"):
        GGUFFile(finish(writer, tmp_path / "t.gguf")).read("output.weight")
