"""What a step is given: numpy arrays built from the scheduler's output, of shapes that the step's spec fixes."""

from typing import Any, NamedTuple

import numpy as np

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.operations import plan_attention
from fineserve_jax.pallas_kernels.shared_prefixes import find_shared_prefixes
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun, Tiles
from fineserve_jax.request.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.runner.shapes import StepSpec

NO_TOKEN = -1
"""In the place of a token, or of the slot of one: there is none, and it only pads the step."""
MIN_SAVED_TOKENS = 768
"""Tokens that a group of decode rows must not read again for the queries to be put side by side."""

Array = Any  # numpy on the host, jax.Array in the step


class DecodeInputs(NamedTuple):
    """The decode rows; padding rows have position 0 and no token, are written nowhere and see only themselves.

    Attributes:
        tokens, positions: i32[rows]; token -1: none.
        format_ids: i32[rows], the token-wise format that each token's K and V are written in.
        sequences: i32[rows], which of the step's decodes each row is of, as those with drafts have several; -1: none.
            None in steps whose spec has no drafts.
    """

    tokens: Array
    positions: Array
    format_ids: Array
    sequences: Array | None


class ChunkInputs(NamedTuple):
    """The prefill chunks, each from a page boundary on; slots past a chunk's end have position 0 and no token.

    Attributes:
        tokens, positions: i32[chunk_tokens]; token -1: none.
        chunk_of_page: i32[chunk_pages], which chunk a page of slots belongs to; -1: none.
        written_format_ids: i32[chunk_pages], the format it is written in.
        newest_format_ids: i32[chunk_pages], the token-wise format of its request's newest tokens.
        full_format_ids: i32[chunk_pages], the format of its request's full pages.
    """

    tokens: Array
    positions: Array
    chunk_of_page: Array
    written_format_ids: Array
    newest_format_ids: Array
    full_format_ids: Array


class SharedInputs(NamedTuple):
    """Cached tokens that several decode rows attend to together, see `pallas_kernels.shared_prefixes`.

    Attributes:
        rows: i32[rows], the decode row of each query on the axis on which those that share lie side by side; behind
            them those that share nothing.
        places: i32[rows], the place of each row on that axis.
        tiles: the shared tokens.
    """

    rows: Array
    places: Array
    tiles: Tiles


class FormatIds(NamedTuple):
    """The formats that a layer group's keys and values are written in, see `DecodeInputs` and `ChunkInputs`.

    Attributes:
        decode: i32[rows], of each decoded token.
        closing_counts: i32[page-wise formats], how many residual pages the step fills.
        written, newest, full: i32[chunk_pages], of each page of chunk slots; None without such.
    """

    decode: Array
    closing_counts: Array
    written: Array = None
    newest: Array = None
    full: Array = None


class GroupInputs(NamedTuple):
    """Where the step's tokens, and those they attend to, are in the pages of a layer group. Pages by first unit.

    Attributes:
        decode_pages: i32[rows], the page each decoded token's K and V are written to.
        decode_tiles: the decode rows' cached tokens.
        chunk_pages: i32[chunk_pages], where each page of chunk slots is written.
        chunk_tiles: the chunks' cached tokens; rows are chunks. None in a step without chunk slots.
        closing_sources, closing_targets: i32[page-wise formats, rows], residual pages that the step fills, and the
            pages of their own that they are encoded into.
        shared: what decode rows attend to together, and `decode_tiles` therefore lack; None: nothing. With it, a layer
            is another program.
        formats: those of the group, where KV formats differ by layer; None: as those of the step.
    """

    decode_pages: Array
    decode_tiles: Tiles
    chunk_pages: Array
    chunk_tiles: Tiles | None
    closing_sources: Array
    closing_targets: Array
    shared: SharedInputs | None = None
    formats: FormatIds | None = None


