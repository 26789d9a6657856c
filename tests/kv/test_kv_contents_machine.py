"""Everything that the KV manager does, together, against a plain model of what each request should read back.

The model is a list of cells for each request and layer group. A fake device carries out the page operations, and steps
are computed on it as the runner computes them; after each rule, what the manager's segments lead to must be what the
model says.
"""

import copy
from collections import Counter
from typing import Any

from contents_cases import Cell, FakeDevice, alone, clashes, formats_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fineserve_jax.kv import page_table, tags
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.narrowing import MAX_RUNS
from fineserve_jax.kv.operations import Copy
from fineserve_jax.kv.request_pages import Segment
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.request.request import Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.page_operations import _batches

Cells = list[Cell | None]
UNIT_BYTES = 8
SAMPLING = SamplingParams()
MAX_TOKENS = 22
FEW = page_table.FEW


WINDOW, STEP_TOKENS = 5, 8
LOCAL = {"group": 1, "window": WINDOW, "span": WINDOW + STEP_TOKENS}


def page_class(
    model: str, kv_format: str, units: int, size: int, residual: PageClass | None = None, **groups: Any
) -> PageClass:
    return PageClass(model, kv_format, units, size, units * UNIT_BYTES - 3, residual, **groups)


BF16, INT8 = page_class("m", "bf16", 7, 2), page_class("m", "int8", 5, 2)
INT4 = page_class("m", "int4", 3, 2, residual=BF16)
OTHER_BF16, OTHER_INT8 = page_class("other", "bf16", 4, 3), page_class("other", "int8", 2, 3)
LOCAL_BF16, LOCAL_INT8 = page_class("w", "bf16", 6, 2, **LOCAL), page_class("w", "int8", 4, 2, **LOCAL)
LOCAL_INT4 = page_class("w", "int4", 2, 2, residual=LOCAL_BF16, **LOCAL)
WINDOWED_BF16 = page_class("w", "bf16", 5, 2, others=(LOCAL_BF16,))
WINDOWED_INT8 = page_class("w", "int8", 3, 2, others=(LOCAL_INT8,))
WINDOWED_INT4 = page_class("w", "int4", 2, 2, residual=WINDOWED_BF16, others=(LOCAL_INT4,))
WINDOWED = (WINDOWED_BF16, WINDOWED_INT8, WINDOWED_INT4)
# By layer: a recipe keeps the second group as bf16 does, and the first as int4.
LAST_BF16 = page_class("r", "bf16", 6, 2, group=1)
LAST_INT4 = page_class("r", "int4", 3, 2, residual=LAST_BF16, group=1)
LAST_EDGES = page_class("r", "bf16", 6, 2, group=1, recipe="edges")
LAYERED_BF16 = page_class("r", "bf16", 5, 2, others=(LAST_BF16,))
LAYERED_INT4 = page_class("r", "int4", 2, 2, residual=LAYERED_BF16, others=(LAST_INT4,))
LAYERED_EDGES = page_class("r", "int4", 2, 2, residual=LAYERED_BF16, others=(LAST_EDGES,), recipe="edges")
LAYERED = (LAYERED_BF16, LAYERED_INT4, LAYERED_EDGES)
CLASSES = {(c.model, c.precision): c for c in (BF16, INT8, INT4, OTHER_BF16, OTHER_INT8, *WINDOWED, *LAYERED)}
ALL_CLASSES = [c for first in CLASSES.values() for c in first.groups]
LONGEST = max(c.page_units for c in ALL_CLASSES)
ONE_PAGE_BYTES = LONGEST * UNIT_BYTES

# Prompts that mostly begin alike: some of the common tokens, and then some others.
COMMON = (1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1)
prompts = st.builds(
    lambda common, others: [*COMMON[:common], *others],
    st.sampled_from([1, 4, 7, 9, len(COMMON)]),
    st.lists(st.integers(0, 1), max_size=2),
)
patiences = st.sampled_from([False, False, True])


def class_of_segment(request: Request, segment: Segment, group: int) -> PageClass:
    """Of the pages of a segment, those of a recipe's residual being a plain format's."""
    own = CLASSES[request.model, segment.precision or segment.kv_format].groups[group]
    return own if own.kv_format == segment.kv_format else CLASSES[request.model, segment.kv_format].groups[group]


