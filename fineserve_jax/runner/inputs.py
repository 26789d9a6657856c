"""What a step is given: numpy arrays built from the scheduler's output, of shapes that the step's spec fixes."""

from typing import Any, NamedTuple

import numpy as np

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.pallas_kernels.operations import plan_attention
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun, Tiles
from fineserve_jax.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.runner.shapes import StepSpec

Array = Any  # numpy on the host, jax.Array in the step


class DecodeInputs(NamedTuple):
    """The decode rows; padding rows have position 0, are written nowhere and see only themselves.

    Attributes:
        tokens, positions: i32[rows].
        pages: i32[rows], the page each token's K and V are written to.
        format_ids: i32[rows], the token-wise format of that page.
        tiles: the rows' cached tokens.
    """

    tokens: Array
    positions: Array
    pages: Array
    format_ids: Array
    tiles: Tiles


class ChunkInputs(NamedTuple):
    """The prefill chunks, each from a page boundary on; slots past a chunk's end repeat position 0.

    Attributes:
        tokens, positions: i32[chunk_tokens].
        targets: i32[chunk_tokens], the token after each; only read by steps that score.
        chunk_of_page: i32[chunk_pages], which chunk a page of slots belongs to; -1: none.
        pages: i32[chunk_pages], where that page is written.
        written_format_ids: i32[chunk_pages], the format it is written in.
        newest_format_ids: i32[chunk_pages], the token-wise format of its request's newest tokens.
        full_format_ids: i32[chunk_pages], the format of its request's full pages.
        tiles: the chunks' cached tokens; rows are chunks.
    """

    tokens: Array
    positions: Array
    targets: Array
    chunk_of_page: Array
    pages: Array
    written_format_ids: Array
    newest_format_ids: Array
    full_format_ids: Array
    tiles: Tiles


class ClosingInputs(NamedTuple):
    """Residual pages that the step fills, to be encoded into pages of their own, by page-wise format.

    Attributes:
        sources, targets: i32[page-wise formats, rows], first units.
        counts: i32[page-wise formats], how many of them count.
    """

    sources: Array
    targets: Array
    counts: Array


class StepInputs(NamedTuple):
    """Everything about a step's tokens, but how to sample.

    Attributes:
        long: bool[rows + chunk_tokens], whether each slot's token is of a request that `is_long`.
        sample_slots: i32[rows], the slot (decode rows first, then chunk slots) each sampled token follows.
    """

    decode: DecodeInputs
    chunk: ChunkInputs | None
    closing: ClosingInputs
    long: Array
    sample_slots: Array


def build_inputs(spec: StepSpec, output: SchedulerOutput, kv: KVManager) -> tuple[StepInputs, list[Request]]:
    """Lays what is scheduled out for the device.

    Returns:
        the inputs, and the requests whose next tokens are sampled, in the order of `sample_slots`.
    """
    builder = _Builder(spec, kv)
    for scheduled in output.decodes:
        builder.add_decode(scheduled)
    for scheduled in output.prefills:
        builder.add_chunk(scheduled)
    return builder.finish(), builder.sampled


