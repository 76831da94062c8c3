"""Pretrain the base model on token shards, from its newest checkpoint if the run has one.

ray job submit --working-dir . -- python jobs/base_train.py --run mine --depth 12
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jobs.runtime import cli
from jobs.runtime.checks import check, planned_task, shape_of_flags
from jobs.runtime.launch import run_training
from jobs.runtime.stage import Job, run_stage
from jobs.runtime.stopping import Stopped
from jobs.runtime.take_over import take_over
from megacontext.checkpoint import list_checkpoints, read_meta
from megacontext.config import DataConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig
from megacontext.data.shards import ShardSet
from megacontext.data.tokenizer import Tokenizer
from megacontext.telemetry import provenance
from megacontext.train.setup import check_horizon, known_horizon
from megacontext.train.task import TrainTask

SECTIONS = [RunConfig, DataConfig, ModelConfig, TrainConfig, MemoryConfig]
STAGE = "base"


def task_of(args: cli.Args) -> TrainTask:
    """The base stage as plain data. Raises UserError when tokenizer or shards are not there yet."""
    return replace(_task_as_given(args), provenance=provenance.collect())


def _task_as_given(args: cli.Args) -> TrainTask:
    """The base stage without its provenance."""
    from jobs.prepare_data import token_dirs

    start = take_over(args)
    tokenizer = Tokenizer.load(cli.paths(args).tokenizer_dir)
    train_dir, val_dir = token_dirs(args)
    planned = planned_task(args)
    return replace(
        planned,
        stage=STAGE,
        train_tokens_dir=train_dir,
        val_tokens_dir=val_dir,
        gpt=planned.gpt if start else shape_of_flags(args, tokenizer.vocab_size),
        init_from=start,
    )


def ready(args: cli.Args) -> None:
    """Raises DataError when there are no shards, CheckpointError when the newest checkpoint has other settings."""
    task = _task_as_given(args)
    for directory in (task.train_tokens_dir, task.val_tokens_dir):
        ShardSet.open(directory)
    for path in list_checkpoints(cli.paths(args).checkpoints_dir, STAGE)[-1:]:
        try:
            meta = read_meta(path)
            identity, steps = meta["identity"], meta["num_iterations"]
        except (FileNotFoundError, ValueError, KeyError):
            return  # training passes over a damaged checkpoint, and says so
        task.check_continues(identity, path)
        horizon = known_horizon(task)
        check_horizon(path, steps, steps if horizon is None else horizon)


def has_checkpoint(args: cli.Args) -> bool:
    """Whether the run has a checkpoint of this stage."""
    return bool(list_checkpoints(cli.paths(args).checkpoints_dir, STAGE))


def run(args: cli.Args) -> dict[str, Any]:
    """Train to the horizon. Raises Stopped when a signal ended it early."""
    return result_of(run_training(task_of(args), args))


def result_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a training run that reached its horizon. Raises Stopped for one that a signal ended early."""
    if not result["finished"]:
        where = f"checkpoint {result['checkpoint']}" if result["checkpoint"] else "no step was done, nothing is lost"
        raise Stopped(f"stopped at step {result['step']}; {where}. Run the same command to continue.")
    return {f"base_train/{name}": value for name, value in result["metrics"].items()} | {
        "base_train/checkpoint": result["checkpoint"]
    }


JOB = Job("base_train", run, ready, has_checkpoint)


def start(args: cli.Args) -> None:
    """Check the settings, then run the stage."""
    check(args, [JOB])
    run_stage(JOB, args)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: start(args))


if __name__ == "__main__":
    main()
