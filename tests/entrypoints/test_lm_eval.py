"""The lm-evaluation-harness gets the same numbers from this engine as from its own Hugging Face backend.

`fixtures/make_lm_eval_fixture.py` made what is expected, in float32, of tasks that lie in `fixtures/lm_eval`.
"""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval")

from tiny_model import OPTIONS, write_tiny_model  # noqa: E402

from fineserve_jax import ConfigError, RequestError  # noqa: E402
from fineserve_jax.entrypoints.lm_eval import FineServeLM  # noqa: E402

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
EXPECTED = json.loads((FIXTURES / "lm_eval" / "expected.json").read_text())
TOTAL_ERROR = 2e-3  # of the log-probability of some 100 tokens, between float32 sums in two orders


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(quick_compilation):
    """All programs of these tests."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("maker", FIXTURES / "make_lm_eval_fixture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(directory, maker):
    settings = {"weights": "fp32", "kv_precision": "fp32", "kv_formats": ("fp32",), "max_chunk_tokens": 32}
    return FineServeLM(str(directory), max_length=maker.MAX_LENGTH, batch_size=4, kv_memory="8MiB", **settings)


@pytest.fixture(scope="module")
def found(model, maker, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        return json.loads(json.dumps(maker.evaluate(model)))


@pytest.mark.filterwarnings("default")  # other people's
@pytest.mark.parametrize("way", ["plain", "chat"])
def test_the_harness_gets_what_its_own_backend_gives(found, way):
    assert found[way].keys() == EXPECTED[way].keys()
    for task, expected in EXPECTED[way].items():
        assert len(found[way][task]["responses"]) == len(expected["responses"]) == 4
        for ours, theirs in zip(found[way][task]["responses"], expected["responses"], strict=True):
            for (own,), (other,) in zip(ours, theirs, strict=True):
                if isinstance(other, str):
                    assert own == other
                elif isinstance(other, float):
                    assert own == pytest.approx(other, abs=TOTAL_ERROR)
                else:
                    assert own == [pytest.approx(other[0], abs=TOTAL_ERROR), other[1]]
        metrics = {name: value for name, value in expected["metrics"].items() if value != "N/A"}
        assert metrics
        for name, value in metrics.items():
            assert found[way][task]["metrics"][name] == pytest.approx(value, rel=1e-3)


def test_the_model_is_registered_and_an_entry_point_for_later_releases():
    from lm_eval.api.registry import get_model

    assert get_model("fineserve_jax") is FineServeLM
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, module = "fineserve_jax", FineServeLM.__module__
    assert project["entry-points"]["lm_eval.models"] == {name: f"{module}:{FineServeLM.__name__}"}


def test_greedy_continuations_are_told_from_others(model):
    context = "Question: Water boils at"
    ((text,),) = EXPECTED["plain"]["tiny_answers"]["responses"][0]
    requests = [((context, own), *(model.tok_encode(part) for part in (context, own))) for own in (text, text + "!")]
    (_, is_greedy), (_, other) = model._loglikelihood_tokens(requests)
    assert (is_greedy, other) == (True, False)


def test_what_cannot_be_honoured_is_refused(model, directory):
    with pytest.raises(ConfigError, match="unknown setting 'parallelize'"):
        FineServeLM(str(directory), parallelize=True)
    with pytest.raises(ConfigError, match="max_length and max_seq_len both say how long"):
        FineServeLM(str(directory), max_length=9, max_seq_len=9)
    with pytest.raises(RequestError, match="unknown setting 'num_beams'"):
        model._sampling({"do_sample": False, "num_beams": 4})
    with pytest.raises(RequestError, match="chat_template='tools' is not the model's"):
        model.chat_template("tools")
    request = lm_eval.api.instance.Instance("generate_until", {}, ("a", {"max_gen_toks": 40}), 0)
    with pytest.raises(RequestError, match="max_gen_toks=40 leaves no room for a context in max_length=40"):
        model.generate_until([request])


@pytest.mark.slow
def test_the_command_knows_the_model(directory, tmp_path):
    """The harness's command, in a process of its own, with settings of the engine among its arguments."""
    settings = {name: value for name, value in OPTIONS.items() if name != "kv_precision"} | {"kv_precision": "int4"}
    arguments = ",".join(f"{name}={value}" for name, value in {"pretrained": directory, **settings}.items())
    command = [sys.executable, "-m", "fineserve_jax.entrypoints.lm_eval", "run", "--model", "fineserve_jax"]
    command += ["--model_args", arguments, "--tasks", "tiny_choices", "--include_path", "tests/fixtures/lm_eval"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "|tiny_choices|" in done.stdout
