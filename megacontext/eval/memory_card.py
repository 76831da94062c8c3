"""The results of a memory evaluation for people: a table of text, and one picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

_COLORS = {
    "window": "#94a3b8", "sinks": "#64748b", "mean_age": "#a16207", "gist_age": "#d97706", "random": "#9333ea",
    "bm25": "#0891b2", "flat": "#059669", "ours": "#2563eb", "oracle": "#dc2626", "full": "#0f172a",
}  # fmt: skip
_HEAD = (
    "method", "entries", "nll", "Δnll", "95 %", "below window", "95 %", "cgr", "95 %", "key nll", "ours better by", "95 %", "recall", "regret",
    "ms/token", "MFLOP/token", "recompute",
)  # fmt: skip


def memory_table(result: Mapping[str, Any]) -> str:
    """One block a history: what there is to win, then a line a method. Brackets are 95 % intervals."""
    blocks = []
    for far in result["far_context"]:
        rows = [row for row in result["rows"] if row["history"] == far["history"]]
        blocks.append("\n".join([_far_line(far, result["config"]), *_columns([_HEAD, *(_cells(row) for row in rows)])]))
    if result.get("substitution"):
        parts = ", ".join(f"{part['kl']:.4f} at {part['blocks_back']}" for part in result["substitution"])
        blocks.append(f"a gist for a raw block, KL in nats per token by blocks back: {parts}")
    return "\n\n".join(blocks)


def memory_plot(result: Mapping[str, Any]) -> bytes:
    """PNG: CGR at the longest history (nats below the window where there is no CGR), with intervals; loss, and time per
    token, against the length of the history."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config, rows = result["config"], result["rows"]
    longest = max(row["history"] for row in rows)
    figure = Figure(figsize=(14, 4.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{config['budget']:,} entries, horizon {config['horizon']} tokens, {config['windows']} windows of "
        f"{config['documents']} documents", fontsize=12, fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip
    share, loss, cost = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _forest(share, [row for row in rows if row["history"] == longest and row["method"] != "window"], longest)
    _lines(loss, rows, "nll", "nats per token of what follows")
    _lines(
        cost, [row for row in rows if row.get("ms_per_token")], "ms_per_token", "ms per decoded token, refocus included"
    )
    cost.set_ylim(bottom=0)
    handles, names = loss.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _far_line(far: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    note = "" if far["clear"] else "  (too little for shares of it to say much)"
    share = far["share_of_gap"]
    held = "" if share is None else f", which hold {100 * share:.0f} % of it"
    return (
        f"history {far['history']:,} tokens: nll_window - nll_full = {far['gap']:.4f} nats per token "
        f"[{far['gap_low']:.4f}, {far['gap_high']:.4f}], full sees {far['full_tokens']:,}{note}\n"
        f"key tokens: the {100 * far['key_share']:.1f} % that full helps most{held}; budget {config['budget']:,} entries"
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: str = ".4f", scale: float = 1.0) -> str:
        value = row.get(name)
        return "-" if value is None else format(value * scale, form)

    def bounds(name: str, form: str = ".3f") -> str:
        return (
            "-"
            if row.get(f"{name}_low") is None
            else f"[{number(f'{name}_low', form)}, {number(f'{name}_high', form)}]"
        )

    return (
        row["method"], number("entries", ".0f"), number("nll"), number("delta_nll"), bounds("delta_nll"),
        number("below_window"), bounds("below_window"), number("cgr", ".3f"), bounds("cgr", ".2f"), number("key_nll"), number("ours_better_by"), bounds("ours_better_by"),
        number("lens_recall", ".2f"), number("lens_regret"), number("ms_per_token", ".2f"),
        number("flops_per_token", ".1f", 1e-6), number("recompute", ".2f"),
    )  # fmt: skip


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _forest(panel: Any, rows: Sequence[Mapping[str, Any]], history: int) -> None:
    has_cgr = any(row["cgr"] is not None for row in rows)
    figure = "cgr" if has_cgr else "below_window"
    shown = [row for row in rows if row[figure] is not None and row[f"{figure}_low"] is not None]
    for place, row in enumerate(shown):
        color = _COLORS.get(row["method"], "#475569")
        panel.plot([row[f"{figure}_low"], row[f"{figure}_high"]], [place, place], color=color, linewidth=3, alpha=0.5)
        panel.plot([row[figure]], [place], color=color, marker="o", markersize=7)
    panel.set_yticks(range(len(shown)), [row["method"] for row in shown])
    panel.invert_yaxis()
    panel.axvline(0, color="#94a3b8", linewidth=1.2, linestyle="--")
    if has_cgr:
        panel.axvline(1, color="#0f172a", linewidth=1.2, linestyle="--")
    label = "share of far context's worth (0: window, 1: full)" if has_cgr else "nats per token below the window"
    panel.set_xlabel(label)
    title = "CGR" if has_cgr else "no CGR: full is not better than window; losses"
    panel.set_title(f"{title} at {history:,} tokens, 95 % intervals", fontsize=10, loc="left")
    _dress(panel)


def _lines(panel: Any, rows: Sequence[Mapping[str, Any]], figure: str, label: str) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row["history"], row[figure]) for row in rows if row["method"] == method)
        panel.plot(
            [x for x, _ in points], [y for _, y in points], label=method, color=_COLORS.get(method, "#475569"),
            linewidth=2.4 if method == "ours" else 1.3, marker="o", markersize=4,
        )  # fmt: skip
    histories = sorted({row["history"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(histories, [f"{tokens:,}" for tokens in histories])
    panel.minorticks_off()
    panel.set_xlabel("tokens of history")
    panel.set_title(label, fontsize=10, loc="left")
    _dress(panel)


def _dress(panel: Any) -> None:
    panel.grid(visible=True, color="#e2e8f0", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
