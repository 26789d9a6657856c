"""Damaged and hostile checkpoints are refused or served, in little time and memory, and never end in a traceback."""

import functools
import json
import re
import shutil
import struct
import time
import tracemalloc

import numpy as np
import pytest
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_oracle import CASES, FIXTURES, case_config
from quantized_cases import CASES as QUANTIZED
from safetensors.numpy import save_file

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_model import GGUFModel
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.loaders.hf_tokenizer import hf_tokenizer
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.loaders.quantization import PlainTensors, quantization_method
from fineserve_jax.loaders.safetensors_files import SafetensorsFiles
from fineserve_jax.models import pack_params
from fineserve_jax.models.rope import rope_frequencies

shared_folder = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

_NUMBERS = {4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_values_of_type = {
    4: st.sampled_from([0, 1, 7, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1),
    5: st.integers(-(2**31), 2**31 - 1),
    6: st.floats(width=32),
    7: st.booleans(),
    10: st.integers(0, 2**64 - 1),
    11: st.integers(-(2**63), 2**63 - 1),
    12: st.floats(),
}
_scalars = st.sampled_from(sorted(_NUMBERS)).flatmap(
    lambda kind: _values_of_type[kind].map(lambda value: (kind, struct.pack(_NUMBERS[kind], value)))
)
_texts = st.binary(max_size=8).map(lambda raw: struct.pack("<Q", len(raw)) + raw)


def _array(kind, items):
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(items)


_arrays = st.one_of(
    st.lists(_texts, max_size=4).map(lambda items: _array(8, items)),
    st.lists(_values_of_type[4].map(lambda v: struct.pack("<I", v)), max_size=4).map(lambda items: _array(4, items)),
    st.lists(_values_of_type[6].map(lambda v: struct.pack("<f", v)), max_size=4).map(lambda items: _array(6, items)),
)
_gguf_values = st.one_of(_scalars, _texts.map(lambda raw: (8, raw)), _arrays)
_GGUF_KEYS = [
    "general.architecture", "general.alignment", "split.count",
    *(f"llama.{key}" for key in (
        "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.key_length", "rope.dimension_count", "rope.freq_base", "vocab_size",
        "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.scaling.factor", "rope.scaling.type",
        "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "expert_count",
        "expert_used_count", "expert_feed_forward_length", "pooling_type", "anything",
    )),
    *(f"tokenizer.ggml.{key}" for key in (
        "model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id", "eos_token_id",
        "unknown_token_id", "padding_token_id", "add_bos_token", "add_space_prefix",
    )),
    "tokenizer.chat_template",
]  # fmt: skip


class _GGUFParts:
    """The header of a file, taken apart so that a key's value can be replaced."""

    def __init__(self, path):
        self.data = path.read_bytes()
        tensor_count, key_count = struct.unpack_from("<QQ", self.data, 8)
        self.tensor_count, at, self.keys = tensor_count, 24, {}
        for _ in range(key_count):
            length = struct.unpack_from("<Q", self.data, at)[0]
            key = self.data[at + 8 : at + 8 + length].decode()
            kind = struct.unpack_from("<I", self.data, at + 8 + length)[0]
            start = at + 12 + length
            at = start + self._size(kind, start)
            self.keys[key] = (kind, self.data[start:at])
        self.table_start = at
        first = min(info.offset for info in GGUFFile(path).tensors.values())
        self.table_end = self._table_end()
        self.values = self.data[first:]

    def _size(self, kind, start):
        if kind == 8:
            return 8 + struct.unpack_from("<Q", self.data, start)[0]
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", self.data, start)
            at = start + 12
            for _ in range(count):
                at += self._size(inner, at)
            return at - start
        return struct.calcsize(_NUMBERS[kind])

    def _table_end(self):
        at = self.table_start
        for _ in range(self.tensor_count):
            at += 8 + struct.unpack_from("<Q", self.data, at)[0]
            at += 4 + 8 * struct.unpack_from("<I", self.data, at)[0] + 12
        return at

    def with_values(self, changed):
        keys = {**self.keys, **changed}
        head = b"GGUF" + struct.pack("<IQQ", 3, self.tensor_count, len(keys))
        for key, (kind, raw) in keys.items():
            head += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + raw
        head += self.data[self.table_start : self.table_end]
        return head + bytes(-len(head) % 32) + self.values


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return _GGUFParts(write_gguf(tmp_path_factory.mktemp("whole") / "whole.gguf", "smollm2"))


def _refusal(load):
    """What `load` is refused with, "" when it is served; anything but ModelLoadError fails the test."""
    try:
        load()
    except ModelLoadError as error:
        return str(error)
    return ""


def _load_gguf(path):
    file = GGUFFile(path)
    model = GGUFModel(file)
    gguf_tokenizer(file).encode("hello <|end|>")
    pack_params(model.config, "fp32", model)
    _check_rotations(model.config)


def _check_rotations(config):
    frequencies, factor = rope_frequencies(config)
    assert np.isfinite(frequencies).all()
    assert np.isfinite(factor)


def test_the_file_taken_apart_and_put_together_again_is_served(parts, tmp_path):
    (tmp_path / "m.gguf").write_bytes(parts.with_values({}))
    assert _refusal(lambda: _load_gguf(tmp_path / "m.gguf")) == ""


@given(changed=st.dictionaries(st.sampled_from(_GGUF_KEYS), _gguf_values, min_size=1, max_size=2))
@shared_folder
def test_gguf_values_of_any_type_are_refused_or_served(parts, tmp_path, changed):
    (tmp_path / "m.gguf").write_bytes(parts.with_values(changed))
    assert _refusal(lambda: _load_gguf(tmp_path / "m.gguf")).isprintable()


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.floats(0, 1) | st.just(1.0))
@shared_folder
def test_gguf_files_with_a_changed_byte_or_cut_are_refused_or_served(parts, tmp_path, place, value, cut):
    data = bytearray(parts.data)
    data[int(place * (parts.table_end + 32))] = value
    (tmp_path / "m.gguf").write_bytes(data[: int(cut * len(data))])
    assert _refusal(lambda: _load_gguf(tmp_path / "m.gguf")).isprintable()


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("llama.block_count", (4, struct.pack("<I", 2**31)), "llama.block_count is 2147483648: .*less than or equal"),
        ("llama.block_count", (5, struct.pack("<i", -1)), "llama.block_count is -1: .*greater than or equal to 1"),
        ("llama.embedding_length", (4, struct.pack("<I", 2**24)), "has shape .*implies"),
        ("llama.attention.head_count", (9, struct.pack("<IQI", 4, 1, 4)), r"head_count is \[4\]: .*valid integer"),
        ("llama.attention.layer_norm_rms_epsilon", (6, struct.pack("<f", -1e-5)), "epsilon is -.*greater than 0"),
        ("llama.attention.layer_norm_rms_epsilon", (6, struct.pack("<f", float("nan"))), "epsilon is nan: .*finite"),
        ("llama.rope.freq_base", (12, struct.pack("<d", float("inf"))), "freq_base is inf: .*finite"),
        ("general.alignment", (4, struct.pack("<I", 0)), "general.alignment is 0, must be a power of two"),
        ("general.alignment", (4, struct.pack("<I", 24)), "general.alignment is 24, must be a power of two"),
        ("tokenizer.ggml.eos_token_id", (4, struct.pack("<I", 2**32 - 1)), "eos_token_id is 4294967295, but"),
    ],
)
def test_gguf_values_out_of_range_are_refused_quickly(parts, tmp_path, key, value, complaint):
    path = tmp_path / "m.gguf"
    path.write_bytes(parts.with_values({key: value}))
    tracemalloc.start()
    started = time.monotonic()
    assert re.search(complaint, _refusal(lambda: _load_gguf(path)))
    assert time.monotonic() - started < 2.0
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


