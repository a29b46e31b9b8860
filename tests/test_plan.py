from __future__ import annotations

import pytest

from vllm_dualpath.plan import ReadPlan, Segment


@pytest.mark.parametrize(
    ("num_hit_blocks", "segments"),
    [(0, ()), (4, (Segment("a", 0, 4),)), (4, (Segment("a", 0, 1), Segment("b", 1, 4)))],
)
def test_an_ordered_cover_is_a_plan(num_hit_blocks: int, segments: tuple[Segment, ...]) -> None:
    plan = ReadPlan(num_hit_blocks, segments)
    assert sum(segment.num_blocks for segment in plan.segments) == num_hit_blocks


@pytest.mark.parametrize(
    ("num_hit_blocks", "segments"),
    [
        (4, ()),
        (0, (Segment("a", 0, 1),)),
        (4, (Segment("a", 0, 3),)),
        (4, (Segment("a", 1, 4),)),
        (4, (Segment("a", 0, 2), Segment("b", 3, 4))),
        (4, (Segment("a", 0, 3), Segment("b", 2, 4))),
        (4, (Segment("b", 2, 4), Segment("a", 0, 2))),
        (4, (Segment("a", 0, 0), Segment("b", 0, 4))),
        (4, (Segment("a", 0, 6), Segment("b", 6, 4))),
    ],
    ids=["nothing", "too much", "short", "late", "gap", "overlap", "order", "empty", "backwards"],
)
def test_anything_else_is_no_plan(num_hit_blocks: int, segments: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError, match="read plan"):
        ReadPlan(num_hit_blocks, segments)


@pytest.mark.parametrize(("num_cached", "segments"), [(4, ()), (1, (Segment("a", 1, 4),))])
def test_cached_blocks_are_read_by_nobody(num_cached: int, segments: tuple[Segment, ...]) -> None:
    assert ReadPlan(4, segments, num_cached).segments == segments


@pytest.mark.parametrize(
    ("num_cached", "segments"),
    [(5, ()), (-1, (Segment("a", -1, 4),)), (1, (Segment("a", 0, 4),)), (1, ())],
    ids=["past the hit", "negative", "read too", "unread"],
)
def test_wrong_cached_blocks(num_cached: int, segments: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError, match="read plan"):
        ReadPlan(4, segments, num_cached)
