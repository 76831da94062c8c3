"""Loss curves as PNG: one figure a metric, one panel an axis (tokens, FLOPs, seconds), one line a stage."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

AXES = (
    ("total_tokens", "tokens"),
    ("total_training_flops", "training FLOPs"),
    ("total_training_time", "training seconds"),
)
_COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#475569")
_SMOOTH_FROM = 40  # records of a stage from which a running mean is drawn over the raw curve


def plot_metric(
    records: Sequence[Mapping[str, Any]],
    metric: str,
    label: str,
    title: str,
    reference: Mapping[str, float] | None = None,
) -> bytes | None:
    """PNG bytes of a metric against the three axes, or None when fewer than two records have it.

    records: those of metrics.jsonl. reference: named horizontal lines, such as the bpb of an n-gram model.
    """
    curves = _curves(records, metric)
    if sum(len(points) for points in curves.values()) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (axis, axis_label) in zip(panels, AXES, strict=True):
        for color, (stage, points) in zip(_cycle(len(curves)), curves.items(), strict=True):
            pairs = [(point[axis], point[metric]) for point in points if _finite(point.get(axis))]
            _draw(panel, pairs, stage, color)
        for style, (name, value) in zip(("--", ":", "-."), (reference or {}).items(), strict=False):
            panel.axhline(value, color="#64748b", linewidth=1.1, linestyle=style, label=f"{name} {value:.3f}")
        _dress(panel, axis_label)
    panels[0].set_ylabel(label)
    handles, names = panels[-1].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right upper", fontsize=9, frameon=False
    )  # beside the curves, not on them
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place; shorter at the start."""
    out: list[float] = []
    total = 0.0
    for place, value in enumerate(values):
        total += value
        if place >= window:
            total -= values[place - window]
        out.append(total / min(place + 1, window))
    return out


def _curves(records: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[Mapping[str, Any]]]:
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if _finite(record.get(metric)):
            curves.setdefault(str(record.get("stage", "run")), []).append(record)
    return curves


def _draw(panel: Any, pairs: Sequence[tuple[float, float]], stage: str, color: str) -> None:
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    if len(xs) >= _SMOOTH_FROM:
        panel.plot(xs, ys, color=color, linewidth=0.7, alpha=0.3)
        panel.plot(xs, running_mean(ys, max(2, len(ys) // 40)), color=color, linewidth=1.8, label=stage)
    else:
        panel.plot(xs, ys, color=color, linewidth=1.8, marker="o", markersize=3.5, label=stage)


def _dress(panel: Any, axis_label: str) -> None:
    panel.set_xlabel(axis_label)
    panel.set_xlim(left=0)
    panel.locator_params(axis="x", nbins=5)
    panel.grid(visible=True, color="#e2e8f0", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.ticklabel_format(axis="x", style="sci", scilimits=(-2, 5), useMathText=True)


def _cycle(count: int) -> list[str]:
    return [_COLORS[index % len(_COLORS)] for index in range(count)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