def test_a_tensor_or_a_key_named_twice_is_refused(parts, tmp_path):
    path = tmp_path / "m.gguf"
    whole = parts.with_values({})
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(ModelLoadError, match=r"has tensor 'blk\.0\.ffn_up\.weight' twice"):
        GGUFFile(path)
    path.write_bytes(whole.replace(b"llama.context_length", b"llama.rope.freq_base"))
    with pytest.raises(ModelLoadError, match=r"metadata key 'llama\.rope\.freq_base' twice"):
        GGUFFile(path)


def test_nested_and_endless_arrays_are_refused(parts, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(parts.with_values({"a": (9, struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 4, 0))}))
    with pytest.raises(ModelLoadError, match="array inside an array"):
        GGUFFile(path)
    path.write_bytes(parts.with_values({"a": (9, struct.pack("<IQ", 0, 5 << 20) + bytes(5 << 20))}))
    with pytest.raises(ModelLoadError, match="arrays of more than 4194304 values"):
        GGUFFile(path)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("yarn"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_ROPE_KEYS = ["rope_type", "factor", "original_max_position_embeddings", "beta_fast", "mscale", "mscale_all_dim", "x"]
_rope = st.dictionaries(st.sampled_from(_ROPE_KEYS), _json | st.floats(0.5, 64.0), max_size=5)


@given(
    case=st.sampled_from(["llama", "mistral", "qwen2", "qwen3_yarn"]),
    changed=st.dictionaries(
        st.sampled_from([*sorted({*case_config("llama"), *case_config("qwen2")}), "quantization_config", "rope_theta"]),
        _json,
        max_size=3,
    ),
    rope=st.none() | _rope,
)
@settings(max_examples=400)
def test_config_json_of_any_content_is_refused_or_served(case, changed, rope):
    raw = {**case_config(case), **changed, **({} if rope is None else {"rope_parameters": rope})}
    assert _refusal(lambda: _check_rotations(hf_config(raw))).isprintable()


_numbers = st.integers(0, 5) | st.floats(0.0, 4.0) | st.lists(st.integers(0, 2), max_size=5)
_LONGROPE_KEYS = ["short_factor", "long_factor", "original_max_position_embeddings", "factor", "rope_theta", "truncate"]


@given(case=st.sampled_from(CASES), data=st.data())
@settings(max_examples=400)
def test_config_json_of_every_family_is_refused_or_served(case, data):
    own = case_config(case)
    raw = {**own, **data.draw(st.dictionaries(st.sampled_from(sorted(own)), _json | _numbers, max_size=3))}
    rope = data.draw(st.dictionaries(st.sampled_from(_LONGROPE_KEYS), _json | _numbers, max_size=2))
    if isinstance(raw.get("rope_parameters"), dict):
        raw["rope_parameters"] = {**raw["rope_parameters"], **rope}
    assert _refusal(lambda: _check_rotations(hf_config(raw))).isprintable()


@given(name=st.sampled_from(["dtype", "shape", "data_offsets", "extra"]), value=_json, tensor=st.integers(0, 20))
@shared_folder
def test_safetensors_headers_of_any_content_are_refused_or_served(tmp_path, name, value, tensor):
    data = (FIXTURES / "smollm2" / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    names = sorted(header)
    header[names[tensor % len(names)]][name] = value
    _write_safetensors(tmp_path, json.dumps(header).encode(), data[8 + size :])


@given(place=st.integers(0, 2200), value=st.integers(0, 255), cut=st.floats(0, 1) | st.just(1.0))
@shared_folder
def test_safetensors_files_with_a_changed_byte_or_cut_are_refused_or_served(tmp_path, place, value, cut):
    data = bytearray((FIXTURES / "smollm2" / "model.safetensors").read_bytes())
    data[place] = value
    _load_safetensors(tmp_path, bytes(data[: int(cut * len(data))]))


_SETTINGS = sorted({key for case in QUANTIZED.values() for key in case.settings} | {"dynamic", "w_bit", "fmt"})


@given(
    case=st.sampled_from(sorted(QUANTIZED)),
    changed=st.dictionaries(st.sampled_from(_SETTINGS), _json | st.integers(-4, 300), max_size=2),
)
@settings(max_examples=300)
def test_quantization_settings_of_any_content_are_refused_or_served(case, changed):
    assert _refusal(lambda: quantization_method({**QUANTIZED[case].settings, **changed})).isprintable()


@functools.cache
def _quantized(name):
    """A small matrix: the settings of its format, and its tensors."""
    return QUANTIZED[name].settings, QUANTIZED[name].matrix(np.random.default_rng(0), 64, 64)[0]


@given(
    case=st.sampled_from(sorted(QUANTIZED)),
    which=st.integers(0, 9),
    change=st.sampled_from(["drop", "f32", "i8", "bytes", "flat", "one", "half", "twice", "none", "huge"]),
    values=st.none() | st.integers(-(2**31), 2**31 - 1),
)
@shared_folder
def test_quantised_matrices_of_any_tensors_are_refused_or_served(tmp_path, case, which, change, values):
    """Whatever shape, type or values one of the tensors has instead."""
    configured, tensors = _quantized(case)
    names = sorted(tensors)
    name, changed = names[which % len(names)], dict(tensors)
    tensor = np.atleast_1d(changed.pop(name))
    forms = {
        "f32": lambda: np.ones(tensor.shape, np.float32),
        "i8": lambda: np.ones(tensor.shape, np.int8),
        "bytes": lambda: np.ascontiguousarray(tensor).view(np.uint8),
        "flat": lambda: tensor.reshape(-1),
        "one": lambda: tensor.reshape(-1)[:1],
        "half": lambda: tensor[: len(tensor) // 2],
        "twice": lambda: np.concatenate([tensor, tensor]),
        "none": lambda: tensor[:0],
        "huge": lambda: np.full(tensor.shape, 2**31 - 1, np.int32),
    }
    if change != "drop":
        changed[name] = np.ascontiguousarray(forms[change]())
        if values is not None and changed[name].dtype.kind in "iu":
            changed[name] = np.full_like(changed[name], np.array(values).astype(changed[name].dtype))
    save_file({f"m.{end}": np.ascontiguousarray(part) for end, part in changed.items()}, tmp_path / "model.safetensors")
    source = PlainTensors(SafetensorsFiles(tmp_path), quantization_method(configured))
    assert isinstance(_refusal(lambda: _read_matrix(source)), str)


def _read_matrix(source):
    if (shape := source.shape("m.weight")) is not None:
        assert source.read("m.weight").shape == shape
        assert source.read("m.weight", rows=slice(0, 3)).shape == (min(3, shape[0]), *shape[1:])


def _write_safetensors(folder, header, values):
    _load_safetensors(folder, struct.pack("<Q", len(header)) + header + values)


def _load_safetensors(folder, data):
    shutil.copy(FIXTURES / "smollm2" / "config.json", folder)
    (folder / "model.safetensors").write_bytes(data)
    assert isinstance(_refusal(lambda: _pack(folder)), str)


def _pack(folder):
    source = HFModel(folder)
    pack_params(source.config, "fp32", source)


@given(
    name=st.sampled_from(["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config"]),
    content=st.dictionaries(
        st.sampled_from(["bos_token", "eos_token", "chat_template", "added_tokens_decoder", "eos_token_id", "x"]),
        _json,
        max_size=3,
    )
    | _json,
)
@shared_folder
def test_companions_of_the_tokenizer_of_any_content_are_refused_or_served(parts, tmp_path, name, content):
    (tmp_path / "m.gguf").write_bytes(parts.with_values({}))
    gguf_tokenizer(GGUFFile(tmp_path / "m.gguf")).backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert _refusal(lambda: hf_tokenizer(tmp_path)).isprintable()
    (tmp_path / f"{name}.json").unlink()


def test_json_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ModelLoadError, match=r"config\.json is not"):
        read_json(tmp_path / "config.json")


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path):
    shutil.copy(FIXTURES / "smollm2" / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(ModelLoadError, match="plain name in the checkpoint"):
        HFModel(tmp_path)