def chunk_slots(spec: StepSpec, output: SchedulerOutput) -> list[slice]:
    """The slots of the tokens of each scheduled chunk: decode rows first, then chunks, each from a page on."""
    slots = [slice(row, row + 1) for row in range(len(output.decodes))]
    first, page_size = spec.shape.rows, spec.geometry.page_size
    for scheduled in output.prefills:
        slots.append(slice(first, first + scheduled.count))
        first += -(-scheduled.count // page_size) * page_size
    return slots


class _Builder:
    """Fills the arrays of one step, one scheduled chunk after another."""

    def __init__(self, spec: StepSpec, kv: KVManager) -> None:
        self.spec, self.kv = spec, kv
        self.page_size = spec.geometry.page_size
        self.format_ids = {name: i for i, name in enumerate(spec.format_names)}
        self.sampled: list[Request] = []
        self.sample_slots = np.zeros(spec.shape.rows, np.int32)
        self.num_decodes = self.num_chunks = self.next_page = 0
        self.decode_segments: list[BatchSegment] = []
        self.chunk_segments: list[BatchSegment] = []
        self.decode_queries: list[QueryRun] = []
        self.chunk_queries: list[QueryRun] = []
        self.closing: list[list[tuple[int, int]]] = [[] for _ in spec.paged_formats]

        rows, pages, slots = spec.shape.rows, spec.chunk_pages, spec.shape.chunk_tokens
        self.tokens, self.positions = np.zeros(rows + slots, np.int32), np.zeros(rows + slots, np.int32)
        self.long, self.targets = np.zeros(rows + slots, np.bool_), np.zeros(slots, np.int32)
        self.row_pages, self.row_formats = np.full(rows, NOWHERE, np.int32), np.zeros(rows, np.int32)
        self.chunk_of_page, self.chunk_pages = np.full(pages, -1, np.int32), np.full(pages, NOWHERE, np.int32)
        self.written, self.newest, self.full = (np.zeros(pages, np.int32) for _ in range(3))

    def add_decode(self, scheduled: ScheduledChunk) -> None:
        row, position, request = self.num_decodes, scheduled.start, scheduled.request
        self.num_decodes += 1
        self.tokens[row], self.positions[row] = request.token_ids[position], position
        self.long[row] = request.is_long
        residual, page = self.kv.residual_unit(request), position // self.page_size
        if residual is None:
            self.row_pages[row] = self.kv.page_unit(request, page)
        else:
            self.row_pages[row] = residual
            if position % self.page_size == self.page_size - 1:
                self._close(request.kv_precision, residual, self.kv.page_unit(request, page))
        self.row_formats[row] = self.format_ids[get_format(request.kv_precision).residual or request.kv_precision]
        self.decode_queries.append(QueryRun(row, 1, position))
        self._add_segments(self.decode_segments, row, scheduled)
        self._sample(scheduled, row)

    def add_chunk(self, scheduled: ScheduledChunk) -> None:
        chunk, request, first = self.num_chunks, scheduled.request, self.next_page
        self.num_chunks += 1
        num_pages = -(-scheduled.count // self.page_size)
        self.next_page += num_pages
        slot = first * self.page_size
        where = slice(self.spec.shape.rows + slot, self.spec.shape.rows + slot + scheduled.count)
        self.tokens[where] = request.token_ids[scheduled.start : scheduled.start + scheduled.count]
        self.positions[where] = np.arange(scheduled.start, scheduled.start + scheduled.count)
        self.long[where] = request.is_long
        successors = request.token_ids[scheduled.start + 1 : scheduled.start + scheduled.count + 1]
        self.targets[slot : slot + len(successors)] = successors

        own = slice(first, first + num_pages)
        residual, page = self.kv.residual_unit(request), scheduled.start // self.page_size
        full = self.format_ids[request.kv_precision]
        newest = self.format_ids[get_format(request.kv_precision).residual or request.kv_precision]
        self.chunk_of_page[own] = chunk
        self.full[own], self.written[own], self.newest[own] = full, full, newest
        pages = self.kv.first_units(request, page, num_pages)
        if residual is not None and scheduled.count % self.page_size:
            pages = [*pages[: num_pages - 1], residual]
            self.written[first + num_pages - 1] = newest
        self.chunk_pages[own] = pages
        self.chunk_queries.append(QueryRun(slot, scheduled.count, scheduled.start))
        self._add_segments(self.chunk_segments, chunk, scheduled)
        self._sample(scheduled, where.stop - 1)

    def _add_segments(self, segments: list[BatchSegment], row: int, scheduled: ScheduledChunk) -> None:
        for part in self.kv.segments(scheduled.request, scheduled.start):
            format_id = self.format_ids[part.kv_format]
            segments.append(BatchSegment(row, format_id, part.pages, part.num_tokens, part.first_position))

    def _close(self, kv_format: str, source: int, target: int) -> None:
        self.closing[list(self.spec.paged_formats).index(self.format_ids[kv_format])].append((source, target))

    def _sample(self, scheduled: ScheduledChunk, slot: int) -> None:
        if scheduled.samples:
            self.sample_slots[len(self.sampled)] = slot
            self.sampled.append(scheduled.request)

    def finish(self) -> StepInputs:
        spec, rows = self.spec, self.spec.shape.rows
        decode = DecodeInputs(
            tokens=self.tokens[:rows],
            positions=self.positions[:rows],
            pages=self.row_pages,
            format_ids=self.row_formats,
            tiles=plan_attention(spec.decode_attention(spec.groups[0]), self.decode_segments, self.decode_queries),
        )
        if not spec.chunk_pages:
            return StepInputs(decode, None, self._closing_inputs(), self.long, self.sample_slots)
        chunk = ChunkInputs(
            tokens=self.tokens[rows:],
            positions=self.positions[rows:],
            targets=self.targets,
            chunk_of_page=self.chunk_of_page,
            pages=self.chunk_pages,
            written_format_ids=self.written,
            newest_format_ids=self.newest,
            full_format_ids=self.full,
            tiles=plan_attention(spec.chunk_attention(spec.groups[0]), self.chunk_segments, self.chunk_queries),
        )
        return StepInputs(decode, chunk, self._closing_inputs(), self.long, self.sample_slots)

    def _closing_inputs(self) -> ClosingInputs:
        pages = np.zeros((2, len(self.closing), self.spec.shape.rows), np.int32)
        for i, pairs in enumerate(self.closing):
            pages[:, i, : len(pairs)] = np.array(pairs, np.int32).reshape(-1, 2).T
        return ClosingInputs(pages[0], pages[1], np.array([len(pairs) for pairs in self.closing], np.int32))
