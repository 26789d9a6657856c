"""Where the states of logits processors are kept: of each a table on the device, with a place for each request.

A state is a function of its request's tokens, so none is ever lost: whoever has no place any more (it was preempted,
and others needed it; a step failed) gets one, and its state is computed from the tokens.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.request.logits_processor import LogitsProcessor, get_logits_processor
from fineserve_jax.request.request import Request, RequestStatus
from fineserve_jax.request.sampling_params import MAX_LOGITS_PROCESSORS
from fineserve_jax.runner.logits_processing import Processing, ProcessorRows, advance
from fineserve_jax.runner.mesh import SAME, DeviceGroup
from fineserve_jax.runner.step_programs import StepPrograms


def start_state(
    processor: LogitsProcessor, prompt: Sequence[int], vocab_size: int, arguments: Mapping[str, Any]
) -> Any:
    """What the processor's `start` gives, as arrays of numpy of the dtypes that JAX would give them."""

    def as_array(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))

    return jax.tree.map(as_array, processor.start(prompt, vocab_size, **arguments))


@dataclass(slots=True)
class _Held:
    """The place of a request's state, and how many of its tokens are in it."""

    place: int
    num_tokens: int


class StateTable:
    """The states of one processor, on the device.

    Args:
        num_places: for requests, as many as a step can have.
        max_seq_len: most tokens of a request.

    Attributes:
        states: a tree of arrays [num_places + 1, ...], of which the first place is nobody's; whoever calls a program
            that takes them donated puts those back that it gives. None: there are none yet, or no more.
    """

    def __init__(
        self, processor: LogitsProcessor, vocab_size: int, group: DeviceGroup, num_places: int, max_seq_len: int
    ) -> None:
        self.processor, self._vocab_size, self._group = processor, vocab_size, group
        self._num_places, self._max_seq_len = num_places, max_seq_len
        self._shapes: Any = None
        self._held: dict[Request, _Held] = {}
        self.states: Any = None

    def forget(self) -> None:
        """Drops all states; those that are wanted are computed anew."""
        self.states = None
        self._held.clear()

    def rows_of(self, requests: Sequence[Request], num_rows: int) -> ProcessorRows:
        """What the step that samples these requests, padded to `num_rows`, does with the states of those that name the
        processor; they have places when this returns."""
        rows = ProcessorRows(*(np.zeros(num_rows, dtype) for dtype in (np.int32, np.bool_, np.int32)))
        named = {row: request for row, request in enumerate(requests) if names(request, self.processor)}
        if self.states is not None and any(leaf.is_deleted() for leaf in jax.tree.leaves(self.states)):
            self.forget()  # the program that took them did not come to its end
        self._make_room(set(named.values()))
        for row, request in named.items():
            held, known = self._held.get(request), request.num_tokens
            if held is None or held.num_tokens not in (known - 1, known):
                held = self._place(request)
            rows.places[row] = held.place
            rows.has_token[row], rows.tokens[row] = held.num_tokens < known, request.token_ids[-1]
            held.num_tokens = known
        if self.states is None:
            self._make_table()
        return rows

    def _make_room(self, wanted: Set[Request]) -> None:
        """Takes places from requests that have ended, and where those are too few from any that are not wanted."""
        for request in [r for r in self._held if r.status is RequestStatus.FINISHED]:
            del self._held[request]
        others = [request for request in self._held if request not in wanted]
        num_missing = len(self._held) + len(wanted - self._held.keys()) - self._num_places
        for request in others[: max(num_missing, 0)]:
            del self._held[request]

    def _place(self, request: Request) -> _Held:
        """Computes a request's state from its tokens, and puts it into its place, or into a free one."""
        prompt, arguments = request.prompt_token_ids, request.sampling.logits_processors[self.processor.name]
        state = self._group.put(start_state(self.processor, prompt, self._vocab_size, arguments))
        if self._shapes is None:
            self._shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        if self.states is None:
            self._make_table()
        if output := request.output_token_ids:
            tokens = np.zeros(self._max_seq_len, np.int32)
            tokens[: len(output)] = output
            state = _replay(self.processor, state, self._group.put(tokens), len(output))
        if request not in self._held:
            taken = {held.place for held in self._held.values()}
            free = next(place for place in range(1, self._num_places + 1) if place not in taken)
            self._held[request] = _Held(free, 0)
        held = self._held[request]
        self.states, held.num_tokens = _put(self.states, state, held.place), request.num_tokens
        return held

    def _make_table(self) -> None:
        sharding = self._group.sharding(SAME)
        self.states = jax.tree.map(
            lambda leaf: jnp.zeros((self._num_places + 1, *leaf.shape), leaf.dtype, device=sharding), self._shapes
        )


