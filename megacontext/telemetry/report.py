"""The report card of a run: `report/report.json` (flat numbers), `report/report.md`, loss plots and stages' pictures.

Stages leave `<run_dir>/stages/<stage>.json`, and pictures in `<run_dir>/pictures/`; curves come from `metrics.jsonl`. Every number of report.md is an entry
of report.json, so nothing can be said that was not measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacontext import storage
from megacontext.errors import UserError
from megacontext.stages import STAGES
from megacontext.telemetry import plots, provenance
from megacontext.telemetry.metrics_file import read_metrics
from megacontext.telemetry.render import render_card, render_markdown

_PLOTS = (
    ("train_loss", "train/loss", "nats per token", "Training loss"),
    ("val_bpb", "val/bpb", "bits per byte", "Validation bits per byte"),
)
# Noisy per-step figures: the report gives their median over the stage; of other curves it gives the last value.
_MEDIANS = ("train/dt", "train/tok_per_sec", "train/mfu", "train/grad_norm")
_DRIFTS = ("mc/adv_delta_mean",)
_PICTURES = "pictures"
_ORDER = [stage.name for stage in STAGES]
_CURVE_STAGES = {stage.checkpoint: stage.name for stage in STAGES if stage.checkpoint}  # metrics.jsonl -> stage


@dataclass(frozen=True)
class Report:
    """What report.md is rendered from. numbers: report.json. texts: stage -> name -> text or list. plots: PNG file names."""

    name: str
    run_dir: str
    numbers: Mapping[str, float]
    texts: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    config: str
    plots: Sequence[str]


def write_stage(
    run_dir: str,
    stage: str,
    seconds: float,
    flops: float,
    metrics: Mapping[str, float],
    text: Mapping[str, Any] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Store a finished stage's result for the report: wall seconds, FLOPs spent, flat metrics, and texts such as samples.

    settings: on which the result depends, by name. inputs: what was measured, by name; both for deciding whether a
    stage must run again.
    """
    value: dict[str, Any] = {
        "stage": stage,
        "seconds": seconds,
        "flops": flops,
        "metrics": dict(metrics),
        "text": dict(text or {}),
    }
    value |= {} if settings is None else {"settings": dict(settings)}
    value |= {"inputs": dict(inputs)} if inputs else {}
    storage.write_json(storage.join(run_dir, "stages", f"{stage}.json"), value)


def read_stage(run_dir: str, stage: str) -> dict[str, Any] | None:
    """What `write_stage` stored of a stage, or None. Raises UserError when the file is damaged."""
    path = storage.join(run_dir, "stages", f"{stage}.json")
    if not storage.exists(path):
        return None
    try:
        result = storage.read_json(path)
        problem = _problem(result)
    except (ValueError, RecursionError) as error:
        problem = f"it is not JSON ({error})"
    if problem:
        raise UserError(f"the stage result {path!r} is damaged: {problem}. Remove the file; the stage then runs again.")
    return {"stage": stage, "flops": 0.0, "text": {}, **result}


def _problem(result: Any) -> str:
    """What is wrong with the result of a stage; empty when nothing is."""
    if not isinstance(result, dict):
        return "it is not an object"
    absent = [name for name in ("seconds", "metrics") if name not in result]
    if absent:
        return f"it has no {' and no '.join(absent)}"
    for name in ("seconds", "flops"):
        if not _is_number(result.get(name, 0)):
            return f"{name} is {result[name]!r} and must be a number"
    for name in ("metrics", "text", "settings", "inputs"):
        if not isinstance(result.get(name, {}), dict):
            return f"{name} must be an object"
    wrong = [name for name, value in result["metrics"].items() if not _is_number(value)]
    return f"the metric {wrong[0]!r} is not a number" if wrong else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_of_checkpoint(path: str) -> str | None:
    """The run folder that a checkpoint path lies in or is; None for a checkpoint that stands alone."""
    if storage.exists(storage.join(path, "checkpoints")):
        return path
    above, name = path.rstrip("/"), ""
    while above and name != "checkpoints":
        above, _, name = above.rpartition("/")
    return above or None


def write_picture(run_dir: str, name: str, png: bytes) -> None:
    """Store a picture of a stage (PNG bytes, a name without ending) for the report; one of that name is replaced."""
    storage.write_bytes(storage.join(run_dir, _PICTURES, f"{name}.png"), png)


def write_report(run_dir: str) -> Report:
    """Collect what the stages of a run left and write its report folder; returns what was written.

    run_dir: local folder or fsspec URI. Raises UserError when the folder holds no result or a damaged one.
    """
    stages, records = read_stages(run_dir), read_metrics(run_dir)
    if not stages and not records:
        raise UserError(
            f"{run_dir!r} holds no stage results and no metrics; run a job with this --run and --storage first."
        )
    source = _read_provenance(run_dir)
    numbers = collect_numbers(stages, records, source)
    folder = storage.join(run_dir, "report")
    pictures = [*_write_plots(folder, numbers, records), *_copy_pictures(run_dir, folder)]
    report = Report(
        name=run_dir.rstrip("/").rsplit("/", 1)[-1],
        run_dir=run_dir,
        numbers=numbers,
        texts={stage: dict(result.get("text", {})) for stage, result in stages.items()},
        provenance=source,
        config=_read_config(run_dir),
        plots=pictures,
    )
    storage.write_json(storage.join(folder, "report.json"), numbers)
    storage.write_bytes(storage.join(folder, "report.md"), render_markdown(report).encode())
    return report


