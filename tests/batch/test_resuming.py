"""What `--resume` notices of what has changed, and what it says of it."""

import gzip
import json
import time

import pytest
from job_cases import by_id, without_timing, written
from stub_engine import StubEngine

from fineserve_jax import ConfigError, EngineConfig
from fineserve_jax.entrypoints.batch import JobObserver, run_batch
from fineserve_jax.entrypoints.batch.journal import Journal, journal_path

ROWS = [{"id": f"row {i}", "prompt": [5 + i, 6], "max_tokens": 3} for i in range(12)] + [{"id": "bad"}]


class Interrupt(JobObserver):
    def step(self, summary, stats):
        raise KeyboardInterrupt


@pytest.fixture
def files(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, ROWS)
    return source, target


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(source, target, *, interrupted=False, config=None, sampling=None, model="stub", **options):
    observers = [Interrupt()] if interrupted else []
    return run_batch(
        model,
        source,
        target,
        config,
        sampling,
        make_engine=lambda: StubEngine(batch=4),
        observers=observers,
        **options,
    )


def begin(files, **options):
    """An output of which some rows are left."""
    summary = run(*files, interrupted=True, **options)
    assert summary.interrupted
    return files


def test_a_job_that_was_interrupted_goes_on_and_one_that_is_complete_does_nothing(files):
    begin(files)
    assert run(*files, resume=True).errors == 0
    content = files[1].read_bytes()
    assert {row["id"] for row in written(files[1])} == {row["id"] for row in ROWS}
    summary = run(*files, resume=True)
    assert (summary.answered, summary.skipped, summary.skipped_errors) == (0, 13, 1)
    assert files[1].read_bytes() == content


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"sampling": {"temperature": 0.7}}, {"sampling": {"temperature": 0.9}}, "temperature was 0.7 and is 0.9"),
        ({}, {"sampling": {"max_tokens": 4}}, "max_tokens was None and is 4"),
        ({}, {"config": EngineConfig(seed=3)}, "seed was 0 and is 3"),
        ({}, {"config": EngineConfig(kv_precision="int8")}, "kv_precision was 'bf16' and is 'int8'"),
        ({}, {"model": "other"}, "model was model='stub' and is model='other'"),
        ({}, {"ordered": True}, "it was begun without --ordered"),
        ({}, {"timing": False}, "it was begun without --no-timing"),
        ({}, {"config": EngineConfig(reproducible=True)}, "reproducible was False and is True"),
        (
            {"config": EngineConfig(reproducible=True)},
            {"config": EngineConfig(reproducible=True, max_batch_size=3)},
            "max_batch_size was 32 and is 3",
        ),
    ],
)
def test_options_that_answers_depend_on_must_be_the_same(files, before, now, said):
    begin(files, **before)
    content = files[1].read_bytes()
    with pytest.raises(ConfigError, match=rf"out.jsonl was begun otherwise: {said}. an output holds the answers of"):
        run(*files, resume=True, **now)
    assert files[1].read_bytes() == content
    assert run(*files, resume=True, **before).errors == 0


def test_a_model_made_of_other_files_is_noticed(files, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"abc")
    begin(files, model=str(tmp_path / "model"))
    (tmp_path / "model" / "weights").write_bytes(b"abcd")
    with pytest.raises(ConfigError, match=r"begun otherwise: model was model='.*model' and is made of other files"):
        run(*files, resume=True, model=str(tmp_path / "model"))


def test_options_that_change_only_how_fast_it_goes_may_change(files):
    begin(files)
    config = EngineConfig(kv_memory="1MiB", max_batch_size=3, policy="fcfs", check_finite=True)
    assert run(*files, resume=True, config=config, max_retries=5).answered == 12


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows[1:], lambda rows: [*rows[:-1], {"id": "bad", "prompt": "x"}], lambda rows: rows[::-1]],
    ids=["a row less", "another row", "another order"],
)
def test_other_rows_are_noticed_and_explained(files, change):
    begin(files)
    content, was = files[1].read_bytes(), files[0].stat().st_size
    write(files[0], change(ROWS))
    now = files[0].stat().st_size
    with pytest.raises(ConfigError) as refused:
        run(*files, resume=True)
    assert f"in.jsonl is not what it was: it had {was} bytes and has {now} bytes" in str(refused.value)
    assert f"or remove {journal_path(files[1])}, and --resume goes by the ids in the output" in str(refused.value)
    assert files[1].read_bytes() == content


def test_rows_that_were_added_are_answered_too(files, tmp_path, capsys):
    begin(files)
    write(files[0], [*ROWS, {"id": "new", "prompt": "x", "max_tokens": 2}])
    assert run(*files, resume=True).errors == 0
    assert "rows were added to the input since the job was begun" in capsys.readouterr().err
    assert {row["id"] for row in written(files[1])} == {row["id"] for row in ROWS} | {"new"}
    write(tmp_path / "more.jsonl", [{"id": "more", "prompt": "x", "max_tokens": 2}])
    assert run([files[0], tmp_path / "more.jsonl"], files[1], resume=True).answered == 1
    with pytest.raises(ConfigError, match="there were 2 inputs and there are 1"):
        run(*files, resume=True)


def test_an_input_that_moved_is_the_same(files, tmp_path):
    begin(files)
    moved = files[0].rename(tmp_path / "moved.jsonl")
    assert run(moved, files[1], resume=True).errors == 0


