"""The timeline: every bin shows the finest level of its tokens, and both pictures say the same."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.telemetry import timeline


def slow_grid(frames: list[timeline.Frame], bins: int) -> list[list[int]]:
    """Level of every single token, then the least of each bin."""
    total = max(context.tokens for _, context in frames)
    bins = min(bins, total)
    rows = []
    for _, context in frames:
        assert isinstance(context, WorkingContext)
        levels: list[int] = []
        for lod, span in zip(context.lod.tolist(), context.spans.tolist(), strict=True):
            levels += [lod] * span
        row = []
        for bin_number in range(bins):
            start, stop = bin_number * total // bins, (bin_number + 1) * total // bins
            inside = levels[start:stop]
            row.append(min(inside) if inside else timeline.ABSENT)
        rows.append(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(
    histories=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    bins=st.integers(1, 400),
    block=st.integers(2, 5),
    budget=st.integers(20, 60),
)
def test_grid_equals_the_slow_one(histories: list[int], bins: int, block: int, budget: int) -> None:
    frames: list[timeline.Frame] = [
        (number, WorkingContext.by_age(tokens, block, budget, 4)) for number, tokens in enumerate(histories)
    ]
    assert timeline.lod_grid(frames, bins).tolist() == slow_grid(frames, bins)


def growing(steps: int = 30) -> list[timeline.Frame]:
    return [(n, WorkingContext.by_age(2000 * (n + 1), 32, 256, 64)) for n in range(steps)]


def test_one_expanded_block_in_a_million_tokens_is_seen() -> None:
    coarse = WorkingContext.initial(1 << 20, 32, 256, 32)
    grid = timeline.lod_grid([(0, coarse)], 80)
    assert grid[0, :-1].min() >= 1
    assert grid[0, -1] == 0  # the tail


def test_text_shows_rows_counts_and_legend() -> None:
    text = timeline.timeline_text(growing(), width=60, rows=10)
    *rows, legend = text.split("\n")
    assert len(rows) == 11
    assert rows[1].split()[0] == "0"
    assert rows[-1].split()[0] == "29"
    assert all(row.endswith(("= 256", "= 226")) or int(row.rsplit("= ", 1)[1]) <= 256 for row in rows[1:])
    strip = rows[-1][9:69]
    assert strip[-1] == timeline.GLYPHS[0]
    assert strip[0] == timeline.GLYPHS[2]
    assert rows[1][9:69].rstrip() != rows[1][9:69]  # the history of the first refocus is shorter
    assert "█ raw tokens" in legend
    assert "▒ level 2" in legend
    assert "1,000 tokens" in legend


def test_png_shows_raw_brighter_than_gists() -> None:
    png = timeline.timeline_png(growing(6), "timeline", budget=256)
    image = matplotlib.image.imread(io.BytesIO(png))
    assert image.shape[1] > 1000
    brightness = [sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in timeline.level_colors(3)]
    assert brightness == sorted(brightness, reverse=True)
    pixels = (image[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for color in timeline.level_colors(2):  # every level of this history is in the picture
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(1) <= 1).sum() > 100


def test_many_refocuses_are_thinned_to_the_rows_asked_for() -> None:
    frames: list[timeline.Frame] = [(n, WorkingContext.all_raw(n + 1, 32)) for n in range(1000)]
    assert timeline.timeline_text(frames, 40, 7).count("\n") == 8
    assert timeline.timeline_text(frames, 40, 1).split("\n")[1].split()[0] == "999"
    assert timeline.glyph(30) == timeline.GLYPHS[-1]


def test_nothing_to_show_is_a_user_error() -> None:
    with pytest.raises(UserError, match="0 frames"):
        timeline.lod_grid([], 10)
    with pytest.raises(UserError, match="0 bins"):
        timeline.timeline_text(growing(1), width=0)