class LogitsProcessing:
    """The processors that requests of a runner have named, and their states.

    Args:
        vocab_size: of the model.
        group: its devices.
        num_places, max_seq_len: of the tables.
    """

    def __init__(self, vocab_size: int, group: DeviceGroup, num_places: int, max_seq_len: int) -> None:
        self._group = group
        self._new_table = functools.partial(
            StateTable, vocab_size=vocab_size, group=group, num_places=num_places, max_seq_len=max_seq_len
        )
        self._tables: dict[str, StateTable] = {}

    def forget(self) -> None:
        """Drops all states; those that are wanted are computed anew."""
        for table in self._tables.values():
            table.forget()

    def call_head(self, programs: StepPrograms, requests: Sequence[Request], num_rows: int, *arguments: Any) -> Any:
        """What `step.head` gives for these arguments, which are on the device, with the processors of the requests that
        are sampled: where none names any, the program is that without."""
        named = {name for request in requests for name in request.sampling.logits_processors}
        if not named:
            return programs.head(*arguments)
        self._use(named)
        tables = self._tables.values()
        rows = tuple(table.rows_of(requests, num_rows) for table in tables)
        processing = programs.put(self._group, Processing(rows, *self._order(requests, num_rows)))
        head = programs.processed_head(tuple(table.processor for table in tables))
        outputs, states = head(*arguments, tuple(table.states for table in tables), processing)
        for table, own in zip(tables, states, strict=True):
            table.states = own
        return outputs

    def _use(self, named: Iterable[str]) -> None:
        """Makes tables for processors that were not named before. They stand in the order of their names, so that
        programs are the same in whatever order they were met."""
        for name in named:
            if name not in self._tables:
                self._tables[name] = self._new_table(get_logits_processor(name))
        self._tables = dict(sorted(self._tables.items()))

    def _order(self, requests: Sequence[Request], num_rows: int) -> tuple[np.ndarray, np.int32]:
        """See `Processing`."""
        numbers = {name: number for number, name in enumerate(self._tables)}
        order = np.full((num_rows, MAX_LOGITS_PROCESSORS), -1, np.int32)
        for row, request in enumerate(requests):
            own = [numbers[name] for name in request.sampling.logits_processors]
            order[row, : len(own)] = own
        return order, np.int32(max((order >= 0).sum(axis=1), default=0))


def names(request: Request, processor: LogitsProcessor) -> bool:
    """Whether a request wants a processor. One that has ended wants none: what is sampled for it counts no more."""
    return processor.name in request.sampling.logits_processors and request.status is not RequestStatus.FINISHED


@functools.partial(jax.jit, donate_argnums=0)
def _put(table: Any, state: Any, place: int) -> Any:
    """The table with a state in a place."""
    return jax.tree.map(lambda array, own: array.at[place].set(own), table, state)


@functools.partial(jax.jit, static_argnums=0)
def _replay(processor: LogitsProcessor, state: Any, tokens: jax.Array, count: int) -> Any:
    """The state with the first `count` of the tokens more."""
    return lax.fori_loop(0, count, lambda i, state: advance(processor, state, tokens[i]), state)
