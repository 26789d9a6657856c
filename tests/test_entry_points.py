"""What other installed packages offer is found: KV formats, model families and logits processors by name."""

import dataclasses
import sys
import types

import pytest

from fineserve_jax import (
    KV_FORMATS,
    ConfigError,
    LogitsProcessor,
    ModelLoadError,
    ReportSection,
    RequestError,
    SamplingParams,
)
from fineserve_jax.entrypoints.batch import report_sections
from fineserve_jax.models import get_family, registry
from fineserve_jax.models.registry import family_of_hf_architecture
from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES
from fineserve_jax.pallas_kernels.formats import KVFormat, get_format, register
from fineserve_jax.pallas_kernels.formats.int8 import Int8Codec
from fineserve_jax.request.logits_processor import PROCESSORS, get_logits_processor


class Other(KVFormat):
    def __init__(self) -> None:
        super().__init__(Int8Codec(), Int8Codec(), "other8")


class Louder(LogitsProcessor):
    name = "louder"


class Section(ReportSection):
    title = "Others"


OTHER = dataclasses.replace(get_family("llama"), name="other", hf_architectures=("OtherForCausalLM",))


@pytest.fixture
def offer(monkeypatch, tmp_path):
    """Installs a distribution that offers `what` under a name in a group of entry points, for one test."""
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    registries = (KV_FORMATS, FORMAT_SIZES, PROCESSORS, report_sections.SECTIONS)
    before = [(registry, dict(registry)) for registry in registries]

    def install(group: str, name: str, what: object) -> None:
        module = types.ModuleType("others_package")
        vars(module)["it"] = what
        monkeypatch.setitem(sys.modules, "others_package", module)
        info = tmp_path / "others_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = others_package:it\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for known, kept in before:
        known.clear()
        known.update(kept)


@pytest.mark.parametrize("what", [Other, Other()], ids=["class", "instance"])
def test_a_format_is_found_by_its_name_and_then_registered(offer, what):
    offer("fineserve_jax.kv_formats", "other8", what)
    assert "other8" not in KV_FORMATS
    assert isinstance(get_format("other8"), Other)
    assert get_format("other8") is KV_FORMATS["other8"]


def test_a_format_whose_module_registers_it_is_taken_as_it_is(offer):
    class Registers:
        def __new__(cls) -> Other:  # what importing the module does, as late as the entry point is loaded
            return register(Other())

    offer("fineserve_jax.kv_formats", "other8", Registers)
    assert get_format("other8") is KV_FORMATS["other8"]


def test_offered_formats_are_named_among_those_to_choose_from(offer):
    offer("fineserve_jax.kv_formats", "other8", Other)
    with pytest.raises(ValueError, match=r"unknown KV precision 'int9'; choose one of fp32, .*int4, int3, other8"):
        get_format("int9")


@pytest.mark.parametrize("what", [lambda: KVFormat(Int8Codec(), Int8Codec()), 8], ids=["another name", "no format"])
def test_an_entry_point_that_is_no_format_of_that_name_is_refused(offer, what):
    offer("fineserve_jax.kv_formats", "other8", what)
    with pytest.raises(ValueError, match=r"'other8' of fineserve_jax.kv_formats is .* no KVFormat of that name"):
        get_format("other8")


def test_a_model_family_is_found_by_its_name(offer):
    offer("fineserve_jax.model_families", "other", OTHER)
    assert get_family("other") is OTHER


def test_a_model_family_is_found_by_a_checkpoints_architecture(offer):
    offer("fineserve_jax.model_families", "other", OTHER)
    assert family_of_hf_architecture("OtherForCausalLM") is OTHER
    with pytest.raises(ModelLoadError, match=r"'GPT2LMHeadModel' is not supported; supported: .*OtherForCausalLM"):
        family_of_hf_architecture("GPT2LMHeadModel")


def test_an_entry_point_that_is_no_family_is_refused(offer):
    offer("fineserve_jax.model_families", "other", "other")
    with pytest.raises(ModelLoadError, match=r"'other' of fineserve_jax.model_families is 'other', which is no Family"):
        get_family("other")


@pytest.mark.parametrize("what", [Louder, Louder()], ids=["class", "instance"])
def test_a_logits_processor_is_found_by_its_name(offer, what):
    offer("fineserve_jax.logits_processors", "louder", what)
    with pytest.raises(RequestError, match=r"unknown logits processor 'loud'; known: .*louder"):
        SamplingParams(logits_processors=("loud",))
    assert SamplingParams(logits_processors=("louder",)).logits_processors == {"louder": {}}
    assert isinstance(get_logits_processor("louder"), Louder)
    assert get_logits_processor("louder") is PROCESSORS["louder"]


def test_an_entry_point_that_is_no_logits_processor_of_that_name_is_refused(offer):
    offer("fineserve_jax.logits_processors", "loud", Louder)
    with pytest.raises(RequestError, match=r"'loud' of fineserve_jax.logits_processors is .* no LogitsProcessor of"):
        SamplingParams(logits_processors=("loud",))


def test_sections_of_reports_are_found_and_made_for_each_job(offer):
    offer("fineserve_jax.report_sections", "others", Section)
    first, second = report_sections.new_sections(), report_sections.new_sections()
    assert [type(section) for section in (*first, *second)] == [Section, Section]
    assert first[0] is not second[0]


def test_an_entry_point_that_is_no_section_is_refused_before_a_job_begins(offer):
    offer("fineserve_jax.report_sections", "others", "a title")
    with pytest.raises(
        ConfigError, match=r"'others' of fineserve_jax.report_sections .*'a title' is no section with a"
    ):
        report_sections.new_sections()