def pick(data, requests) -> Request:
    """One of the requests, drawn by its number, which is all that is worth printing of it."""
    return list(requests)[data.draw(st.integers(0, len(requests) - 1))]


class ContentsMachine(RuleBasedStateMachine):
    """`rows`: requests that hold pages -> for each layer group the cells of their computed tokens, None for those that
    lay behind the window when the request got them; `waiting`: those preempted, with the cells that were saved;
    `narrowed`: those some of whose cells were encoded anew."""

    @initialize(
        keys=st.lists(st.sampled_from(sorted(CLASSES)), min_size=1, max_size=4, unique=True),
        policy=st.sampled_from(["elastic", "elastic", "partitioned", "uniform"]),
        prefix_cache=st.sampled_from(["exact", "convert", "off"]),
        num_slabs=st.sampled_from([3, 6, 12, 24, 24]),
        slab_units=st.integers(LONGEST, 40),
        reserve_slabs=st.integers(0, 2),
        host_pages=st.sampled_from([0, 4, 100, 100]),
        max_step_pages=st.sampled_from([1, 2, 100]),
        few=st.sampled_from([0, FEW]),
    )
    def build(self, keys, policy, prefix_cache, num_slabs, slab_units, reserve_slabs, host_pages, max_step_pages, few):
        page_table.FEW = tags.FEW = few  # so that numpy has its turn
        self.kv = KVManager(
            SlabAllocator((num_slabs + 1) * slab_units, slab_units, policy, (), unit_bytes=UNIT_BYTES),
            CLASSES,
            prefix_cache=prefix_cache,
            reserve_slabs=reserve_slabs,
            host_bytes=host_pages * ONE_PAGE_BYTES,
        )
        self.kv.pool.compaction.max_step_bytes = max_step_pages * ONE_PAGE_BYTES
        self.device = FakeDevice()
        self.keys, self.operations = keys, []
        self.rows: dict[Request, list[Cells]] = {}
        self.waiting: dict[Request, list[Cells]] = {}
        self.narrowed: set[Request] = set()
        self.arrived = 0

    # -- what the model expects ------------------------------------------------------------------------------------

    def class_of(self, request: Request) -> PageClass:
        return CLASSES[request.model, request.kv_precision]

    def in_residual(self, request: Request, group: int, position: int, num_cached: int) -> bool:
        own = self.class_of(request).groups[group]
        return own.residual is not None and position >= num_cached // own.page_size * own.page_size

    def is_exact(self, request: Request) -> bool:
        """Whether the request may read only what computing it alone would have given."""
        may_convert = self.kv.sharing.prefix_cache == "convert" and request.shares_prefix
        return request not in self.narrowed and not may_convert

    def read(self, request: Request, num_cached: int, group: int) -> Cells:
        """What the request's segments lead to on the device; None for what was dropped, all of it behind the window."""
        cells: Cells = []
        for segment in self.kv.segments(request, num_cached, group):
            page_class = class_of_segment(request, segment, group)
            if not cells:
                assert segment.first_position <= page_class.first_token(num_cached)
                cells += [None] * segment.first_position
            assert segment.first_position == len(cells)
            pages = [cell for unit in segment.pages for cell in self.device.read(unit, page_class)]
            assert 0 < segment.num_tokens <= len(pages)
            cells += pages[: segment.num_tokens]
        assert len(cells) == num_cached or not self.class_of(request).groups[group].first_token(num_cached) < num_cached
        return cells + [None] * (num_cached - len(cells))

    def note_shared(self, request: Request) -> None:
        """The request has got cells that it did not compute: they must be those of its tokens."""
        computed = request.num_computed_tokens
        for group, known in enumerate(self.rows[request]):
            own = self.class_of(request).groups[group]
            assert len(known) <= computed < request.num_tokens
            for position, cell in enumerate(self.read(request, computed, group)[len(known) :], len(known)):
                expected = alone(own, request.token_ids, position, self.in_residual(request, group, position, computed))
                if cell is not None or position >= own.first_token(computed):
                    assert cell is not None
                    assert cell.prefix == expected.prefix
                    assert cell == expected or not self.is_exact(request)
                known.append(cell)

    def run_operations(self) -> None:
        for operation in self.kv.take_operations():
            self.device.apply(operation)
            self.operations.append(operation)

    def num_holding(self, request: Request, group: int) -> list[int]:
        """How many requests hold each of the request's pages that are there."""
        holding = Counter(unit for row in self.rows for number in range(2) for unit in self.units(row, number))
        return [holding[unit] for unit in self.units(request, group)]

    def units(self, request: Request, group: int) -> list[int]:
        groups = self.kv.holds(request).groups
        return self.kv.first_units(request, 0, groups[group].num_pages, group) if group < len(groups) else []

    def formats(self, request: Request, group: int) -> list[str]:
        """Format of each page that is there and holds computed tokens, the residual page aside."""
        full = request.num_computed_tokens // self.class_of(request).page_size * self.class_of(request).page_size
        segments = self.kv.segments(request, full, group)
        return [segment.precision or segment.kv_format for segment in segments for _ in segment.pages]

    # -- requests come and go --------------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        prompt=prompts,
        floor=st.sampled_from([None, "int8", "int4", "int4", "edges"]),
        shares=st.sampled_from([True, True, True, False]),
        patient=patiences,
        more=st.sampled_from([0, 0, 0, 3]),
        count=st.integers(1, 3),
    )
    def admit(self, data, prompt, floor, shares, patient, more, count):
        """Requests with one prompt."""
        key = self.keys[data.draw(st.integers(0, len(self.keys) - 1))]
        floor = floor if (key[0], floor) in CLASSES and floor != key[1] and key[1] != "int4" else None
        for _ in range(count):
            request = self.new_request(key, prompt, min_kv_precision=floor, shares_prefix=shares)
            self.start(request, len(prompt) + more, patient)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), patient=patiences)
    def fork(self, data, patient):
        origin = pick(data, self.rows)
        request = self.new_request(
            (origin.model, origin.kv_precision),
            origin.token_ids[: origin.num_prompt_tokens],
            min_kv_precision=origin.min_kv_precision,
            shares_prefix=origin.shares_prefix,
            fork_of=origin,
        )
        if self.start(request, request.num_tokens, patient) and self.can_fork(origin, request):
            assert request.num_computed_tokens == request.num_tokens - 1

    def can_fork(self, origin: Request, request: Request) -> bool:
        """Whether the origin still has all but the last of the fork's tokens, as they were computed."""
        known, own = request.num_tokens - 1, self.class_of(request)
        closed = origin.num_computed_tokens // own.page_size > known // own.page_size
        has_residual = any(group.residual is not None for group in own.groups)
        gone = has_residual and known % own.page_size and closed
        held = self.kv.held[origin].groups
        gone = gone or any(group.num_dropped > group.page_class.first_page(known) for group in held)
        return origin.num_computed_tokens >= known and not gone and self.is_exact(origin)

    def new_request(self, key, prompt, **options) -> Request:
        self.arrived += 1
        times = RequestTimes(arrival_s=0.0)
        name, (model, kv_precision) = f"r{self.arrived}", key
        return Request(
            name, model, kv_precision, SAMPLING, list(prompt), len(prompt), MAX_TOKENS, self.arrived, times, **options
        )

    def start(self, request: Request, num_tokens: int, patient: bool) -> bool:
        """Give pages to a request that has none; whether it got them."""
        fits_alone = self.kv.fits_alone(request.model, request.kv_precision, num_tokens)
        saved = self.waiting.get(request) or [[] for _ in self.class_of(request).groups]
        if not self.kv.grow(request, num_tokens, {} if patient else None):
            assert request not in self.kv.held
            assert self.rows or patient or not fits_alone or saved[0], "nothing stands in its way"
            return False
        assert not patient or self.kv.num_free_slabs >= self.kv.reserve_slabs
        self.run_operations()
        self.waiting.pop(request, None)
        self.rows[request] = saved
        self.note_shared(request)
        return True

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), patient=patiences)
    def resume(self, data, patient):
        request = pick(data, self.waiting)
        self.start(request, request.num_tokens, patient)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), to_host=st.booleans())
    def preempt(self, data, to_host):
        request = pick(data, self.rows)
        held, host = self.kv.held[request], self.kv.host
        cells = self.rows.pop(request)
        if to_host and cells[0] and not held.waits and host.has_room(request, held):
            self.kv.save(request)
            self.waiting[request] = cells
        else:
            self.kv.release(request)
            request.num_computed_tokens = 0
            self.waiting[request] = [[] for _ in cells]
            self.narrowed.discard(request)

    @precondition(lambda self: self.rows or self.waiting)
    @rule(data=st.data())
    def finish_or_abort(self, data):
        request = pick(data, [*self.rows, *self.waiting])
        self.kv.release(request)
        self.rows.pop(request, None)
        self.waiting.pop(request, None)

    # -- a step ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.rows)
    @rule(
        times=st.integers(1, 6),
        num_pages=st.integers(1, 4),
        idle=st.none() | st.integers(0, 3),
        token=st.integers(0, 1),
        in_order=st.booleans(),
        together=st.booleans(),
        failing=st.none() | st.integers(0, 3),
    )
    def steps(self, times, num_pages, idle, token, in_order, together, failing):
        """Some steps that compute every row that can go on but one, chunks being at most `num_pages` long; in the last
        one a row may fail."""
        for left in reversed(range(times)):
            self.begin_step()
            self.run_operations()
            self.check_batches()
            if together and self.kv.grow_together(list(self.rows)):
                grown = list(self.rows)
            else:
                grown = [row for row in self.rows if self.kv.grow(row, row.num_tokens)]
            self.run_operations()
            able = [row for row in (grown if in_order else reversed(grown)) if self.can_go_on(row)]
            picked = [row for i, row in enumerate(able) if i != idle]
            self.step(picked, num_pages, token, [row for i, row in enumerate(picked) if i == failing and not left])

    def step(self, picked: list[Request], num_pages: int, token: int, failing: list[Request]) -> None:
        """Rows that fail write what nobody may ever read, say NaN, and are released before it counts as computed."""
        computed = [self.compute(row, num_pages) for row in picked]  # all of it reads before any of it is written
        places = [(unit, page_class, offset) for _, writes in computed for unit, page_class, offset, _ in writes]
        assert len(set(places)) == len(places)
        for request, (cells, writes) in zip(picked, computed, strict=True):
            for unit, page_class, offset, cell in writes:
                written = cell._replace(prefix=("failed",)) if request in failing else cell
                self.device.write_token(unit, page_class, offset, written)
            self.close(request, len(cells[0]))
            if request in failing:
                self.kv.release(request)
                del self.rows[request]
                continue
            request.num_computed_tokens += len(cells[0])
            both = enumerate(zip(self.rows[request], cells, strict=True))
            self.rows[request] = [self.as_kept(request, group, [*known, *new]) for group, (known, new) in both]
            self.kv.note_computed(request)
            if request.num_computed_tokens == request.num_tokens:
                request.token_ids.append(token)
            if request.num_tokens > MAX_TOKENS:
                self.kv.release(request)
                del self.rows[request]

    def can_go_on(self, request: Request) -> bool:
        able = self.kv.can_advance(request)
        self.run_operations()
        self.note_shared(request)
        return able

    @invariant()
    def somebody_can_go_on(self):
        """Nobody waits for a request that waits itself."""
        waits = {row for row in self.rows if self.kv.held[row].waits}
        writers = {page.writer for page in self.kv.pool.prefix_cache.by_handle.values() if page.writer is not None}
        assert writers <= self.rows.keys()
        if waits and waits == self.rows.keys():
            trial = copy.deepcopy(self.kv)
            assert any(trial.can_advance(row) for row in list(trial.held))

    def compute(self, request: Request, num_pages: int):
        """The cells that a step computes of a request, group by group, and where it writes them: (unit, class, offset,
        cell)."""
        first, start = self.class_of(request), request.num_computed_tokens
        size, left = first.page_size, request.num_tokens - start
        assert left == 1 or start % size == 0, "a chunk starts at a page"
        stop = start + (1 if left == 1 else min(left, num_pages * size))
        pure = all(self.sees_what_it_would_alone(request, group) for group in range(len(first.groups)))
        cells, writes = [[] for _ in first.groups], []
        for position in range(start, stop):
            # A page that the chunk fills is written as such; a decoded token goes to the residual page if there is one.
            prefix = (request.model, *request.token_ids[: position + 1])
            for group, own in enumerate(first.groups):
                ends = left == 1 or self.in_residual(request, group, position, stop)
                in_residual = own.residual is not None and ends
                cell = Cell(prefix, own.precision, formats_of(own, in_residual), pure)
                cells[group].append(cell)
                unit = self.written_unit(request, group, position // size, in_residual)
                writes.append((unit, own.residual if in_residual else own, position % size, cell))
        return cells, writes

    def sees_what_it_would_alone(self, request: Request, group: int) -> bool:
        own, start = self.class_of(request).groups[group], request.num_computed_tokens
        seen, attended = self.read(request, start, group), range(own.first_token(start), start)
        tokens = request.token_ids
        return all(seen[i] == alone(own, tokens, i, self.in_residual(request, group, i, start)) for i in attended)

    def written_unit(self, request: Request, group: int, page: int, in_residual: bool) -> int:
        """Where the request writes; it must be alone in writing there, and nobody may rely on what is there."""
        held, kv = self.kv.held[request].groups[group], self.kv
        if in_residual:
            assert kv.pool.table.ref_counts[held.residual] == 1
            return kv.residual_unit(request, group)
        page_class, handle = held.page(page)
        assert page_class is self.class_of(request).groups[group]
        block = kv.pool.prefix_cache.by_handle.get(handle)
        if block is None:
            assert kv.pool.table.ref_counts[handle] == 1
        else:
            assert (block.ready, block.writer) == (False, request)
        return kv.page_unit(request, page, group)

    def close(self, request: Request, count: int) -> None:
        """A decoded token may have filled the residual page, which is then encoded into a page of its own."""
        stop = request.num_computed_tokens + count
        for group, own in enumerate(self.class_of(request).groups):
            if own.residual is None or request.num_tokens - request.num_computed_tokens > 1 or stop % own.page_size:
                continue
            unit = self.written_unit(request, group, stop // own.page_size - 1, in_residual=False)
            self.device.apply(Copy(self.kv.residual_unit(request, group), unit, own.residual, own))

    def as_kept(self, request: Request, group: int, cells: Cells) -> Cells:
        """Cells of residuals that have been closed meanwhile are in the full page's format."""
        own = self.class_of(request).groups[group]
        return [
            cell.encoded(own.kv_format)
            if cell and own.residual and len(cell.formats) == 1 and not self.in_residual(request, group, i, len(cells))
            else cell
            for i, cell in enumerate(cells)
        ]

    # -- memory ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(row.min_kv_precision for row in self.rows))
    @rule(data=st.data(), most=st.integers(1, 4), keep=st.integers(0, 2))
    def narrow(self, data, most, keep):
        request = pick(data, [row for row in self.rows if row.min_kv_precision])
        free_units = self.kv.pool.allocator.free_units
        what = self.kv.next_requantization(request, most, keep)
        number = 0 if what is None else what.group
        own, group = self.class_of(request).groups[number], self.kv.held[request].groups[number]
        dropped = group.num_dropped
        before, holding = self.formats(request, number), self.num_holding(request, number)
        count = 0 if what is None else self.kv.requantize_pages(request, what)
        self.run_operations()
        after = self.formats(request, number)
        changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        assert len(changed) == count <= most
        if not changed:
            return
        first, stop = changed[0], changed[-1] + 1
        assert changed == list(range(first, stop))
        assert stop <= len(before) - keep
        (old,), (new,) = set(before[first:stop]), set(after[first:stop])
        width = {c.precision: c.page_bytes for c in ALL_CLASSES if (c.model, c.group) == (own.model, own.group)}
        assert width[old] > width[new] >= width[request.min_kv_precision]
        # Of the widest format first, and of that the oldest that nobody else needs.
        alone = [i for i in range(len(before) - keep) if holding[i] == 1]
        assert all(holding[i] == 1 for i in changed)
        assert not any(width[before[i]] > width[old] for i in alone)
        assert not any(i < first and before[i] == old for i in alone)
        assert len(group.runs) <= MAX_RUNS
        assert self.kv.pool.allocator.free_units > free_units or self.kv.pool.allocator.policy != "elastic"
        cells = self.rows[request][number]
        (kv_format,) = {
            c.kv_format for c in ALL_CLASSES if (c.model, c.group, c.precision) == (own.model, own.group, new)
        }
        for position in range((dropped + first) * own.page_size, (dropped + stop) * own.page_size):
            cells[position] = cells[position].encoded(kv_format)
        self.narrowed.add(request)

    def begin_step(self):
        kv = self.kv
        kv.begin_step()
        if kv.num_free_slabs < kv.reserve_slabs and not kv.is_compacting:
            allocator, cache = kv.pool.allocator, kv.pool.prefix_cache
            enough = allocator.free_units + cache.evictable_units >= kv.reserve_slabs * allocator.slab_units
            assert not (enough and cache.evictable), "pages that nobody holds stand in the reserve's way"

    @precondition(lambda self: len(self.kv.pool.prefix_cache.evictable) > 20)
    @rule()
    def forget_prefixes(self):
        self.kv.pool.evict_all()
        assert not self.kv.pool.prefix_cache.evictable
        assert self.kv.pool.prefix_cache.evictable_units == 0

    # -- what must hold --------------------------------------------------------------------------------------------

    def check_batches(self) -> None:
        """The runner carries out the operations since the last step in batches, of which it promises that no copy
        writes what another one reads or writes."""
        for batch in _batches(self.operations, self.kv.pool.allocator.slab_units):
            if isinstance(batch[0], Copy):
                assert not list(clashes(batch))
        self.operations = []

    @invariant()
    def requests_read_back_what_they_should(self):
        self.run_operations()
        for request, groups in self.rows.items():
            for group, (own, cells) in enumerate(zip(self.class_of(request).groups, groups, strict=True)):
                assert request.num_computed_tokens == len(cells)
                found = self.read(request, len(cells), group)
                assert all(cell == known for cell, known in zip(found, cells, strict=True) if cell is not None)
                assert None not in found[own.first_token(len(cells)) :]
                if self.is_exact(request):
                    for i, cell in enumerate(found):
                        expected = alone(own, request.token_ids, i, self.in_residual(request, group, i, len(cells)))
                        assert cell in (None, expected)

    @invariant()
    def books_are_right(self):
        check_integrity(self.kv)
        assert self.kv.held.keys() == self.rows.keys()
        host = self.kv.host
        assert host.used_bytes == sum(saved.pages.num_units for saved in host.saved.values()) * UNIT_BYTES
        assert host.used_bytes <= host.max_bytes

    @invariant()
    def usage_adds_up(self):
        usage, places = measure_usage(self.kv), set()
        for request in self.rows:
            for group, own in enumerate(self.class_of(request).groups):
                first = own.first_token(request.num_computed_tokens)
                for segment in self.kv.segments(request, request.num_computed_tokens, group):
                    page_class = class_of_segment(request, segment, group)
                    for i in range(max(0, first - segment.first_position), segment.num_tokens):
                        page, offset = divmod(i, page_class.page_size)
                        places.add((page_class, segment.pages[page], offset))
        tokens = Counter(page_class for page_class, _, _ in places)
        for precision, row in usage.formats.items():
            mine = [c for c in ALL_CLASSES if c.precision == precision]
            exact = sum(tokens[c] * c.page_bytes / c.page_size for c in mine)
            assert row.cached_tokens == sum(tokens[c] for c in mine if not c.group)
            assert exact <= row.needed_bytes < exact + len(mine)
            assert row.needed_bytes <= row.reserved_bytes
            assert row.cached_bytes >= 0
        assert usage.cached_tokens == sum(not page_class.group for page_class, _, _ in places)
        assert usage.needed_bytes <= usage.reserved_bytes
        assert usage.reserved_bytes + usage.cached_bytes + usage.free_bytes >= usage.usable_bytes

    def teardown(self):
        if not hasattr(self, "rows"):
            return
        page_table.FEW = tags.FEW = FEW
        for request in [*self.rows, *self.waiting]:
            self.kv.release(request)
        self.rows.clear()
        self.kv.pool.evict_all()
        self.run_operations()
        self.check_batches()
        check_integrity(self.kv)
        assert len(self.kv.pool.allocator.free_slabs) == self.kv.pool.allocator.usable_slabs
        assert (len(self.kv.pool.table), self.kv.host.used_bytes, len(self.kv.pool.prefix_cache.by_handle)) == (0, 0, 0)


TestContents = ContentsMachine.TestCase
TestContents.settings = settings(max_examples=60, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
