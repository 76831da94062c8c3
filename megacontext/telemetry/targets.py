"""Targets and alerts: what a healthy metric looks like, and where to look when it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A metric's aim. `meets` and `alarms` judge its value; `look_at` says where a miss usually comes from, `verdict` in a
    few words what an alert means."""

    metric: str
    aim: str
    alert: str
    meets: Callable[[float], bool]
    alarms: Callable[[float], bool]
    look_at: str
    gpu_only: bool = False
    verdict: str = ""


@dataclass(frozen=True)
class Verdict:
    """A target applied to one number of the report. `state` is ok, miss or ALERT."""

    key: str
    value: float
    target: Target
    state: str


# Shares are fractions of 1 (utilisation 0.93), MFU is in percent as nanochat logs it.
TARGETS = (
    Target("eval/delta_nll", "≤ 0.10", "> 0.15", lambda v: v <= 0.10, lambda v: v > 0.15,
           "gists lose what the tail needs: lens recall and regret, then the budget W"),
    Target("eval/cgr", "≥ 0.40", "< 0", lambda v: v >= 0.40, lambda v: v < 0,
           "share of the far context's worth that is kept; below 0 a plain sliding window of the same budget is better: "
           "the lens's recall first, then gist training; and is nll_window - nll_full above 0.02 nats at all?"),
    Target("eval/lens_recall", "≥ 0.90", "< 0.50", lambda v: v >= 0.90, lambda v: v < 0.50,
           "the share of recall tasks in training, routing slots and width, then the search's visits"),
    Target("eval/lens_regret", "≤ 0.05", "> 0.15", lambda v: v <= 0.05, lambda v: v > 0.15,
           "oracle minus learned lens: eval/lens_recall if it is low too, else the allocator's iterations and thresholds"),
    Target("runtime/swap_rate", "0.05–0.20", "> 0.25", lambda v: 0.05 <= v <= 0.20, lambda v: v > 0.25,
           "allocator thresholds and cooldown: too many edits flicker, too few are blind"),
    Target("runtime/residency", "≥ 3 refocuses", "< 3", lambda v: v >= 3, lambda v: v < 3,
           "hysteresis and cooldown of the allocator; score noise between refocuses"),
    Target("runtime/token_budget_utilization", "0.90–1.00", "< 0.80; > 1 is a bug",
           lambda v: 0.90 <= v <= 1.0, lambda v: v < 0.80 or v > 1.0,
           "expand threshold too high for the history, or (above 1) an allocator that breaks its budget"),
    Target("train/mfu", "45–55 %", "< 40 %", lambda v: v >= 45.0, lambda v: v < 40.0,
           "time/*_ms of metrics.jsonl: data loading first, then device_batch_size and --compile", gpu_only=True),
    Target("mc/adv_delta_mean", "≤ 0", "drifts up", lambda v: v <= 0, lambda v: v > 0,
           "LensNet's advantage over the baseline context: learning rate and hard negatives"),
    Target("mc/adv_delta_mean_drift", "≤ 0", "> 0", lambda v: v <= 0, lambda v: v > 0,
           "mean of the last quarter minus the first: LensNet is unlearning; lower its learning rate"),
    Target("mc/preference_corr_mean", "→ −1", "≥ 0", lambda v: v <= -0.5, lambda v: v >= 0,
           "scores do not follow losses: number and spread of variants, lens temperature"),
    Target("mc/time_controller_ms", "≤ 200 ms", "> 200 ms", lambda v: v <= 200, lambda v: v > 200,
           "the controller's host syncs and its number of allocator iterations"),
)  # fmt: skip


def judge(numbers: Mapping[str, float], has_gpu: bool) -> list[Verdict]:
    """Verdicts on every `<stage>/<metric>` of a report that has a target; MFU is judged on GPUs only.

    A model is judged by its bigram wherever a stage has measured both on the same text.
    """
    verdicts = []
    for key, value in numbers.items():
        metric = key.partition("/")[2]
        for target in TARGETS:
            if metric == target.metric and (has_gpu or not target.gpu_only):
                verdicts.append(_judged(key, value, target))
    for key, bigram in numbers.items():
        ours = key.removesuffix("/bigram_bpb") + "/val_bpb"
        if key.endswith("/bigram_bpb") and ours in numbers:
            verdicts.append(_judged(ours, numbers[ours], _below_bigram(key, bigram)))
    return verdicts


def _judged(key: str, value: float, target: Target) -> Verdict:
    return Verdict(key, value, target, "ALERT" if target.alarms(value) else "ok" if target.meets(value) else "miss")


def _below_bigram(key: str, bigram: float) -> Target:
    """The target of a model whose bigram, the entry `key` of the report, has so many bits per byte."""
    return Target(
        "val_bpb", f"< {bigram:.4f} ({key})", f"≥ {bigram:.4f}", lambda v: v < bigram, lambda v: v >= bigram,
        "training tokens (total_tokens): too few make a model that predicts text worse than counts of word pairs do. Train "
        "longer under another --run: on an idle machine, without --max_minutes, or with more --num_iterations",
        verdict="worse than its bigram",
    )  # fmt: skip
