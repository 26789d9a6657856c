"""The report of a batch job: right, bounded while the job runs, and a page that anybody can open."""

import dataclasses
import html
import html.parser
import json
import re
import shutil
import socket
import subprocess
import urllib.request

import numpy as np
import pytest
from example_modules import example
from observed_job import HOSTILE, Clock, failed, outcome, play, stats_after
from stub_engine import StubEngine

from fineserve_jax import ConfigError
from fineserve_jax.entrypoints.batch import report_sections
from fineserve_jax.entrypoints.batch import run as run_module
from fineserve_jax.entrypoints.batch.observers import JobStart, Observers
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.entrypoints.cli.batch_observers import job_observers
from fineserve_jax.entrypoints.cli.batch_page import check_report, page, write_report
from fineserve_jax.entrypoints.cli.batch_record import MOST_SAMPLES, BatchRecord, Distribution, rates

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def record(clock) -> BatchRecord:
    record = BatchRecord(clock)
    play(record, clock)
    return record


# -- what is kept ----------------------------------------------------------------------------------------------


def test_quantiles_are_those_of_the_values(record, clock):
    for share in (0.1, 0.5, 0.9, 0.99):
        exact = np.quantile(clock.latencies, share, method="inverted_cdf")
        assert exact <= record.total_s.quantile(share) <= 1.05 * exact
    assert record.ttft_s.total == len(clock.latencies)


def test_a_distribution_knows_zeros_and_rises_to_1():
    distribution = Distribution()
    for value in (0.0, 0.0, 1.0, 2.0, 1e-9, 1e9):
        distribution.note(value)
    points = distribution.cumulative()
    assert [share for _, share in points] == pytest.approx([3 / 6, 4 / 6, 5 / 6, 1.0])
    assert [value for value, _ in points] == sorted(value for value, _ in points)
    assert distribution.quantile(0.5) == pytest.approx(1e-9, rel=0.05)
    assert Distribution().quantile(0.5) == 0.0


def test_memory_does_not_grow_with_the_job():
    clock = Clock()
    record, summary = BatchRecord(clock), BatchSummary()
    record.began(JobStart(None))
    for seq in range(40_000):
        clock.now_s += 0.3
        record.row(failed(seq) if seq % 2 else outcome(seq, 1.0 + seq % 1000))
        summary.sampled_tokens = 10 * seq
        record.step(summary, stats_after(10 * seq))
        record.note("a note")
    assert MOST_SAMPLES / 2 <= len(record.samples) <= MOST_SAMPLES
    assert len(record.total_s.counts) < 200
    assert len(record.notes) == record.MOST_NOTES
    assert record.errors["invalid_request"].count == 20_000
    assert record.samples[-1].time_s > 0.95 * 40_000 * 0.3
    # However thinned out, the rate is that of all steps: 10 tokens in 0.3 s.
    assert [rate for _, rate in rates(record.samples, lambda sample: sample.output_tokens)] == pytest.approx(
        [10 / 0.3] * (len(record.samples) - 1)
    )


