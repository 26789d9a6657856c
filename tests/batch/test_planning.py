"""Rows that begin alike come after each other, and no row waits long for them."""

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.entrypoints.batch import planning
from fineserve_jax.entrypoints.batch.common_tokens import CommonTokens
from fineserve_jax.entrypoints.batch.planning import BEGINNING, RowPlan
from fineserve_jax.entrypoints.batch.rows import BatchRow
from fineserve_jax.request.request_options import RequestOptions

LONG = "x" * BEGINNING


def row(line: int, group: str, form: str = "text", **options: str) -> BatchRow:
    beginning = f"{group}{LONG}"
    if form == "text":
        return BatchRow(line, line, prompt=f"{beginning} {line}", options=RequestOptions(**options))
    if form == "ids":
        ids = [ord(char) for char in beginning]
        return BatchRow(line, line, prompt=[*ids, line], options=RequestOptions(**options))
    messages = [{"role": "system", "content": beginning}, {"role": "user", "content": str(line)}]
    return BatchRow(line, line, messages=messages, options=RequestOptions(**options))


def planned(rows: list[BatchRow], num_ahead: int) -> list[int]:
    """Lines as they are handed out, with rows read as a job reads them."""
    plan, unread, lines = RowPlan(num_ahead), iter(rows), []
    while True:
        if plan.has_room and (read := next(unread, None)) is not None:
            plan.add(read)
        elif (taken := plan.pop()) is not None:
            lines.append(taken.line)
            assert len(plan) < num_ahead
        else:
            assert len(plan) == 0
            return lines


@pytest.mark.parametrize("form", ["text", "ids", "messages"])
def test_rows_that_begin_alike_come_after_each_other(form):
    rows = [row(line, group, form) for line, group in enumerate("abacba")]
    assert planned(rows, 6) == [0, 2, 5, 1, 4, 3]
    assert planned(rows, 1) == [0, 1, 2, 3, 4, 5]


def test_rows_that_cannot_share_pages_are_not_brought_together():
    rows = [row(line, "a", kv_precision=name) for line, name in enumerate(["int8", "bf16", "int8"])]
    assert planned(rows, 3) == [0, 2, 1]


def test_rows_with_little_in_common_come_as_they_are_read():
    rows = [BatchRow(line, line, prompt=f"{'alike' * (line % 2)} {line}") for line in range(9)]
    assert planned(rows, 9) == list(range(9))


@given(groups=st.lists(st.sampled_from("abcd"), max_size=60), num_ahead=st.integers(1, 12))
def test_every_row_comes_once_and_none_is_left_waiting(groups, num_ahead):
    rows = [row(line, group) for line, group in enumerate(groups)]
    order = planned(rows, num_ahead)
    assert sorted(order) == list(range(len(rows)))
    for group in set(groups):
        own = [line for line in order if groups[line] == group]
        assert own == sorted(own), "of rows that begin alike, those read first come first"
    for line in range(len(rows)):
        others = [groups[other] for other in order[: order.index(line)] if other > line]
        assert max(Counter(others).values(), default=0) < 2 * num_ahead, "a group overtook a row again and again"


def test_long_rows_are_not_read_far_ahead(monkeypatch):
    monkeypatch.setattr(planning, "MAX_CHARACTERS", 4 * BEGINNING)
    rows = [row(line, "ab"[line % 2]) for line in range(12)]
    order = planned(rows, 100)
    assert sorted(order) == list(range(12))
    assert all(abs(line - place) <= 4 for place, line in enumerate(order))


def request(token_ids: list[int], root: bytes = b"", shareable: int | None = None) -> SimpleNamespace:
    most = len(token_ids) - 1 if shareable is None else shareable
    sizes = {"num_prompt_tokens": len(token_ids), "num_shareable_tokens": most}
    return SimpleNamespace(token_ids=token_ids, prefix_root=root, **sizes)


def test_tokens_that_an_earlier_prompt_begins_with_are_counted_in_whole_blocks():
    common = CommonTokens(page_size=4)
    assert common.note(request(list(range(14)))) == 0
    assert common.note(request([*range(10), 99, 98])) == 8
    assert common.note(request(list(range(12)))) == 8, "the last token is computed in any case"
    assert common.note(request(list(range(14)), b"another format")) == 0
    assert common.note(request([7, *range(13)])) == 0, "the same tokens in another place"
    assert common.note(request(list(range(100, 114))), num_samples=3) == 2 * 12, "samples share with the first"
    assert common.note(request(list(range(14)), shareable=7)) == 4, "what follows is scored"
    assert common.note(request(list(range(14)), shareable=0)) == 0
