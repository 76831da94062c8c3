"""Turns a report into Markdown and into a card for a terminal; both show numbers of report.json and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megacontext.telemetry.targets import Verdict, judge

if TYPE_CHECKING:
    from megacontext.telemetry.report import Report

CARD_TITLE = "report card"
_VAL_BPB = ("val/bpb", "val_bpb")
_ON_CARD = ("core", "chat_core", "delta_nll", "cgr", "key_nll", "lens_recall", "lens_regret")
_HEADER = ("total", "hardware")  # groups of report.json that are no stage


def show(value: float) -> str:
    """A number for people: counts in full with separators, huge ones in scientific form, the rest rounded."""
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.4g}"
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4
    return f"{value:,.{digits}f}"


def by_stage(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`{"a/b/c": v}` as `{"a": {"b/c": v}}`, without the header's groups."""
    stages: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        stage, _, metric = key.partition("/")
        if stage not in _HEADER:
            stages.setdefault(stage, {})[metric] = value
    return stages


def comparison(numbers: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """(what, key, bits per byte) of every model and of the n-gram models, on validation text."""
    rows = []
    for stage, metrics in by_stage(numbers).items():
        rows += [
            (f"n-gram: {name}", f"{stage}/{name}_bpb", metrics[f"{name}_bpb"])
            for name in ("unigram", "bigram")
            if f"{name}_bpb" in metrics
        ]
        found = next((name for name in _VAL_BPB if name in metrics), None)
        if found is not None:
            rows.append((f"model: {stage}", f"{stage}/{found}", metrics[found]))
    return sorted(rows, key=lambda row: (row[0].startswith("model"), -row[2]))


def render_markdown(report: Report) -> str:
    """report.md."""
    parts = [f"# Report of run `{report.name}`", _header(report), _summary(report), _targets(report), _pictures(report)]
    parts += [
        _stage(stage, metrics, report.texts.get(stage, {})) for stage, metrics in by_stage(report.numbers).items()
    ]
    if report.config:
        parts.append(f"## Configuration\n\n```yaml\n{report.config}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def render_card(report: Report) -> str:
    """The card that ends a pipeline in a terminal."""
    numbers = report.numbers
    stages = by_stage(numbers)
    lines = [f"──── {CARD_TITLE}: {report.name} " + "─" * 30]
    for stage, metrics in stages.items():
        cost = f"{show(metrics['seconds'])} s" if "seconds" in metrics else ""
        flops = f"{show(metrics['flops'])} FLOPs" if metrics.get("flops") else ""
        lines.append(f"  {stage:<14}{cost:>14}  {flops}".rstrip())
    lines.append(f"  {'total':<14}{show(numbers['total/seconds']) + ' s':>14}  {show(numbers['total/flops'])} FLOPs")
    rows = comparison(numbers)
    if rows:
        lines.append("  bits per byte on validation text (lower is better)")
        lines += [f"    {what:<24}{show(value):>10}" for what, _, value in rows]
    for key in numbers:
        if key.rsplit("/", 1)[-1] in _ON_CARD:
            lines.append(f"  {key}: {show(numbers[key])}")
    lines += [f"  {_mark(verdict)} {_miss(verdict)}" for verdict in _verdicts(report) if verdict.state != "ok"]
    lines.append(f"  report: {report.run_dir}/report/report.md")
    return "\n".join(lines)


def _header(report: Report) -> str:
    source, numbers = report.provenance, report.numbers
    hardware = source.get("hardware", {})
    gpus = ", ".join(sorted({gpu["name"] for gpu in hardware.get("gpus", [])}))
    versions = ", ".join(f"{name} {version}" for name, version in source.get("versions", {}).items())
    rows = [
        ("revision", f"`{source.get('revision', 'unknown')}`"),
        ("started", str(source.get("started", "unknown"))),
        ("command", f"`{source.get('command', 'unknown')}`"),
        ("processor", f"{hardware.get('cpu', 'unknown')}, {show(numbers['hardware/cpu_cores'])} cores, {show(numbers['hardware/ram_gib'])} GiB"),
        ("GPUs", f"{show(numbers['hardware/gpus'])} {gpus}".strip()),
        ("versions", versions),
        ("cost", f"{show(numbers['total/seconds'])} s, {show(numbers['total/flops'])} FLOPs"),
        ("run folder", f"`{report.run_dir}`"),
    ]  # fmt: skip
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _summary(report: Report) -> str:
    rows = comparison(report.numbers)
    if not rows:
        return ""
    table = "| on validation text | bits per byte | entry of report.json |\n|---|---:|---|\n"
    return "## Summary\n\n" + table + "\n".join(f"| {what} | {show(value)} | `{key}` |" for what, key, value in rows)


def _verdicts(report: Report) -> list[Verdict]:
    return judge(report.numbers, has_gpu=report.numbers.get("hardware/gpus", 0) > 0)


def _mark(verdict: Verdict) -> str:
    return {"ok": "✓", "miss": "△", "ALERT": "✗"}[verdict.state]


def _miss(verdict: Verdict) -> str:
    says = f"{_state(verdict)}: " if _state(verdict) != verdict.state else f"{verdict.state} "
    return f"{says}{verdict.key} = {show(verdict.value)}, target {verdict.target.aim}: look at {verdict.target.look_at}"


def _state(verdict: Verdict) -> str:
    """`ok`, `miss` or `ALERT`; an alert with what it means where the target says so."""
    meaning = verdict.target.verdict if verdict.state == "ALERT" else ""
    return f"{verdict.state}: {meaning}" if meaning else verdict.state


def _targets(report: Report) -> str:
    verdicts = _verdicts(report)
    if not verdicts:
        return ""
    lines = ["## Targets", "", "| | metric | value | target | alert | look at |", "|---|---|---:|---|---|---|"]
    for v in verdicts:
        advice = "" if v.state == "ok" else v.target.look_at
        lines.append(
            f"| {_mark(v)} {_state(v)} | `{v.key}` | {show(v.value)} | {v.target.aim} | {v.target.alert} | {advice} |"
        )
    return "\n".join(lines)


def _pictures(report: Report) -> str:
    if not report.plots:
        return ""
    return "## Curves\n\n" + "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in report.plots)


def _stage(stage: str, metrics: Mapping[str, float], texts: Mapping[str, Any]) -> str:
    lines = [f"## {stage}", "", "| metric | value |", "|---|---:|"]
    lines += [f"| {name} | {show(value)} |" for name, value in metrics.items()]
    for key, value in texts.items():
        text, name = _plain(value), key.removeprefix(f"{stage}/")
        if "\n" not in text and not isinstance(value, list | tuple):
            lines += ["", f"{name}: `{text}`"]
            continue
        fence = "````" if "```" in text else "```"
        lines += ["", f"**{name}**", "", f"{fence}text", text, fence]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Texts of a stage: a string as it is, a list one entry a line, a pair (prompt, continuation) joined by an arrow."""
    if not isinstance(value, list | tuple):
        return str(value).rstrip()
    return "\n".join(
        " → ".join(str(part).strip() for part in entry) if isinstance(entry, list | tuple) else str(entry)
        for entry in value
    )