class StepInputs(NamedTuple):
    """Everything about a step's tokens, but how to sample.

    Attributes:
        groups: of each layer group.
        closing_counts: i32[page-wise formats], how many residual pages the step fills.
        long: bool[rows + chunk_tokens], whether each slot's token is of a request that `is_long`.
        sample_slots: i32[rows], the slot (decode rows first, then chunk slots) each sampled token follows; -1: none.
    """

    decode: DecodeInputs
    chunk: ChunkInputs | None
    groups: tuple[GroupInputs, ...]
    closing_counts: Array
    long: Array
    sample_slots: Array

    def formats_of(self, group: int) -> FormatIds:
        """The formats of a layer group."""
        if (differing := self.groups[group].formats) is not None:
            return differing
        own = FormatIds(self.decode.format_ids, self.closing_counts)
        if (chunk := self.chunk) is None:
            return own
        return own._replace(
            written=chunk.written_format_ids, newest=chunk.newest_format_ids, full=chunk.full_format_ids
        )


def build_inputs(
    spec: StepSpec, output: SchedulerOutput, kv: KVManager, *, shared: bool = False
) -> tuple[StepInputs, list[Request]]:
    """Lays what is scheduled out for the device.

    Args:
        shared: also lay out what rows share where they share nothing.

    Returns:
        the inputs, and the requests whose next tokens are sampled, in the order of `sample_slots`; one with drafts
        once for each of its rows.
    """
    builder = _Builder(spec, kv)
    for scheduled in output.decodes:
        builder.add_decode(scheduled)
    for scheduled in output.prefills:
        builder.add_chunk(scheduled)
    return builder.finish(shared), builder.sampled


