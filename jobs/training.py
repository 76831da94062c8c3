"""What training jobs have in common: a stage of the pipeline as a task, as a job and as a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jobs.prepare_data import token_dirs
from jobs.runtime import cli
from jobs.runtime.checks import check, planned_task, shape_of_flags
from jobs.runtime.launch import run_training
from jobs.runtime.stage import Job, run_stage
from jobs.runtime.stopping import Stopped
from jobs.runtime.take_over import take_over
from megacontext import api
from megacontext.checkpoint import latest_checkpoint, list_checkpoints, read_meta
from megacontext.config import DataConfig, FocusConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig
from megacontext.data.shards import ShardSet
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError
from megacontext.stages import Stage
from megacontext.telemetry import provenance
from megacontext.train.recipe import Recipe
from megacontext.train.resume import checkpoints_dir
from megacontext.train.setup import check_horizon, known_horizon
from megacontext.train.task import TrainTask

SECTIONS = [RunConfig, DataConfig, ModelConfig, TrainConfig, MemoryConfig, FocusConfig]
Folders = Callable[[cli.Args], tuple[str, str]]
"""Where the token shards (train, val) of a stage are; "" for a stage whose rows are no shards."""


def job(stage: Stage, recipe: Recipe | None = None, folders: Folders = token_dirs) -> Job:
    """The job of a stage that trains by a recipe; next-token cross-entropy on shards unless given."""

    def task(args: cli.Args) -> TrainTask:
        return task_of(stage, args, recipe or Recipe(), folders)

    def run(args: cli.Args) -> dict[str, Any]:
        return result_of(stage, run_training(replace(task(args), provenance=provenance.collect()), args))

    def has_checkpoint(args: cli.Args) -> bool:
        return bool(list_checkpoints(cli.paths(args).checkpoints_dir, stage.checkpoint))

    return Job(stage, run, lambda args: ready(task(args)), has_checkpoint)


def task_of(stage: Stage, args: cli.Args, recipe: Recipe | None = None, folders: Folders = token_dirs) -> TrainTask:
    """A stage as plain data. Raises UserError or CheckpointError when tokenizer or start are not there yet."""
    start = start_of(stage, args)
    tokenizer = Tokenizer.load(cli.paths(args).tokenizer_dir)
    train_dir, val_dir = folders(args)
    planned = planned_task(args, stage)
    gpt = planned.gpt if start else shape_of_flags(args, tokenizer.vocab_size)
    if stage.after:
        assert start is not None
        gpt = replace(api.shape_of(start)[0], sequence_len=args.data.max_seq_len)
    return replace(
        planned, recipe=recipe or Recipe(), train_tokens_dir=train_dir, val_tokens_dir=val_dir, gpt=gpt, init_from=start
    )


def start_of(stage: Stage, args: cli.Args) -> str | None:
    """The checkpoint whose weights a stage starts from: the run's newest of a stage before it, or the one taken over by
    `--init_from`; None for new weights. Raises CheckpointError when a stage before it has none."""
    if not stage.after:
        return take_over(args)
    where = cli.paths(args).checkpoints_dir
    for before in stage.after:
        found = latest_checkpoint(where, before)
        if found is not None:
            return found
    raise CheckpointError(
        f"{stage.name} of run {args.run.run!r} starts from a checkpoint of {' or '.join(stage.after)}, and {where} has "
        "none; train it first."
    )


def ready(task: TrainTask) -> None:
    """Raises DataError when there are no shards, CheckpointError when the newest checkpoint has other settings."""
    for directory in filter(None, (task.train_tokens_dir, task.val_tokens_dir)):
        ShardSet.open(directory)
    for path in list_checkpoints(checkpoints_dir(task), task.stage)[-1:]:
        try:
            meta = read_meta(path)
            identity, steps = meta["identity"], meta["num_iterations"]
        except (FileNotFoundError, ValueError, KeyError):
            return  # training passes over a damaged checkpoint, and says so
        task.check_continues(identity, path)
        horizon = known_horizon(task)
        check_horizon(path, steps, steps if horizon is None else horizon)


def result_of(stage: Stage, result: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a training run that reached its horizon. Raises Stopped for one that a signal ended early."""
    if not result["finished"]:
        where = f"checkpoint {result['checkpoint']}" if result["checkpoint"] else "no step was done, nothing is lost"
        raise Stopped(f"stopped at step {result['step']}; {where}. Run the same command to continue.")
    values = {**result["metrics"], "checkpoint": result["checkpoint"]}
    return {f"{stage.name}/{name}": value for name, value in values.items()}


def main(training: Job, about: str | None) -> None:
    """Run a stage of training as a command: its settings are checked first."""
    args = cli.parse(SECTIONS, about, stage=training.name)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: start(training, args))


def start(training: Job, args: cli.Args) -> None:
    """Check the settings, then run the stage."""
    check(args, [training])
    run_stage(training, args)
