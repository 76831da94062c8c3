"""A history's focus as a picture: one row a refocus, tokens from left to right, colour by level of detail.

A pixel or character covers many tokens of a long history; it shows the finest level among them, so that a few expanded
blocks in a million tokens are still seen. How much of each level there is stands beside the row.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megacontext.errors import UserError

I64 = npt.NDArray[np.int64]
GLYPHS = "█▓▒░+=:."  # level 0, 1, …; the last stands for all levels above
ABSENT = -1  # tokens that had not come yet


class Tiling(Protocol):
    """Ordered nodes that tile a history, as `context.WorkingContext` is: level and first token of each entry [L]."""

    @property
    def lod(self) -> I64: ...
    @property
    def starts(self) -> I64: ...
    @property
    def tokens(self) -> int: ...


Frame = tuple[int, Tiling]
"""(number of the refocus, the context after it)."""


def lod_grid(frames: Sequence[Frame], bins: int) -> I64:
    """Finest level per frame and bin, int64 [frames, bins]; ABSENT where a frame's history had not come so far.

    Bins share the longest history equally; a history of fewer tokens than bins has one bin a token. Raises UserError
    without frames, without tokens, or for fewer than one bin.
    """
    total = max((context.tokens for _, context in frames), default=0)
    if not total or bins < 1:
        raise UserError(f"a timeline of {len(frames)} frames, {total} tokens and {bins} bins shows nothing.")
    bins = min(bins, total)
    edges = np.arange(bins + 1, dtype=np.int64) * total // bins
    grid = np.full((len(frames), bins), ABSENT, np.int64)
    for row, (_, context) in enumerate(frames):
        seen = int(np.searchsorted(edges[:-1], context.tokens))  # bins that begin within this history
        if not seen:
            continue
        first = np.searchsorted(context.starts, edges[:seen], side="right") - 1
        stop = np.searchsorted(context.starts, edges[1 : seen + 1], side="left")
        pairs = np.stack([first, stop], 1).reshape(-1)  # reduceat over [first, stop), then over what is between: unused
        levels = np.concatenate([context.lod, np.full(1, np.iinfo(np.int64).max)])
        grid[row, :seen] = np.minimum.reduceat(levels, pairs)[::2]
    return grid


def timeline_text(frames: Sequence[Frame], width: int = 96, rows: int = 24) -> str:
    """The timeline for a terminal: at most `width` characters of history and `rows` lines, evenly chosen, the last kept."""
    chosen = _chosen(frames, rows)
    grid = lod_grid(chosen, width)
    top = max(int(context.lod.max(initial=0)) for _, context in chosen)
    lines = [f"refocus  {'oldest token':<{max(0, grid.shape[1] - 6)}}newest  entries by level 0, 1, …"]
    for (refocus, context), levels in zip(chosen, grid, strict=True):
        strip = "".join(" " if level == ABSENT else glyph(int(level)) for level in levels)
        counts = " + ".join(str(n) for n in np.bincount(context.lod, minlength=1))
        lines.append(f"{refocus:>7}  {strip}  {counts} = {len(context.lod)}")
    names = ", ".join(f"{glyph(level)} {_name(level)}" for level in range(min(top, len(GLYPHS) - 1) + 1))
    lines.append(f"finest level of {_per_bin(chosen, grid)} tokens: {names}")
    return "\n".join(lines)


def timeline_png(frames: Sequence[Frame], title: str, budget: int | None = None, rows: int = 400) -> bytes:
    """The timeline as PNG bytes: the strip of levels, and beside it the entries of each level against the budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    chosen = _chosen(frames, rows)
    grid = lod_grid(chosen, 1024)
    top = max(int(context.lod.max(initial=0)) for _, context in chosen)
    colors = level_colors(top)
    figure = Figure(figsize=(13, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    strip, cost = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    shown = np.ma.masked_equal(grid, ABSENT)
    norm = BoundaryNorm(np.arange(top + 2) - 0.5, top + 1)
    total = max(context.tokens for _, context in chosen)
    extent = (0.0, float(total), len(chosen) - 0.5, -0.5)
    strip.imshow(shown, cmap=ListedColormap(colors), norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    strip.set_facecolor("#f1f5f9")
    strip.set_xlabel("token position")
    strip.set_ylabel("refocus (newest below)")
    ticks = np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), 12)).round().astype(int))
    strip.set_yticks(ticks, [str(chosen[row][0]) for row in ticks])
    counts = np.stack([np.bincount(context.lod, minlength=top + 1) for _, context in chosen])
    left = np.zeros(len(chosen))
    for level in range(top + 1):
        cost.barh(np.arange(len(chosen)), counts[:, level], 1.0, left, color=colors[level])
        left += counts[:, level]
    if budget is not None:
        cost.axvline(budget, color="#dc2626", linewidth=1.2, linestyle="--")
        cost.set_title(f"budget {budget:,}", fontsize=9, color="#dc2626")
    cost.set_xlabel("entries")
    handles = [Patch(color=color, label=_name(level)) for level, color in enumerate(colors)]
    handles.append(Patch(facecolor="#f1f5f9", edgecolor="#cbd5e1", label="not there yet"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def level_colors(top: int) -> list[str]:
    """One colour per level 0..top: raw tokens bright, every level above darker."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    ramp = colormaps["inferno"]
    return [to_hex(ramp(0.9 - 0.75 * level / max(top, 1))) for level in range(top + 1)]


def glyph(level: int) -> str:
    """The character of a level."""
    return GLYPHS[min(level, len(GLYPHS) - 1)]


def _name(level: int) -> str:
    return "raw tokens" if level == 0 else f"level {level}" + (" and above" if level == len(GLYPHS) - 1 else "")


def _per_bin(frames: Sequence[Frame], grid: I64) -> str:
    return f"{max(context.tokens for _, context in frames) / grid.shape[1]:,.4g}"


def _chosen(frames: Sequence[Frame], rows: int) -> list[Frame]:
    """At most `rows` frames (at least one), evenly spaced, the last among them."""
    kept = max(1, min(rows, len(frames)))
    return [frames[at] for at in np.linspace(len(frames) - 1, 0, kept).round().astype(int)[::-1]] if frames else []