def test_a_compressed_input_is_known_by_its_bytes(files, tmp_path):
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(files[0].read_bytes(), mtime=0))
    begin((packed, files[1]))
    assert run(packed, files[1], resume=True).errors == 0
    packed.write_bytes(gzip.compress(files[0].read_bytes(), 1, mtime=1))
    with pytest.raises(ConfigError, match="begun with other rows"):
        run(packed, files[1], resume=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:40], "it has 40 bytes of "),
        (lambda content: b"", "it has 0 bytes of "),
        (lambda content: b"\n".join(content.split(b"\n")[::-1]), "it differs from byte 0 on"),
    ],
    ids=["cut", "emptied", "sorted"],
)
def test_an_output_that_somebody_changed_is_left_alone(files, damage, said):
    begin(files)
    run(*files, resume=True)
    changed = damage(files[1].read_bytes())
    files[1].write_bytes(changed)
    with pytest.raises(ConfigError, match=rf"out.jsonl is not what was written to it: {said}.*restore it, or remove"):
        run(*files, resume=True)
    assert files[1].read_bytes() == changed


def test_an_output_that_is_gone_is_missed_unless_the_job_begins_anew(files):
    begin(files)
    run(*files, resume=True)
    files[1].unlink()
    with pytest.raises(ConfigError, match="it has 0 bytes of "):
        run(*files, resume=True)
    assert run(*files).answered == 12


def test_overwriting_begins_anew_and_only_when_nothing_can_be_refused_any_more(files):
    begin(files, sampling={"temperature": 0.7})
    content = files[1].read_bytes()
    with pytest.raises(ConfigError):
        run(files[0], files[1], overwrite=True, model={"a": 3})
    assert files[1].read_bytes() == content
    assert run(*files, resume=True, sampling={"temperature": 0.7}).errors == 0
    assert run(*files, overwrite=True).answered == 12


def test_an_output_without_a_journal_is_known_by_its_ids(files, capsys):
    begin(files)
    run(*files, resume=True)
    whole = by_id(without_timing(written(files[1])))
    kept = [row for row in written(files[1]) if row["id"] not in ("row 3", "row 7")]
    files[1].write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"id": "row 3", "te')
    journal_path(files[1]).unlink()
    write(files[0], ROWS[::-1])
    assert run(*files, interrupted=True, resume=True).interrupted
    assert "out.jsonl has no journal: its rows are known by their ids" in capsys.readouterr().err
    summary = run(*files, resume=True)
    found = written(files[1])
    assert [row for row in found if row["id"] == "bad"] == [
        {"id": "bad", "line": 13, "error": whole["bad"]["error"]},
        {"id": "bad", "line": 1, "error": whole["bad"]["error"]},  # it stands elsewhere now
    ]
    answered = [row for row in found if row["id"] != "bad"]
    assert by_id(without_timing(answered)) == {name: whole[name] for name in whole if name != "bad"}
    assert summary.skipped >= 11


def test_errors_of_an_output_without_a_journal_are_not_told_again(files):
    run(*files)
    journal_path(files[1]).unlink()
    content = files[1].read_bytes()
    summary = run(*files, resume=True)
    assert (summary.answered, summary.skipped, summary.errors) == (0, 12, 1)
    assert files[1].read_bytes() == content


def test_a_journal_that_was_created_and_no_more_takes_no_answers_with_it(files):
    run(*files)
    content = files[1].read_bytes()
    journal_path(files[1]).unlink()
    Journal(journal_path(files[1])).close()
    summary = run(*files, resume=True)
    assert (summary.answered, summary.skipped) == (0, 12)
    assert files[1].read_bytes() == content


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b'{"text": "a"}\n', b'{"id": null}\n', b"\n", b"\xff\n"])
def test_a_file_that_holds_no_answers_is_not_resumed(files, line):
    content = b'{"id": 1, "text": "a"}\n' + line
    files[1].write_bytes(content)
    with pytest.raises(ConfigError, match=r"out.jsonl holds a line that is no answer, so it cannot be resumed"):
        run(*files, resume=True)
    assert files[1].read_bytes() == content
    assert not journal_path(files[1]).exists()


def test_a_journal_that_cannot_be_read_is_named_with_the_remedy(files):
    begin(files)
    journal_path(files[1]).write_bytes(b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(ConfigError, match=r"the journal .*out.jsonl.journal cannot be used: file is not a database"):
        run(*files, resume=True)


def test_a_journal_of_another_version_is_refused(files):
    begin(files)
    journal = Journal(journal_path(files[1]))
    journal._db.execute("PRAGMA user_version = 99")
    journal.commit()
    journal.close()
    with pytest.raises(ConfigError, match="it is of version 99, this program's are of 2"):
        run(*files, resume=True)


def test_stdin_and_pipes_are_not_resumed(files):
    with pytest.raises(ConfigError, match="stdin, or a pipe, cannot be resumed: nobody knows whether"):
        run("-", files[1], resume=True)
    assert not files[1].exists()


def test_nothing_but_the_output_and_its_journal_is_left(files, tmp_path):
    run(*files)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.journal"}


def test_timing_can_be_left_out_so_that_equal_jobs_give_equal_files(files, tmp_path):
    body = {"prompt": "abc", "max_tokens": 2}
    write(files[0], [*ROWS, {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body}])
    run(files[0], tmp_path / "a", timing=False, ordered=True)
    time.sleep(1.1)  # OpenAI's `created` is in seconds
    run(files[0], tmp_path / "b", timing=False, ordered=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert b"timing" not in (tmp_path / "a").read_bytes()
