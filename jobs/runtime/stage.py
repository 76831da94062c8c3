"""A stage of the pipeline as a job runs it: skipped when its output is complete, else run, timed and recorded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.runtime import run_settings, stopping
from jobs.runtime.cli import Args, flat_values, paths, source_name
from megacontext import storage
from megacontext.stages import EVALUATE, TRAIN, Stage
from megacontext.telemetry import otel, provenance
from megacontext.telemetry.report import read_stage, write_stage


@dataclass(frozen=True)
class Job:
    """What a stage does.

    run: does the work and returns flat metrics `{"<stage>/<metric>": number}`; strings and lists among them (samples,
    say) are kept beside the numbers.
    ready: raises when the work cannot begin. Until it has returned, nothing is written into the run.
    has_output: whether what the stage made is still there.
    inputs: what an evaluation measures, by name (its checkpoint, say). With other inputs it runs again.
    """

    stage: Stage
    run: Callable[[Args], Mapping[str, Any]]
    ready: Callable[[Args], object] = lambda args: None
    has_output: Callable[[Args], bool] = lambda args: True
    inputs: Callable[[Args], dict[str, str]] = lambda args: {}

    @property
    def name(self) -> str:
        return self.stage.name


def run_stage(job: Job, args: Args, again: bool = False) -> dict[str, Any]:
    """Run one stage of a run and return its metrics; a stage that is complete is skipped, unless `again`.

    Raises UserError when the stage was made with other settings: it is not made anew under the same run. An evaluation
    is: it runs again when its settings or its inputs have changed.
    """
    stopping.check()
    run_dir = paths(args).run_dir
    refuse_other_settings(job.stage, args)
    known = None if again else finished(job, args)
    if known is not None:
        print(f"== {job.name}: complete, skipped", flush=True)
        return known
    job.ready(args)
    inputs = job.inputs(args)
    print(f"== {job.name}", flush=True)
    if _is_first_process():
        begin(job.stage, args)
    began = time.time()
    with otel.opened(run=args.run.run, rank=int(os.environ.get("RANK", "0"))), otel.span(job.name) as span:
        output = dict(job.run(args))
        metrics = {key: value for key, value in output.items() if isinstance(value, int | float)}
        span.set(**{key.removeprefix(f"{job.name}/"): value for key, value in metrics.items()})
    seconds = time.time() - began
    flops = metrics.get(f"{job.name}/total_training_flops", 0.0)
    texts = {key: value for key, value in output.items() if key not in metrics}
    if _is_first_process():
        write_stage(
            run_dir, job.name, seconds, flops, metrics, texts, settings=made_with(job.stage, args), inputs=inputs
        )
    print(f"== {job.name}: done in {seconds:.1f} s", flush=True)
    return metrics


def finished(job: Job, args: Args, say: Callable[[str], object] = print) -> dict[str, Any] | None:
    """The metrics of a stage that need not run, or None; `say` is told why when a stage with a result runs again.

    Raises UserError when a training from before settings were recorded does not fit the settings asked for.
    """
    result = read_stage(paths(args).run_dir, job.name)
    if result is None:
        return None
    if job.stage.kind == EVALUATE:
        now = made_with(job.stage, args) | job.inputs(args)
        before = result.get("settings", {}) | result.get("inputs", {})
        changes = run_settings.differences(before, now)
        if not before:
            changes = ["its settings were not recorded"]
    else:
        changes = [] if job.has_output(args) else ["what it made is not there any more"]
        if not changes and job.stage.kind == TRAIN and "settings" not in result:
            job.ready(args)
    if changes:
        say(f"== {job.name}: runs again, because {'; '.join(changes)}")
        return None
    metrics: dict[str, Any] = result["metrics"]
    return metrics


def refuse_other_settings(stage: Stage, args: Args) -> None:
    """Raises UserError when the run has made something with other settings than this stage is asked to use."""
    run_settings.refuse_changes(paths(args).run_dir, args.run.run, stage, made_with(stage, args), source_name)


def made_with(stage: Stage, args: Args) -> dict[str, Any]:
    """The settings on which the result of a stage depends, by name of the flag."""
    values = flat_values(args)
    return run_settings.made_with(stage, values, source_name(values))


def begin(stage: Stage, args: Args) -> None:
    """Keep the settings of a stage that begins, and where the run was made: training's word counts, else the first."""
    run_dir = paths(args).run_dir
    run_settings.record(run_dir, stage, flat_values(args))
    if stage.kind == TRAIN or not storage.exists(storage.join(run_dir, "provenance.json")):
        provenance.record(run_dir)


def _is_first_process() -> bool:
    """Whether this process writes for all: under torchrun, the first."""
    return os.environ.get("RANK", "0") == "0"