# -- the page --------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """All tags and attributes, and whether each is closed."""

    EMPTY = ("meta", "line", "rect", "circle", "polyline", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(record):
    text = page(record)
    tags = Tags(text)
    assert tags.open == []
    assert not tags.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [value for name, value in tags.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"] * text.count("<svg")
    assert "url(" not in text
    assert "@import" not in text


def test_what_rows_say_is_text_and_no_markup(record):
    text = page(record)
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in text


def test_the_page_tells_what_happened(record, clock):
    text = re.sub(r"<[^>]*>", "|", page(record))
    summary = record.summary
    assert f"|{summary.answered:,}|rows answered|" in text
    assert f"|{summary.errors}|errors|" in text
    assert f"|{summary.output_tokens:,}|output tokens|" in text
    assert f"|{summary.output_tokens / summary.seconds:,.0f}|tokens/s|" in text
    assert "|50 s|time|" in text or "|50.0 s|time|" in text
    assert "|engine_fault||11||" in text
    assert "|invalid_request||11||9||" in text
    assert "temperature=-1: too cold" in text
    for name, part in summary.formats.items():
        assert f"|{name}||{part.rows}||{part.prompt_tokens:,}||{part.output_tokens:,}||3.0 MiB||4.0 MiB|" in text
    for title in ("throughput", "KV memory in use", "latencies", "lengths"):
        assert f"|{title}|" in text
    assert f"{300 / summary.prompt_tokens:.1%} of those of the answered rows" in text


@pytest.mark.parametrize("rows", [0, 1])
def test_a_short_or_broken_job_has_a_report_too(rows):
    clock = Clock()
    record = BatchRecord(clock)
    play(record, clock, rows, ends=False)
    text = page(record)
    assert "The job was cut short" in text
    assert Tags(text).open == []


def test_a_report_that_cannot_be_written_is_refused_before_and_told_after(tmp_path, record):
    with pytest.raises(ConfigError, match=r"there is no folder .*missing"):
        check_report(tmp_path / "missing" / "report.html")
    with pytest.raises(ConfigError, match=r"cannot write the report .*: Is a directory"):
        write_report(record, tmp_path)
    check_report(tmp_path / "report.html")
    write_report(record, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def job(run, monkeypatch, tmp_path):
    """Runs a job of 20 rows, one of them bad, on an engine without a model; and what `during` a step gives."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": f"prompt {i}", "max_tokens": 5} for i in range(19)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")

    def go(*flags, during=lambda requests: None):
        monkeypatch.setattr(run_module, "load_engine", lambda model, config: StubEngine(4, fails=during))
        return run("batch", "MODEL", "-i", source, "-o", output, "--overwrite", *flags)

    return go


def test_the_command_writes_a_report(job, tmp_path):
    status, _, _ = job("--report", tmp_path / "report.html")
    assert status == 0
    text = re.sub(r"<[^>]*>", "|", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "|19|rows answered|" in text
    assert "|95|output tokens|" in text
    assert "line 20 is not JSON" in text
    assert f"Rows from {tmp_path / 'prompts.jsonl'}. The job is done" in text


def test_an_interrupted_job_has_a_report_of_what_it_did(job, tmp_path):
    steps = []

    def interrupt(requests):
        steps.append(requests)
        if len(steps) == 8:
            raise KeyboardInterrupt

    status, _, _ = job("--report", tmp_path / "report.html", during=interrupt)
    assert status != 0
    assert "The job was interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_takes_the_place_of_nothing_else(job, tmp_path):
    status, _, err = job("--report", tmp_path / "prompts.jsonl")
    assert status == 2
    assert "is a file that is no report; name another" in err
    assert not (tmp_path / "answers.jsonl").exists()
    for _ in range(2):
        assert job("--report", tmp_path / "report.html")[0] == 0


def test_metrics_can_be_had_while_the_job_runs(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    texts = []

    def scrape(requests):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            texts.append(answer.read().decode())

    status, _, err = job("--metrics-port", port, during=scrape)
    assert status == 0
    assert f"metrics at http://127.0.0.1:{port}/metrics" in err
    assert "vllm:num_requests_running 4.0" in texts[1]
    assert 'fineserve:batch_rows_total{outcome="answered"} 4.0' in texts[7]
    with pytest.raises(OSError, match="refused"):
        scrape(())


def test_an_address_without_a_port_is_refused(job):
    status, _, err = job("--metrics-host", "0.0.0.0")
    assert status == 2
    assert "metrics_host='0.0.0.0' without metrics_port tells nobody anything" in err


def test_options_of_a_cluster_without_one_are_refused(job):
    status, _, err = job("--ray-actors", "2")
    assert status == 2
    assert "ray_actors says where on a Ray cluster, and there is no --ray; give it, too" in err
    status, _, err = job("--ray", "--ray-actors", "0")
    assert status == 2
    assert "ray_actors=0: input should be greater than or equal to 1" in err


# -- in a browser ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path, record, width):
    """In a frame of that width; what it measured stands in the title."""
    write_report(record, tmp_path / "report.html")
    measure = """
        const page = frame.contentDocument, root = page.documentElement;
        const svgs = [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
        document.title = JSON.stringify({
            wide: root.scrollWidth, high: root.scrollHeight, charts: svgs.length,
            narrowest: Math.min(...svgs.map(box => box.width)), widest: Math.max(...svgs.map(box => box.right)),
            font: parseFloat(page.defaultView.getComputedStyle(page.body).fontSize),
        });
    """
    frame = f'<iframe id="frame" src="report.html" style="border:0;width:{width}px;height:800px"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html>{frame}<script>frame.onload = () => {{{measure}}}</script>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *flags, (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search("<title>(.*)</title>", done.stdout).group(1)))
    assert found["wide"] <= width
    assert found["widest"] <= width
    assert found["charts"] == 6
    assert found["narrowest"] >= min(320, width - 50)  # a scroll bar and margins
    assert found["font"] >= 16
    assert found["high"] > 1000


# -- sections of others ------------------------------------------------------------------------------------------------


@pytest.fixture
def sections(monkeypatch):
    monkeypatch.setattr(report_sections, "SECTIONS", {})
    return report_sections.SECTIONS


def test_the_examples_section_names_the_longest_answers(sections):
    module = example("add_report_section")
    report_sections.register(module.LongestAnswers)
    (section,) = report_sections.new_sections()
    lengths = np.random.default_rng(1).permutation(100)
    for seq, length in enumerate(lengths):
        answered = outcome(seq, output_tokens=(int(length), 100))
        section.row(dataclasses.replace(answered, id=HOSTILE) if length == 99 else answered)
        section.row(failed(seq))
    shown = page(BatchRecord(), [section])
    cells = re.findall(r"<td>([^<]*)</td>", shown.partition("<h2>Longest answers</h2>")[2])
    rows = [
        (
            html.escape(HOSTILE) if length == 99 else f"row-{lengths.tolist().index(length)}",
            f"{lengths.tolist().index(length) + 1}",
            f"{length + 100}",
        )
        for length in range(99, 94, -1)
    ]
    assert list(zip(*[iter(cells[:15])] * 3, strict=True)) == rows
    assert HOSTILE not in shown


def test_a_section_that_fails_says_so_in_its_place(sections, caplog):
    class FailsAtOnce(report_sections.ReportSection):
        title = "At once"

        def row(self, outcome):
            raise RuntimeError("no <rows>")

    class FailsAtTheEnd(report_sections.ReportSection):
        title = "At the end"

        def body(self):
            raise RuntimeError("no <page>")

    class Stands(report_sections.ReportSection):
        title = "Stands"

        def body(self):
            return "<p>it stands</p>"

    for section in (FailsAtOnce, FailsAtTheEnd, Stands):
        report_sections.register(section)
    made = report_sections.new_sections()
    Observers(made).row(outcome(1))
    shown = page(BatchRecord(), made)
    assert "<h2>At once</h2><p>This section failed while the job ran: no &lt;rows&gt;</p>" in shown
    assert "<h2>At the end</h2><p>This section failed: no &lt;page&gt;</p>" in shown
    assert "<h2>Stands</h2><p>it stands</p>" in shown


def test_a_report_has_the_sections_and_they_are_told_of_the_job(sections, tmp_path):
    report_sections.register(example("add_report_section").LongestAnswers)
    with job_observers(tmp_path / "report.html", None, None) as observers:
        told = Observers(observers)
        told.began(JobStart(1))
        told.row(outcome(6))
    shown = (tmp_path / "report.html").read_text()
    assert "<td>row-6</td>" in shown.partition("<h2>Longest answers</h2>")[2]


def test_a_section_without_a_title_or_with_anothers_is_refused(sections):
    class Other(report_sections.ReportSection):
        title = "Longest answers"

    report_sections.register(example("add_report_section").LongestAnswers)
    with pytest.raises(ValueError, match="'Longest answers' is registered already"):
        report_sections.register(Other)
    with pytest.raises(ValueError, match="no section with a title"):
        report_sections.register(report_sections.ReportSection)
