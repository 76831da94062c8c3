"""The report card: its numbers are those of report.json, misses are marked, and it works on any storage."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml

from megacontext import storage
from megacontext.errors import UserError
from megacontext.telemetry import plots, render, report
from megacontext.telemetry.targets import judge
from megacontext.telemetry.tracker import Tracker


def make_run(run_dir: str, steps: int = 60) -> None:
    """A run as the jobs leave it: tracker records, stage results, config."""
    tracker = Tracker(run_dir, "r", {}, "off", "base", log_every=10**6)
    tracker.open(total_steps=steps)
    for step in range(1, steps + 1):
        axes = {"total_tokens": 4096 * step, "total_training_flops": 3.1e9 * step, "total_training_time": 0.4 * step}
        tracker.log(
            {"train/loss": 9.0 - step / 20, "train/mfu": 30.0 + step % 3, "mc/adv_delta_mean": step / 100, **axes}, step
        )
        if step % 20 == 0:
            tracker.log({"val/bpb": 3.0 - step / 60, **axes}, step)
    tracker.finish()
    report.write_stage(run_dir, "base_eval", 3.25, 1e9, {"base_eval/unigram_bpb": 3.5, "base_eval/bigram_bpb": 2.75},
                       {"base_eval/samples": [["The capital of", "``` France"], ["1 + 1 =", "2"]]})  # fmt: skip
    report.write_stage(run_dir, "base_train", 120.5, 3.1e9 * steps, {"base_train/parameters": 1234567, "base_train/val_bpb": 2.0},
                       {"base_train/checkpoint": "runs/r/checkpoints/x"})  # fmt: skip
    report.write_stage(run_dir, "tok_train", 7.125, 0, {"vocab_size": 8192})
    storage.write_bytes(storage.join(run_dir, "config.yaml"), yaml.safe_dump({"run": {"run": "r"}}).encode())


@pytest.mark.parametrize("remote", [False, True])
def test_report_of_a_run(tmp_path: Path, remote: bool) -> None:
    run_dir = f"memory://report-{tmp_path.name}/r" if remote else str(tmp_path / "r")
    make_run(run_dir)
    written = report.write_report(run_dir)
    numbers = storage.read_json(f"{run_dir}/report/report.json")
    assert numbers == written.numbers
    assert all(isinstance(value, int | float) for value in numbers.values())
    assert numbers["base_train/parameters"] == 1234567
    assert numbers["base_train/val/bpb"] == 2.0
    assert numbers["base_train/train/mfu"] == 31.0  # a median
    assert numbers["total/seconds"] == 120.5 + 3.25 + 7.125
    assert numbers["total/flops"] == 3.1e9 * 60 + 1e9
    assert storage.list_dir(f"{run_dir}/report") == ["report.json", "report.md", "train_loss.png", "val_bpb.png"]
    for name in ("train_loss.png", "val_bpb.png"):
        pixels = matplotlib.image.imread(io.BytesIO(storage.read_bytes(f"{run_dir}/report/{name}")))
        assert pixels.shape[1] > 1000
        assert np.unique(pixels).size > 10


def test_every_number_in_the_tables_is_in_report_json(tmp_path: Path) -> None:
    make_run(str(tmp_path / "r"))
    written = report.write_report(str(tmp_path / "r"))
    text = (tmp_path / "r" / "report" / "report.md").read_text()
    known = {render.show(value) for value in written.numbers.values()}
    cells = [cell for row in re.findall(r"^\| .*\|$", text, re.M) for cell in (c.strip() for c in row.split("|"))]
    shown = [cell for cell in cells if re.fullmatch(r"-?[\d.,]+(e[+-]?\d+)?", cell)]
    assert len(shown) > 20
    assert set(shown) <= known
    cost = re.search(r"\| cost \| (\S+) s, (\S+) FLOPs", text)
    assert cost is not None
    assert set(cost.groups()) <= known


def test_report_compares_with_ngrams_keeps_order_and_shows_texts(tmp_path: Path) -> None:
    make_run(str(tmp_path / "r"))
    written = report.write_report(str(tmp_path / "r"))
    text = (tmp_path / "r" / "report" / "report.md").read_text()
    assert [what for what, _, _ in render.comparison(written.numbers)] == [
        "n-gram: unigram",
        "n-gram: bigram",
        "model: base_train",
    ]
    assert (
        text.index("## tok_train")
        < text.index("## base_train")
        < text.index("## base_eval")
        < text.index("## Configuration")
    )
    assert "````text\nThe capital of → ``` France\n1 + 1 = → 2\n````" in text
    assert "checkpoint: `runs/r/checkpoints/x`" in text
    assert "![val_bpb](val_bpb.png)" in text
    card = report.card(written)
    assert card.splitlines()[0].startswith("──── report card: r ")
    assert "n-gram: unigram" in card
    assert f"{tmp_path}/r/report/report.md" in card


def test_misses_are_marked_and_say_what_to_look_at(tmp_path: Path) -> None:
    make_run(str(tmp_path / "r"))
    report.write_report(str(tmp_path / "r"))
    text = (tmp_path / "r" / "report" / "report.md").read_text()
    row = next(line for line in text.splitlines() if "`base_train/mc/adv_delta_mean_drift`" in line)
    assert row.startswith("| ✗ ALERT |")
    assert "LensNet is unlearning" in row
    assert "train/mfu`" not in text.split("## Targets")[1].split("## Curves")[0]  # no GPU, no target for MFU


@pytest.mark.parametrize(
    ("metric", "value", "state"),
    [
        ("eval/delta_nll", 0.10, "ok"), ("eval/delta_nll", 0.12, "miss"), ("eval/delta_nll", 0.16, "ALERT"),
        ("runtime/swap_rate", 0.1, "ok"), ("runtime/swap_rate", 0.01, "miss"), ("runtime/swap_rate", 0.3, "ALERT"),
        ("runtime/residency", 3, "ok"), ("runtime/residency", 2.9, "ALERT"),
        ("runtime/token_budget_utilization", 0.95, "ok"), ("runtime/token_budget_utilization", 0.85, "miss"),
        ("runtime/token_budget_utilization", 1.01, "ALERT"), ("runtime/token_budget_utilization", 0.7, "ALERT"),
        ("train/mfu", 50, "ok"), ("train/mfu", 42, "miss"), ("train/mfu", 39, "ALERT"),
        ("mc/adv_delta_mean", -0.1, "ok"), ("mc/preference_corr_mean", 0.0, "ALERT"),
        ("mc/preference_corr_mean", -0.9, "ok"), ("mc/time_controller_ms", 201, "ALERT"),
    ],
)  # fmt: skip
def test_targets(metric: str, value: float, state: str) -> None:
    assert [v.state for v in judge({f"base_train/{metric}": value}, has_gpu=True)] == [state]


@pytest.mark.parametrize(("ours", "state"), [(2.47, "ALERT"), (1.81, "ALERT"), (1.66, "ok")])
def test_a_model_worse_than_its_bigram_is_marked(tmp_path: Path, ours: float, state: str) -> None:
    """19 steps, 2.47 bits per byte, a bigram of 1.81, and nothing said that such a model is worthless."""
    run_dir = str(tmp_path / "r")
    report.write_stage(run_dir, "base_train", 60.0, 1e9, {"base_train/val_bpb": ours})
    report.write_stage(run_dir, "base_eval", 3.0, 0.0, {"base_eval/val_bpb": ours, "base_eval/bigram_bpb": 1.81})
    written = report.write_report(run_dir)
    assert [(v.key, v.state) for v in judge(written.numbers, has_gpu=False)] == [("base_eval/val_bpb", state)]
    marked = "ALERT: worse than its bigram"
    text = (tmp_path / "r" / "report" / "report.md").read_text()
    assert (marked in text) == (marked in report.card(written)) == (state == "ALERT")
    if state == "ALERT":
        assert f"✗ {marked}: base_eval/val_bpb = {render.show(ours)}, target < 1.8100" in report.card(written)
    assert "base_eval/bigram_bpb" in text.split("## Targets")[1]


def test_a_stage_without_curves_and_curves_without_a_stage(tmp_path: Path) -> None:
    report.write_stage(str(tmp_path / "a"), "tok_train", 1.0, 0.0, {"vocab_size": 300})
    assert report.write_report(str(tmp_path / "a")).plots == []
    tracker = Tracker(str(tmp_path / "b"), "b", {}, "off")
    tracker.open()
    tracker.log({"train/loss": 2.0}, 1)
    tracker.finish()
    assert report.write_report(str(tmp_path / "b")).numbers["base_train/train/loss"] == 2.0


def test_no_results_and_damaged_results_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no stage results"):
        report.write_report(str(tmp_path))
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "base_train.json").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"base_train\.json.*damaged"):
        report.write_report(str(tmp_path))


def test_numbers_for_people() -> None:
    values: list[Any] = [0, 12, 1234567, 3.14159, 12345.678, 2.5e15, 1e-5, -2.0, 0.5]
    shown = ["0", "12", "1,234,567", "3.1416", "12,345.7", "2.5e+15", "1e-05", "-2", "0.5000"]
    assert [render.show(value) for value in values] == shown


def test_running_mean_against_a_plain_one() -> None:
    values = list(np.random.default_rng(0).normal(size=50))
    expected = [float(np.mean(values[max(0, i - 6) : i + 1])) for i in range(50)]
    assert np.allclose(plots.running_mean(values, 7), expected)


def test_report_json_is_plain_json(tmp_path: Path) -> None:
    make_run(str(tmp_path / "r"))
    report.write_report(str(tmp_path / "r"))
    json.loads((tmp_path / "r" / "report" / "report.json").read_text(), parse_constant=pytest.fail)


def test_pictures_and_focus_metrics_of_stages_are_in_the_report(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "r")
    metrics = {"eval/delta_nll": 0.04, "eval/cgr": -0.2, "eval/lens_recall": 0.95, "eval/lens_regret": 0.08}
    report.write_stage(run_dir, "memory_eval", 1.0, 0.0, {f"memory_eval/{k}": v for k, v in metrics.items()},
                       {"memory_eval/table": "method  nll\nours    3.1"})  # fmt: skip
    png = plots.plot_metric([{"stage": "s", "total_tokens": n, "x": n} for n in (1, 2)], "x", "x", "x")
    assert png is not None
    report.write_picture(run_dir, "memory_eval", png)
    written = report.write_report(run_dir)
    assert written.plots == ["memory_eval.png"]
    assert (tmp_path / "r" / "report" / "memory_eval.png").read_bytes() == png
    text = (tmp_path / "r" / "report" / "report.md").read_text()
    assert "![memory_eval](memory_eval.png)" in text
    assert "method  nll\nours    3.1" in text
    states = {v.target.metric: v.state for v in judge(written.numbers, False)}
    expected = {"eval/delta_nll": "ok", "eval/cgr": "ALERT", "eval/lens_recall": "ok", "eval/lens_regret": "miss"}
    assert states == expected
    assert "memory_eval/eval/cgr: -0.2" in report.card(written)
