"""The comparison with other engines, as far as it goes without them: prompts, processes, tables."""

import json
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from benchmarks.peers.process import Process
from benchmarks.peers.prompts import read_prompts
from benchmarks.peers.report import Figures, Results, markdown
from benchmarks.peers.sides import PEERS, Side, our_sides, peer_sides
from fineserve_jax.loaders import Tokenizer

STUB = """
VERSIONS_OF = ("numpy",)

def start(delay, fails=False):
    print("what an engine prints does not disturb its answers")
    def serve(prompts, lengths):
        if fails:
            raise MemoryError("no room")
        return [[delay * (i + 1) for i in range(length)] for length in lengths]
    return serve
"""


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A side whose engine takes as long as it is told."""
    package = tmp_path / "benchmarks" / "peers"
    for source in ("worker.py", "__init__.py", "engines/__init__.py"):
        (package / source).parent.mkdir(parents=True, exist_ok=True)
        (package / source).write_text((Path("benchmarks/peers") / source).read_text())
    (package / "engines" / "stub.py").write_text(STUB)
    monkeypatch.setattr("benchmarks.peers.process.ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.peers.process.REST_S", 0.0)
    monkeypatch.setenv("FINESERVE_CACHE", str(tmp_path))
    return lambda **options: Process(Side("a stub", "stub", Path(sys.executable), options))


def test_an_engine_answers_from_a_process_of_its_own(stub):
    process = stub(delay=0.5)
    assert process.ask([[1, 2], [3]], [2, 1]) == [[0.5, 1.0], [0.5]]
    assert process.ask([[1]], [1]) == [[0.5]]
    assert process.peak_memory_bytes > 1 << 20
    assert process.versions.keys() == {"numpy"}
    process.close()


def test_an_engine_that_fails_is_told_of_with_what_it_printed(stub):
    process = stub(delay=0.5, fails=True)
    with pytest.raises(RuntimeError, match=r"(?s)a stub ended; .*no room"):
        process.ask([[1]], [1])
    process.close()


def letters() -> Tokenizer:
    """A tokenizer whose tokens are letters."""
    backend = tokenizers.Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefgh")}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return Tokenizer(backend, eos_token_ids=())


def test_prompts_are_read_in_the_forms_that_files_have(tmp_path):
    rows = [{"prompt": "abc", "max_tokens": 7}, {"prompt": "abcdefgh", "max_tokens": 9}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, lengths = read_prompts([path], letters(), max_tokens=4, most=12)
    assert [len(prompt) for prompt in prompts] == [3]  # the other one would be too long
    assert lengths == [7]
    path.write_text('{"text": "abc"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:1 has no messages, prompt, question or turns"):
        read_prompts([path], letters(), max_tokens=4, most=12)


def test_names_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"--ours int8: give weights and KV precision"):
        our_sides(["int8"], "smollm2-135m", {})
    with pytest.raises(ValueError, match=r"--peers torch: none is called so; there are vllm-eager"):
        peer_sides(["torch"], Path("model.gguf"), {})


def test_ours_stand_beside_the_better_of_the_peers():
    rates = {"ours int8/int8": 300.0, "vllm-eager": 100.0, "llama-q8_0": 150.0, "transformers": 900.0}
    assert rates.keys() - PEERS.keys() == {"ours int8/int8"}
    results = Results("a processor", "python -m benchmarks.peers --rounds 1")
    results.serving["8 x 128"] = {side: Figures(rate, 10 * rate, 0.25) for side, rate in rates.items()}
    results.start_up_s = {"ours int8/int8": 2.5}
    for side in rates:
        results.note(side, {"numpy": "2"}, 3 << 30)
    lines = markdown(results).splitlines()
    assert "| ours int8/int8 | 300 (2.00) |" in lines
    assert "| ours int8/int8 | 3000 (2.00) |" in lines
    assert "| llama-q8_0 | 150 |" in lines
    assert "| ours int8/int8 | 0.25 | 2.5 | 3.00 |" in lines
    assert "python -m benchmarks.peers --rounds 1" in lines
