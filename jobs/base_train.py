"""Pretrain the base model on token shards, from its newest checkpoint if the run has one.

ray job submit --working-dir . -- python jobs/base_train.py --run mine --depth 12
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import replace
from typing import Any

from jobs import cli
from jobs.launch import run_training
from jobs.stage import run_stage
from jobs.take_over import shape, take_over
from megacontext.config import DataConfig, GPTConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import UserError
from megacontext.telemetry import provenance
from megacontext.train.auto_batch import fitting_batch
from megacontext.train.task import TrainTask

SECTIONS = [RunConfig, DataConfig, ModelConfig, TrainConfig, MemoryConfig]
STAGE = "base"


class Stopped(UserError):
    """The stage was asked to stop; its checkpoint is written and the same command continues it."""


def task_of(args: cli.Args) -> TrainTask:
    """The base stage as plain data. Raises UserError when tokenizer or shards are not there yet."""
    from jobs.prepare_data import token_dirs

    where = cli.paths(args)
    start = take_over(args)
    tokenizer = Tokenizer.load(where.tokenizer_dir)
    train_dir, val_dir = token_dirs(args)
    memory = args.memory if args.memory.mc else None
    return TrainTask(
        stage=STAGE,
        run_dir=where.run_dir,
        train_tokens_dir=train_dir,
        val_tokens_dir=val_dir,
        tokenizer_dir=where.tokenizer_dir,
        gpt=shape(start, args.data.max_seq_len) if start else _shape_of_flags(args, tokenizer.vocab_size),
        init_from=start,
        train=args.train if memory is None else with_fitting_batch(args.train, memory, args.data.max_seq_len),
        memory=memory,
        seed=args.run.seed,
        dtype=args.run.dtype,
        compile=args.run.compile,
        verify_shards=bool(args.data.verify_shards),
        provenance=provenance.collect(),
    )


def _shape_of_flags(args: cli.Args, vocab_size: int) -> GPTConfig:
    return GPTConfig.from_depth(
        args.model.depth,
        vocab_size=vocab_size,
        sequence_len=args.data.max_seq_len,
        width=args.model.width,
        n_kv_head=args.model.n_kv_head,
        token_shift=bool(args.model.token_shift),
    )


def with_fitting_batch(train: TrainConfig, memory: MemoryConfig, tokens: int) -> TrainConfig:
    """The training settings with a device batch whose views fit; says so when it is another one."""
    fitting = fitting_batch(train.device_batch_size, memory, tokens)
    if fitting != train.device_batch_size:
        print(
            f"--mc_auto_batch: device batch {train.device_batch_size} -> {fitting} rows, so that their views fit where the "
            f"rows did; tokens per step stay {train.total_batch_size}",
            flush=True,
        )
    return replace(train, device_batch_size=fitting)


def run(args: cli.Args) -> dict[str, Any]:
    """Train to the horizon. Raises Stopped when a signal ended it early."""
    result = run_training(task_of(args), args)
    if not result["finished"]:
        raise Stopped(
            f"stopped at step {result['step']}; checkpoint {result['checkpoint']}. Run the same command to continue."
        )
    return {f"base_train/{name}": value for name, value in result["metrics"].items()} | {
        "base_train/checkpoint": result["checkpoint"]
    }


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage("base_train", args, run))


if __name__ == "__main__":
    main()