def card(report: Report) -> str:
    """The report as a few lines for a terminal."""
    return render_card(report)


def read_stages(run_dir: str) -> dict[str, dict[str, Any]]:
    """Stage results in pipeline order, other names after them by alphabet. Raises UserError for a damaged file."""
    folder = storage.join(run_dir, "stages")
    names = [name[: -len(".json")] for name in storage.list_dir(folder) if name.endswith(".json") and name[0] != "."]
    names.sort(key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    found = {name: read_stage(run_dir, name) for name in names}
    return {name: result for name, result in found.items() if result is not None}


def collect_numbers(
    stages: Mapping[str, Mapping[str, Any]], records: Sequence[Mapping[str, Any]], source: Mapping[str, Any]
) -> dict[str, float]:
    """The flat `{"<stage>/<metric>": number}` of a report; a stage's own result wins over what its curve says."""
    machine = source.get("hardware", {})
    numbers: dict[str, float] = {
        "total/seconds": sum(float(result.get("seconds", 0)) for result in stages.values()),
        "total/flops": sum(float(result.get("flops", 0)) for result in stages.values()),
        "hardware/cpu_cores": machine.get("cpu_cores", 0),
        "hardware/ram_gib": round(machine.get("ram_bytes", 0) / 2**30, 1),
        "hardware/gpus": len(machine.get("gpus", [])),
    }
    curves = _summarize_curves(records)
    for stage in [*stages, *(name for name in curves if name not in stages)]:
        result = stages.get(stage, {})
        own = {name: result[name] for name in ("seconds", "flops") if name in result}
        stated = {name.removeprefix(f"{stage}/"): value for name, value in result.get("metrics", {}).items()}
        for name, value in {**curves.get(stage, {}), **own, **stated}.items():
            if isinstance(value, int | float) and math.isfinite(value):
                numbers[f"{stage}/{name}"] = value
    return numbers


def _summarize_curves(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per stage and metric: last value, or median or drift where that says more."""
    series: dict[str, dict[str, list[float]]] = {}
    for record in records:
        stage = str(record["stage"])
        values = series.setdefault(_CURVE_STAGES.get(stage, stage), {})
        for name, value in record.items():
            if name != "stage" and isinstance(value, int | float):
                values.setdefault("last_step" if name == "step" else name, []).append(value)
    found: dict[str, dict[str, float]] = {}
    for stage, values in series.items():
        found[stage] = {
            name: statistics.median(points) if name in _MEDIANS else points[-1] for name, points in values.items()
        }
        for name in _DRIFTS:
            points = values.get(name, [])
            if len(points) >= 8:
                quarter = len(points) // 4
                found[stage][f"{name}_drift"] = statistics.fmean(points[-quarter:]) - statistics.fmean(points[:quarter])
    return found


def _write_plots(folder: str, numbers: Mapping[str, float], records: Sequence[Mapping[str, Any]]) -> list[str]:
    written = []
    for name, metric, label, title in _PLOTS:
        baselines = {n: v for n in ("unigram", "bigram") for k, v in numbers.items() if k.endswith(f"/{n}_bpb")}
        png = plots.plot_metric(records, metric, label, title, baselines if metric == "val/bpb" else None)
        if png is not None:
            storage.write_bytes(storage.join(folder, f"{name}.png"), png)
            written.append(f"{name}.png")
    return written


def _copy_pictures(run_dir: str, folder: str) -> list[str]:
    """Take the stages' pictures into the report folder, so that it can be sent as it is."""
    source = storage.join(run_dir, _PICTURES)
    names = [name for name in storage.list_dir(source) if name.endswith(".png") and not name.startswith(".")]
    for name in names:
        storage.write_bytes(storage.join(folder, name), storage.read_bytes(storage.join(source, name)))
    return names


def _read_provenance(run_dir: str) -> dict[str, Any]:
    """What the run recorded about itself, or this process where it recorded nothing. Raises UserError for a damaged file."""
    path = storage.join(run_dir, "provenance.json")
    try:
        found = storage.read_json(path)
    except FileNotFoundError:
        return provenance.collect()
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path!r} is damaged: it is not JSON ({error}). Remove the file and make the report again."
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name, {}), dict) for name in ("hardware", "versions")
    ):
        raise UserError(
            f"{path!r} is damaged: it does not say where the run was made. Remove the file and make the report again."
        )
    return found


def _read_config(run_dir: str) -> str:
    path = storage.join(run_dir, "config.yaml")
    try:
        return storage.read_bytes(path).decode().strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path!r}, which holds the settings of the run, is damaged: {error}. Restore or remove it."
        ) from None
