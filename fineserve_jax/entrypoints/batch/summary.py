"""What a batch job did: counted as it goes, and told at its end."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from fineserve_jax.engine.memory import format_bytes
from fineserve_jax.engine.stats import EngineStats


@dataclass(slots=True)
class FormatSummary:
    """One KV precision's part.

    Attributes:
        rows: answered in it.
        prompt_tokens, output_tokens: of those rows; a prompt counts once, whatever its `n`.
        peak_needed_bytes: most bytes that cached tokens took at the end of a step.
        peak_reserved_bytes: most bytes of memory that were set aside for them.
    """

    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    peak_needed_bytes: int = 0
    peak_reserved_bytes: int = 0


@dataclass(slots=True)
class BatchSummary:
    """What a batch job did.

    Attributes:
        answered, errors, skipped: rows; skipped ones had been answered by an earlier run.
        skipped_errors: rows of which an earlier run has written an error; they count as skipped.
        error_kinds: how many errors there were of each `BadRow.code`.
        late: answered rows of which a sample ended because it was late.
        formats: per KV precision. Bytes count under the format that the pages are in: the newest tokens of an
            int4 row lie in an int8 page.
        seconds: from the first row to the last.
        decode_tokens, decode_s: output tokens of the steps that did nothing but decode, and their time.
        sampled_tokens: output tokens so far, those of rows that are not complete included.
        compilations, preemptions, narrowed_pages, hit_tokens: while the job ran; see `KVCounts`.
        common_tokens: prompt tokens with which an earlier prompt began, too: what `hit_tokens` could be.
        faults: how often the engine failed.
        interrupted: whether rows are missing because the process was asked to end.
        signal: the number of the signal by which it was asked; None: by an exception, or not.
    """

    answered: int = 0
    errors: int = 0
    skipped: int = 0
    skipped_errors: int = 0
    error_kinds: Counter[str] = field(default_factory=Counter)
    late: int = 0
    formats: defaultdict[str, FormatSummary] = field(default_factory=lambda: defaultdict(FormatSummary))
    seconds: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    sampled_tokens: int = 0
    compilations: int = 0
    preemptions: int = 0
    narrowed_pages: int = 0
    hit_tokens: int = 0
    common_tokens: int = 0
    faults: int = 0
    interrupted: bool = False
    signal: int | None = None

    @property
    def rows(self) -> int:
        return self.answered + self.errors + self.skipped

    @property
    def prompt_tokens(self) -> int:
        return sum(part.prompt_tokens for part in self.formats.values())

    @property
    def output_tokens(self) -> int:
        return sum(part.output_tokens for part in self.formats.values())

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    def note_row(self, kv_precision: str, prompt_tokens: int, output_tokens: int) -> None:
        """Counts an answered row."""
        self.answered += 1
        part = self.formats[kv_precision]
        part.rows += 1
        part.prompt_tokens += prompt_tokens
        part.output_tokens += output_tokens

    def note_skipped(self, failed: bool = False) -> None:
        """Counts a row that an earlier run has answered, or has written an error of."""
        self.skipped += 1
        self.skipped_errors += failed

    def note_error(self, kind: str) -> None:
        """Counts a row that could not be answered."""
        self.errors += 1
        self.error_kinds[kind] += 1

    def note_step(self, before: EngineStats, after: EngineStats, seconds: float) -> None:
        """Counts a step of the engine."""
        compiled = after.num_compilations - before.num_compilations
        self.compilations += compiled
        self.preemptions += after.num_preemptions - before.num_preemptions
        self.narrowed_pages += after.kv_counts.narrowed_pages - before.kv_counts.narrowed_pages
        self.sampled_tokens += after.num_output_tokens - before.num_output_tokens
        self.hit_tokens += after.kv_counts.hit_tokens - before.kv_counts.hit_tokens
        if not compiled and after.num_prompt_tokens == before.num_prompt_tokens:
            self.decode_tokens += after.num_output_tokens - before.num_output_tokens
            self.decode_s += seconds
        for name, usage in after.kv.items():
            if usage.reserved_bytes:
                part = self.formats[name]
                part.peak_needed_bytes = max(part.peak_needed_bytes, usage.needed_bytes)
                part.peak_reserved_bytes = max(part.peak_reserved_bytes, usage.reserved_bytes)

    def table(self) -> Table:
        """For people, 80 columns wide."""
        table = Table(title=self._headline(), caption=self._footnote(), box=box.SIMPLE_HEAD, title_style="bold")
        table.add_column("KV precision")
        for heading in ("rows", "prompt tokens", "output tokens", "peak needed", "peak reserved"):
            table.add_column(heading, justify="right")
        for name, part in sorted(self.formats.items()):
            counts = (part.rows, part.prompt_tokens, part.output_tokens)
            sizes = (part.peak_needed_bytes, part.peak_reserved_bytes)
            table.add_row(name, *map(str, counts), *map(format_bytes, sizes))
        return table

    def _headline(self) -> str:
        answered = f"answered ({self.late} of them late)" if self.late else "answered"
        counts = Counter({answered: self.answered, "errors": self.errors})
        if self.skipped:
            earlier = f"answered earlier ({self.skipped_errors} of them errors)"
            counts[earlier if self.skipped_errors else "answered earlier"] = self.skipped
        if self.faults:
            counts["faults of the engine"] = self.faults
        told = ", ".join(f"{count} {what}" for what, count in counts.items())
        return f"{'Interrupted: ' if self.interrupted else ''}{told}, in {self.seconds:.1f} s"

    def _footnote(self) -> str:
        overall = self.output_tokens / self.seconds if self.seconds else 0.0
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.error_kinds.most_common())
        errors = f"errors: {kinds}; " if kinds else ""
        return (
            f"{errors}{self.decode_tokens_per_s:.0f} tokens/s decoding, {overall:.0f} over the whole run; "
            f"{self.compilations} compilations, {self.preemptions} preemptions, "
            f"{self.narrowed_pages} pages narrowed, "
            f"{self.hit_tokens} of {self.common_tokens} common prompt tokens shared"
        )
