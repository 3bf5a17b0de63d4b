"""`ImageLayout`: grids, draft grids, and their tokens."""

from __future__ import annotations

import pytest

from ssd_cache.layout import ImageLayout

LAYOUTS = [ImageLayout((3, 2)), ImageLayout((3, 2), ((2, 5),)), ImageLayout((1, 4), ((2, 2), (1, 3)))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_are_those_of_all_grids(layout):
    assert layout.num_tokens == sum(rows * columns for rows, columns in layout.grids)
    assert layout.num_draft_tokens == layout.num_tokens - layout.grid[0] * layout.grid[1]
    assert sum(layout.row_lengths) == layout.num_tokens
    assert max(layout.row_lengths) == layout.widest


def test_layouts_of_equal_grids_are_equal_whatever_the_sequences():
    layout = ImageLayout([36, 24], [[19, 13]])
    assert layout == ImageLayout((36, 24), ((19, 13),))
    assert len({layout, ImageLayout((36, 24), ((19, 13),)), ImageLayout((36, 24))}) == 2
    assert (str(layout), layout.text()) == ("19x13+36x24", "19 x 13+36 x 24")
    assert layout.as_json() == {"grid": [36, 24], "previews": [[19, 13]]}
    assert ImageLayout((24, 24)).as_json() == {"grid": [24, 24]}


@pytest.mark.parametrize("grid", [(0, 2), (2, 4097), (2, 3, 1), (2.0, 2), (True, 2), "24x24", 24, None])
def test_grids_that_are_none_are_refused(grid):
    with pytest.raises(ValueError, match=r"grid=.*give \(rows, columns\), integers from 1 to 4096"):
        ImageLayout(grid)
    with pytest.raises(ValueError, match=r"grid=.*give \(rows, columns\), integers from 1 to 4096"):
        ImageLayout((2, 2), (grid,))


@pytest.mark.parametrize("draft_grids", [((2, 2),) * 9, "2x2", 3, None])
def test_draft_grids_that_are_none_are_refused(draft_grids):
    with pytest.raises(ValueError, match="previews=.*give at most 8 draft grids"):
        ImageLayout((2, 2), draft_grids)
