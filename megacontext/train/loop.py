"""The training loop: validate, sample, save and step until the horizon.

It knows nothing of Ray. Rows come from any iterator of batches in the order of `data.stream`; who runs it is behind
the `Worker` protocol. The state it carries from step to step is a plain dict that a checkpoint holds whole, so a
killed run continues on the very next row with the very same numbers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megacontext import storage
from megacontext.checkpoint import checkpoint_name
from megacontext.data.stream import Batch, BatchPlan
from megacontext.errors import NonFiniteLossError, StorageError
from megacontext.eval.samples import continuations
from megacontext.model.flops import peak_flops
from megacontext.telemetry import otel
from megacontext.telemetry.rows import RowLog
from megacontext.telemetry.tracker import Tracker
from megacontext.train import schedule
from megacontext.train.checkpoint import CheckpointWriter
from megacontext.train.resume import checkpoints_dir
from megacontext.train.setup import Setup, agree, build, loop_meta, plans_ahead, progress_of
from megacontext.train.step import Stepper, StepResult
from megacontext.train.step_plan import StepPlan
from megacontext.train.task import TrainTask
from megacontext.train.throughput import Stopwatch, peak_memory_bytes
from megacontext.train.worker import Worker

MakeStream = Callable[[BatchPlan, int, int], Iterator[Batch]]
"""(plan, first step, end step) -> this worker's micro-batches in order."""


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    finished: False when it was asked to stop before its horizon. checkpoint: path of the one written at `step`; "" when
    it was asked to stop before the first step of the run.
    """

    finished: bool
    step: int
    checkpoint: str
    metrics: dict[str, float]


def train(task: TrainTask, worker: Worker, tracker: Tracker, make_stream: MakeStream | None = None) -> TrainResult:
    """Train a stage to its horizon, or until a stop is asked for. Every rank calls it.

    Without `make_stream` the rows come from a memory map of the shards. Raises DataError, CheckpointError, UserError
    or StorageError for bad input, NonFiniteLossError (after saving the last good weights) when training diverges.
    """
    with otel.opened(run=task.run_dir.rstrip("/").rsplit("/", 1)[-1], rank=worker.rank):
        writer = _open_writer(task, worker)
        try:
            setup = build(task, worker)
            finished = _train(setup, tracker, make_stream, writer)
        finally:
            if writer is not None:
                writer.close()
    state = setup.state
    path = storage.join(checkpoints_dir(task), checkpoint_name(task.stage, state["step"]))
    if not finished and state["step"] == 0:
        path = ""
    return TrainResult(finished, state["step"], path, _summary(setup))


def _open_writer(task: TrainTask, worker: Worker) -> CheckpointWriter | None:
    """The writer of checkpoints on rank 0, and with it the right to train this stage of the run."""
    opened: list[CheckpointWriter] = []
    keep = task.train.keep_checkpoints
    agree(
        worker,
        lambda: opened.append(CheckpointWriter(checkpoints_dir(task), task.stage, task.tokenizer_dir, keep)),
    )
    return opened[0] if opened else None


def _train(setup: Setup, tracker: Tracker, make_stream: MakeStream | None, writer: CheckpointWriter | None) -> bool:
    """From the step of the setup on; whether the horizon was reached. Everything it opened is closed at the end."""
    task, worker = setup.task, setup.worker
    first, end = setup.state["step"], setup.num_iterations
    tracker.open(resume_step=first + 1, total_steps=end)
    source = None if make_stream is None else make_stream(setup.plan, first, end)
    plans = plans_ahead(setup.objective, setup.rows.read(setup.plan, worker.rank, first, end, source))
    try:
        with RowLog(task.run_dir, task.stage, worker.rank, first, enabled=bool(task.train.log_rows)) as rows_log:
            return _loop(setup, plans, writer, tracker, rows_log)
    except (NonFiniteLossError, StorageError):
        if writer is not None and setup.state["step"] not in (0, first):
            _save_last(setup, writer)
        raise
    finally:
        plans.close()
        tracker.finish()


def _save_last(setup: Setup, writer: CheckpointWriter) -> None:
    """Keep the steps done before an error that left the weights whole; whether that went well is said on stdout."""
    step = setup.state["step"]
    with contextlib.suppress(StorageError):  # a save that failed before is tried again
        writer.wait()
    try:
        if writer.saved_step != step:
            _save(setup, writer)
            writer.wait()
        print(f"{setup.task.stage}: an error ends training; the {step} steps done are kept", flush=True)
    except StorageError as failure:
        print(f"{setup.task.stage}: an error ends training; step {step} could not be saved: {failure}", flush=True)


def _loop(
    setup: Setup,
    plans: Iterator[StepPlan],
    writer: CheckpointWriter | None,
    tracker: Tracker,
    rows_log: RowLog,
) -> bool:
    worker, state, cfg = setup.worker, setup.state, setup.task.train
    stepper = Stepper(setup.objective, setup.optimizer, worker.device, worker.world_size, setup.plan.accum_steps,
                      cfg.grad_clip, Stopwatch(worker.device), setup.rows.every_target_counts)  # fmt: skip
    resumed_at, stop = (state["step"] or None), False
    if state["step"] < setup.num_iterations and agree(worker, worker.stop_requested):
        return False  # asked to stop before the first step: nothing is new, so nothing is saved
    while True:
        step = state["step"]
        last = step >= setup.num_iterations
        if step != resumed_at:  # what a checkpoint of this step already did is not done again
            if last or _due(step, cfg.eval_every):
                _validate(setup, tracker)
            if worker.rank == 0 and (last or (step > 0 and _due(step, cfg.sample_every))):
                tracker.log_text(step, continuations(setup.model, setup.tokenizer, max_tokens=16))
            if last or stop or (step > 0 and _due(step, cfg.save_every)):
                rows_log.sync()
                if writer is not None:
                    tracker.sync()
                    _save(setup, writer)
        if last or stop:
            return bool(last)
        lrm = schedule.lr_multiplier(
            step, setup.num_iterations, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac
        )
        began = time.perf_counter()
        asked = worker.rank == 0 and worker.stop_requested()
        with otel.span("train_step", step=step) as span:
            result = stepper.run(step, plans, lrm, schedule.muon_momentum(step), asked)
            span.set(stage=setup.task.stage, loss=result.loss, grad_norm=result.grad_norm)
            if result.metrics:
                span.event(
                    "mc_timing",
                    **{f"{name.replace('/', '_')}_ms": ms for name, ms in stepper.watch.phases_ms().items()},
                )
                span.event("mc_batch_stats", **{name.removeprefix("mc/"): x for name, x in result.metrics.items()})
        phases_ms = stepper.watch.phases_ms()
        _advance(setup, result, time.perf_counter() - began)
        stop = result.stop
        try:
            rows_log.write(step, result.rows)
        finally:  # a full disk of one log is no reason for a hole in the other
            if worker.rank == 0:
                tracker.log(_step_metrics(setup, result, lrm, phases_ms), step + 1)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _advance(setup: Setup, result: StepResult, seconds: float) -> None:
    state, task = setup.state, setup.task
    state["last_flops"] = _step_flops(setup)
    state["step"] += 1
    state["rows_consumed"] += task.rows_per_step
    state["total_tokens"] += task.train.total_batch_size
    state["total_training_flops"] += state["last_flops"]
    state["total_training_time"] += seconds
    state["smooth_loss"] = 0.9 * state["smooth_loss"] + 0.1 * result.loss
    state["last_seconds"] = seconds
    state["objective"] = setup.objective.state_dict()


def _step_flops(setup: Setup) -> float:
    """FLOPs of the step that begins now."""
    progress = progress_of(setup.num_iterations)(setup.state["step"])
    return setup.task.flops_per_token(progress) * setup.task.train.total_batch_size


def _totals(state: dict[str, Any]) -> dict[str, float]:
    return {key: state[key] for key in ("total_tokens", "total_training_flops", "total_training_time")}


def _step_metrics(setup: Setup, result: StepResult, lrm: float, phases_ms: dict[str, float]) -> dict[str, float]:
    state, task = setup.state, setup.task
    seconds, tokens = state["last_seconds"], task.train.total_batch_size
    metrics = {
        "train/loss": result.loss,
        "train/smooth_loss": state["smooth_loss"] / (1 - 0.9 ** state["step"]),
        "train/lrm": lrm,
        "train/dt": seconds,
        "train/tok_per_sec": tokens / seconds,
        "train/tokens_per_step": tokens,
        "train/grad_accum_steps": setup.plan.accum_steps,
        "train/grad_norm": result.grad_norm,
        **{f"time/{phase}_ms": value for phase, value in phases_ms.items() if "/" not in phase},
        **_totals(state),
        **result.metrics,
    }
    peak = peak_flops(setup.worker.device, setup.dtype)
    if peak is not None:
        metrics["train/mfu"] = 100 * state["last_flops"] / seconds / (peak * setup.worker.world_size)
    return metrics


def _validate(setup: Setup, tracker: Tracker) -> None:
    state, worker = setup.state, setup.worker
    with otel.span("validation", stage=setup.task.stage, step=state["step"]) as span:
        figures = setup.judge(setup.model, worker.rank, worker.world_size)
        span.set(**figures)
    deciding, value = next(iter(figures.items()))
    state[f"val_{deciding}"] = value
    best = state.get(f"best_val_{deciding}")
    if best is None or value < best:
        state[f"best_val_{deciding}"] = value
        state["best_step"] = state["step"]
    metrics = {**{f"val/{name}": figure for name, figure in figures.items()}, **_totals(state)}
    if worker.rank == 0:
        tracker.log(metrics, state["step"])
    worker.report(metrics)


def _save(setup: Setup, writer: CheckpointWriter) -> None:
    state = setup.state
    if state.get("best_step") == state["step"]:
        state["best_checkpoint"] = checkpoint_name(setup.task.stage, state["step"])
    writer.save(state["step"], setup.model.state_dict(), setup.optimizer.state_dict(), loop_meta(setup))


def _summary(setup: Setup) -> dict[str, float]:
    state = setup.state
    metrics = {
        "steps": state["step"],
        "parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "flops_per_token": setup.task.mean_flops_per_token,
        "smooth_loss": state["smooth_loss"] / max(1e-9, 1 - 0.9 ** state["step"]),
        "peak_memory_bytes": peak_memory_bytes(setup.worker.device),
        **_totals(state),
    }
    if state["total_training_time"] > 0:
        metrics["tok_per_sec"] = state["total_tokens"] / state["total_training_time"]
    judged = {name: value for name, value in state.items() if name.startswith(("val_", "best_val_"))}
    metrics |= {name: value for name, value in judged.items() if value is not None}
    return metrics
