"""`ImageLayout`: grids, draft grids, and the place of each token."""

from __future__ import annotations

import pytest

from ssd_cache.layout import ImageLayout

LAYOUTS = [ImageLayout((3, 2)), ImageLayout((3, 2), ((2, 5),)), ImageLayout((1, 4), ((2, 2), (1, 3)))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_come_grid_by_grid_and_row_by_row(layout):
    places = [
        (index, row, column)
        for index, (rows, columns) in enumerate(layout.grids)
        for row in range(rows)
        for column in range(columns)
    ]
    assert [layout.place_of(token) for token in range(layout.num_tokens)] == places
    assert [layout.token_at(*place) for place in places] == list(range(layout.num_tokens))
    assert sum(index < len(layout.draft_grids) for index, _, _ in places) == layout.num_draft_tokens
    assert sum(layout.row_lengths) == layout.num_tokens
    assert max(layout.row_lengths) == layout.widest
    for token in (-1, layout.num_tokens):
        with pytest.raises(ValueError, match=f"token {token} is outside the {layout.num_tokens} visual tokens"):
            layout.place_of(token)


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
