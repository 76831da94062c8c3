"""Metrics of a run: plain lines or a bar on stdout, `metrics.jsonl` in the run folder, Weights & Biases.

A resumed run passes the step it continues at, so that `metrics.jsonl` stays one clean curve (see metrics_file.py).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from megacontext.errors import UserError
from megacontext.telemetry import otel, wandb_run
from megacontext.telemetry.metrics_file import Sink, json_number, open_sink
from megacontext.telemetry.provenance import redact

_RECENT_STEPS = 50  # whose median time says how long the rest takes
_SILENT_S = 30.0  # after so long a step is printed, whatever log_every says

# metric -> (label, format) of the line for people; other metrics are in metrics.jsonl and W&B only
_SHOWN: Mapping[str, tuple[str, str]] = {
    "train/loss": ("loss", "{:.4f}"),
    "val/bpb": ("val_bpb", "{:.4f}"),
    "train/lrm": ("lrm", "{:.2f}"),
    "train/grad_norm": ("norm", "{:.2f}"),
    "train/reward": ("reward", "{:.3f}"),
    "train/dt": ("dt", ""),  # seconds, shown as ms
    "train/tok_per_sec": ("tok/s", "{:,.0f}"),
    "train/mfu": ("mfu", "{:.1f}%"),
}


class Tracker:
    """Records metrics of one stage of a run. On ranks other than 0 pass `enabled=False`: every call is then a no-op.

    run_dir: local folder or fsspec URI. wandb_mode: auto | online | offline | off.
    log_every: steps between printed lines; `metrics.jsonl` has every step.
    Nothing is opened or checked before `open`.
    """

    def __init__(
        self,
        run_dir: str,
        run_name: str,
        config: Mapping[str, Any],
        wandb_mode: str = "auto",
        stage: str = "base",
        *,
        log_every: int = 1,
        enabled: bool = True,
        upload_every_s: float = 60.0,
    ) -> None:
        self.run_dir, self.run_name, self.config, self.wandb_mode = run_dir, run_name, dict(config), wandb_mode
        self.stage, self.log_every, self.enabled = stage, max(1, log_every), enabled
        self.upload_every_s = upload_every_s
        self.total_steps: int | None = None
        self._bar: Any = None
        self._wandb: wandb_run.WandbRun | None = None
        self._sink: Sink | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._steps = 0  # of this process
        self._printed_at = 0.0

    def open(self, resume_step: int = 0, total_steps: int | None = None) -> None:
        """Start recording; records of this stage with `step >= resume_step` are dropped first.

        resume_step: first step that will be logged again. 1 means that nothing was resumed, so the stage's record of
        step 0 (the validation before training) goes as well. total_steps: for the share of work done.

        Raises UserError when uploads are demanded (`MEGACONTEXT_ENABLE_WANDB=1`, or mode online) and cannot be had,
        StorageError when the run folder cannot be written.
        """
        if not self.enabled:
            return
        self.total_steps, self._printed_at = total_steps, time.monotonic()
        mode = resolve_wandb_mode(self.wandb_mode, os.environ)
        first = 0 if resume_step <= 1 else resume_step
        self._sink = open_sink(self.run_dir, self.stage, first, self.upload_every_s)
        if mode != "off":
            demanded = self.wandb_mode in ("online", "offline") or os.environ.get("MEGACONTEXT_ENABLE_WANDB") == "1"
            self._wandb = wandb_run.start(self.run_dir, self.run_name, redact(self.config), mode, self.stage, demanded)
        if total_steps is not None and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=first, desc=self.stage, unit="step", dynamic_ncols=True, file=sys.stdout
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of a step. Several calls for one step make several records; readers merge them by name.

        Numbers that are not finite become null in `metrics.jsonl`, because JSON has no word for them.
        """
        if self._sink is None:
            return
        values = {name: json_number(value) for name, value in metrics.items()}
        self._sink.append(json.dumps({"step": step, "stage": self.stage, **values}, allow_nan=False))
        if self._wandb is not None:
            self._wandb.log(metrics, step)
        otel.active().gauges(metrics)
        self._show(metrics, step)

    def sync(self) -> None:
        """Make the records so far survive a power cut, so that a checkpoint never has a hole in the curve before it."""
        if self._sink is not None:
            self._sink.sync()

    def log_text(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Print named texts of a step, such as samples (prompt, continuation)."""
        for name, text in texts:
            self.note(f"{format_step(step, self.total_steps)} {name!r} → {text!r}")

    def note(self, text: str) -> None:
        """Print a line of text without breaking the progress bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def _show(self, metrics: Mapping[str, float], step: int) -> None:
        if self._bar is not None:
            self._bar.update(max(0, step - self._bar.n))
            self._bar.set_postfix_str(format_metrics(metrics), refresh=False)
            return
        if "train/dt" in metrics:
            self._steps += 1
            if self._steps == 2:  # the first step also waits for data and compiles; it counts only in its own line
                self._recent.clear()
            self._recent.append(float(metrics["train/dt"]))
        due = step % self.log_every == 0 or step in (1, self.total_steps)
        if due or "train/loss" not in metrics or time.monotonic() - self._printed_at > _SILENT_S:
            line = format_metrics(metrics)
            if line:
                self._printed_at = time.monotonic()
                left = self._time_left(step) if "train/loss" in metrics else ""
                print(f"{format_step(step, self.total_steps)} {line}{left}", flush=True)

    def _time_left(self, step: int) -> str:
        """` left 3.2 min`: the steps to come at the median time of the recent ones; empty when the end is unknown."""
        if not self.total_steps or not self._recent:
            return ""
        return f" left {max(0, self.total_steps - step) * statistics.median(self._recent) / 60:.1f} min"

    def finish(self, exit_code: int = 0) -> None:
        """Flush and close everything; safe to call twice. Raises StorageError if a remote upload still fails."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._wandb is not None:
            self._wandb.finish(exit_code)
            self._wandb = None
        if self._sink is not None:
            sink, self._sink = self._sink, None
            sink.close()

    def __enter__(self) -> Tracker:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(exit_code=0 if kind is None else 1)


def format_step(step: int, total_steps: int | None) -> str:
    """`step 00012/01000 (1.2%)`, or `step 00012` when the end is unknown."""
    if not total_steps:
        return f"step {step:05d}"
    return f"step {step:05d}/{total_steps:05d} ({100 * step / total_steps:.1f}%)"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """The metrics people watch, in a fixed order; empty when there are none."""
    parts = []
    for name, (label, form) in _SHOWN.items():
        if name in metrics:
            value = float(metrics[name])
            parts.append(f"{label} " + (f"{1000 * value:.0f}ms" if label == "dt" else form.format(value)))
    return " ".join(parts)


def resolve_wandb_mode(mode: str, environment: Mapping[str, str]) -> str:
    """`online`, `offline` or `off` from the flag and the environment.

    auto honours WANDB_MODE, else is online with WANDB_API_KEY set, else off. WANDB_RUN=dummy turns W&B off, as in
    nanochat. Raises UserError when MEGACONTEXT_ENABLE_WANDB=1 and nothing would be uploaded.
    """
    if mode not in ("auto", "online", "offline", "off"):
        raise UserError(f"wandb mode {mode!r} is unknown; use auto, online, offline or off.")
    has_key = bool(environment.get("WANDB_API_KEY"))
    resolved = mode
    if mode == "auto":
        asked = environment.get("WANDB_MODE", "")
        resolved = {"offline": "offline", "disabled": "off", "dryrun": "offline"}.get(
            asked, "online" if has_key else "off"
        )
        if environment.get("WANDB_RUN") == "dummy":
            resolved = "off"
    if environment.get("MEGACONTEXT_ENABLE_WANDB") == "1" and (resolved != "online" or not has_key):
        why = "WANDB_API_KEY is not set" if not has_key else f"the mode is {resolved}"
        raise UserError(
            f"MEGACONTEXT_ENABLE_WANDB=1 refuses to run without uploads, and {why}. "
            "Set WANDB_API_KEY (environment or .mc_env) and --wandb online, or unset MEGACONTEXT_ENABLE_WANDB."
        )
    return resolved