def chunk_slots(spec: StepSpec, output: SchedulerOutput) -> list[slice]:
    """The slots of the tokens of each scheduled chunk, drafts and branches aside: decode rows first, then chunks, each
    from a page on, with their branches behind them."""
    slots, row = [], 0
    for scheduled in output.decodes:
        slots.append(slice(row, row + 1))
        row += 1 + len(scheduled.drafts)
    first, page_size = spec.shape.rows, spec.geometry.page_size
    for scheduled in output.prefills:
        slots.append(slice(first, first + scheduled.count))
        first += -(-scheduled.num_slots // page_size) * page_size
    return slots


def branch_numbers(spec: StepSpec, output: SchedulerOutput) -> np.ndarray | None:
    """i32[chunk_tokens], of each chunk slot the branch of its chunk that it is of, from 1 on; 0: of none. None where no
    chunk has branches."""
    if not any(scheduled.branches for scheduled in output.prefills):
        return None
    numbers = np.zeros(spec.shape.chunk_tokens, np.int32)
    for scheduled, own in zip(output.prefills, chunk_slots(spec, output)[len(output.decodes) :], strict=True):
        first = own.stop - spec.shape.rows
        for number, branch in enumerate(scheduled.branches, 1):
            numbers[first : first + len(branch) - 1] = number
            first += len(branch) - 1
    return numbers


class _GroupBuilder:
    """Fills the arrays of one layer group."""

    def __init__(self, spec: StepSpec, kv: KVManager, number: int) -> None:
        self.spec, self.kv, self.number = spec, kv, number
        self.format_ids = {name: i for i, name in enumerate(spec.format_names)}
        self.decode_pages = np.full(spec.shape.rows, NOWHERE, np.int32)
        self.chunk_pages = np.full(spec.chunk_pages, NOWHERE, np.int32)
        self.decode_segments: list[BatchSegment] = []
        self.chunk_segments: list[BatchSegment] = []
        self.closing: list[list[tuple[int, int]]] = [[] for _ in spec.paged_formats]
        self.row_formats = np.zeros(spec.shape.rows, np.int32)
        self.written, self.newest, self.full = (np.zeros(spec.chunk_pages, np.int32) for _ in range(3))

    def add_decode(self, rows: range, scheduled: ScheduledChunk) -> None:
        """`rows`: of the token, and of its drafts."""
        request, position, size = scheduled.request, scheduled.start, self.spec.geometry.page_size
        own_rows = slice(rows.start, rows.stop)
        full, self.row_formats[own_rows] = self._formats(request)
        residual = self.kv.residual_unit(request, self.number)
        if residual is None:
            self.decode_pages[own_rows] = self.kv.page_unit(request, position // size, self.number)
        else:
            self.decode_pages[own_rows] = residual
            if position % size == size - 1:
                target = self.kv.page_unit(request, position // size, self.number)
                paged = list(self.spec.paged_formats).index(full)
                self.closing[paged].append((residual, target))
        self._add_segments(self.decode_segments, rows, scheduled)

    def add_chunk(self, chunk: int, first: int, num_pages: int, scheduled: ScheduledChunk) -> None:
        """`first`: the first of its pages of slots, of which branches have more behind these `num_pages`."""
        request, size = scheduled.request, self.spec.geometry.page_size
        full, newest = self._formats(request)
        own = slice(first, first + -(-scheduled.num_slots // size))
        self.full[own], self.written[own], self.newest[own] = full, full, newest
        if scheduled.count % size:
            self.written[first + num_pages - 1] = newest
        residual = self.kv.residual_unit(request, self.number)
        pages = self.kv.first_units(request, scheduled.start // size, num_pages, self.number)
        if residual is not None and scheduled.count % size:
            pages = [*pages[: num_pages - 1], residual]
        self.chunk_pages[first : first + num_pages] = pages
        self._add_segments(self.chunk_segments, range(chunk, chunk + 1), scheduled)

    def _formats(self, request: Request) -> tuple[int, int]:
        """Format ids of the request's full pages, and of its newest tokens."""
        own = self.kv.holds(request).groups[self.number].page_class
        return self.format_ids[own.kv_format], self.format_ids[(own.residual or own).kv_format]

    def _add_segments(self, segments: list[BatchSegment], rows: range, scheduled: ScheduledChunk) -> None:
        for part in self.kv.segments(scheduled.request, scheduled.start, self.number):
            format_id = self.format_ids[part.kv_format]
            for row in rows:
                segments.append(BatchSegment(row, format_id, part.pages, part.num_tokens, part.first_position))

    def finish(self, decode_queries: list[QueryRun], chunk_queries: list[QueryRun], shared: bool) -> GroupInputs:
        spec, group = self.spec, self.spec.groups[self.number]
        closing = np.zeros((2, len(self.closing), spec.shape.rows), np.int32)
        for i, pairs in enumerate(self.closing):
            closing[:, i, : len(pairs)] = np.array(pairs, np.int32).reshape(-1, 2).T
        chunk_tiles = None
        if spec.chunk_pages:
            chunk_tiles = plan_attention(spec.chunk_attention(group), self.chunk_segments, chunk_queries)
        own_shared = self._share(shared)
        return GroupInputs(
            decode_pages=self.decode_pages,
            decode_tiles=plan_attention(spec.decode_attention(group), self.decode_segments, decode_queries),
            chunk_pages=self.chunk_pages,
            chunk_tiles=chunk_tiles,
            closing_sources=closing[0],
            closing_targets=closing[1],
            shared=own_shared,
            formats=self.formats() if spec.layer_groups else None,
        )

    def formats(self) -> FormatIds:
        """The formats of what was added."""
        own = FormatIds(self.row_formats, np.array([len(pairs) for pairs in self.closing], np.int32))
        if not self.spec.chunk_pages:
            return own
        return own._replace(written=self.written, newest=self.newest, full=self.full)

    def _share(self, always: bool) -> SharedInputs | None:
        """What the decode rows attend to together, if that pays, or `always`; takes it out of their segments."""
        spec, group = self.spec, self.spec.groups[self.number]
        if not spec.may_share(group):
            return None
        found = find_shared_prefixes(self.decode_segments, spec.geometry.page_size, MIN_SAVED_TOKENS)
        if not (found.num_saved or always):
            return None
        self.decode_segments = found.rest
        in_group = set(found.rows)
        rows = np.array([*found.rows, *(row for row in range(spec.shape.rows) if row not in in_group)], np.int32)
        tiles = plan_attention(spec.shared_attention(group), found.segments, found.queries)
        return SharedInputs(rows, np.argsort(rows).astype(np.int32), tiles)


class _Builder:
    """Fills the arrays of one step, one scheduled chunk after another."""

    def __init__(self, spec: StepSpec, kv: KVManager) -> None:
        self.spec = spec
        self.page_size = spec.geometry.page_size
        self.groups = [_GroupBuilder(spec, kv, number) for number in range(len(spec.groups))]
        self.sampled: list[Request] = []
        self.sample_slots = np.full(spec.shape.rows, NO_TOKEN, np.int32)
        self.num_decodes = self.num_decode_rows = self.num_chunks = self.next_page = 0
        self.decode_queries: list[QueryRun] = []
        self.chunk_queries: list[QueryRun] = []

        rows, pages, slots = spec.shape.rows, spec.chunk_pages, spec.shape.chunk_tokens
        self.tokens, self.positions = np.full(rows + slots, NO_TOKEN, np.int32), np.zeros(rows + slots, np.int32)
        self.long = np.zeros(rows + slots, np.bool_)
        self.sequences = np.full(rows, -1, np.int32)
        self.chunk_of_page = np.full(pages, -1, np.int32)

    def add_decode(self, scheduled: ScheduledChunk) -> None:
        first, position, request = self.num_decode_rows, scheduled.start, scheduled.request
        rows = range(first, first + 1 + len(scheduled.drafts))
        self.tokens[first], self.tokens[first + 1 : rows.stop] = request.token_ids[position], scheduled.drafts
        own_rows = slice(first, rows.stop)
        self.positions[own_rows] = np.arange(position, position + len(rows))
        self.long[own_rows] = request.is_long
        self.sequences[own_rows] = self.num_decodes
        self.decode_queries += [QueryRun(row, 1, position + i) for i, row in enumerate(rows)]
        for group in self.groups:
            group.add_decode(rows, scheduled)
        for row in rows:
            self._sample(scheduled, row)
        self.num_decodes += 1
        self.num_decode_rows = rows.stop

    def add_chunk(self, scheduled: ScheduledChunk) -> None:
        chunk, request, first = self.num_chunks, scheduled.request, self.next_page
        self.num_chunks += 1
        num_pages = -(-scheduled.count // self.page_size)
        self.next_page += -(-scheduled.num_slots // self.page_size)
        slot, stop = first * self.page_size, scheduled.start + scheduled.count
        where = slice(self.spec.shape.rows + slot, self.spec.shape.rows + slot + scheduled.count)
        self.tokens[where] = request.token_ids[scheduled.start : stop]
        self.positions[where] = np.arange(scheduled.start, stop)
        behind = where.stop
        for branch in scheduled.branches:
            own_slots = slice(behind, behind + len(branch) - 1)
            self.tokens[own_slots], self.positions[own_slots] = branch[:-1], np.arange(stop, stop + len(branch) - 1)
            behind = own_slots.stop
        self.long[where.start : behind] = request.is_long

        self.chunk_of_page[first : self.next_page] = chunk
        # Branches count as what follows; all that is cached is ahead of them either way.
        self.chunk_queries.append(QueryRun(slot, scheduled.num_slots, scheduled.start))
        for group in self.groups:
            group.add_chunk(chunk, first, num_pages, scheduled)
        self._sample(scheduled, where.stop - 1)

    def _sample(self, scheduled: ScheduledChunk, slot: int) -> None:
        if scheduled.samples:
            self.sample_slots[len(self.sampled)] = slot
            self.sampled.append(scheduled.request)

    def finish(self, shared: bool) -> StepInputs:
        rows = self.spec.shape.rows
        sequences = self.sequences if self.spec.drafts else None
        formats = self.groups[0].formats()
        decode = DecodeInputs(self.tokens[:rows], self.positions[:rows], formats.decode, sequences)
        chunk = None
        if self.spec.chunk_pages:
            chunk = ChunkInputs(
                tokens=self.tokens[rows:],
                positions=self.positions[rows:],
                chunk_of_page=self.chunk_of_page,
                written_format_ids=formats.written,
                newest_format_ids=formats.newest,
                full_format_ids=formats.full,
            )
        groups = tuple(group.finish(self.decode_queries, self.chunk_queries, shared) for group in self.groups)
        return StepInputs(decode, chunk, groups, formats.closing_counts, self.long, self.sample_slots)
