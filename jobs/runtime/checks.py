"""What can be known to be wrong before any work: each check here is the one that the work itself would fail by, made early."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

import numpy as np
import torch

from jobs.runtime import hardware
from jobs.runtime.cli import Args, paths
from jobs.runtime.run_settings import shape_of_start
from jobs.runtime.stage import Job, finished, refuse_other_settings
from megacontext import precision
from megacontext.config import MIN_VOCAB_SIZE, GPTConfig, RunConfig
from megacontext.data.recall_words import WordList
from megacontext.data.stream import BatchPlan
from megacontext.errors import UserError
from megacontext.eval.core_tasks import load_bundle
from megacontext.stages import BASE, BASE_EVAL, TRAIN, Stage
from megacontext.telemetry.tracker import resolve_wandb_mode
from megacontext.train.recall_mix import RecallMix
from megacontext.train.task import TrainTask, horizon_steps
from megacontext.train.views import ViewSettings


def check(args: Args, jobs: Sequence[Job]) -> None:
    """Raise UserError for settings by which one of these jobs would fail or be refused, before the first of them begins."""
    for job in jobs:
        refuse_other_settings(job.stage, args)
    if any(job.stage.kind == TRAIN and finished(job, args, say=lambda line: None) is None for job in jobs):
        check_training(args)
    if args.eval.eval_bundle and any(job.stage == BASE_EVAL for job in jobs):
        load_bundle(args.eval.eval_bundle)


def check_training(args: Args) -> None:
    """Raise UserError for a launcher, device, compiler, W&B, shape, batch or memory with which training cannot run."""
    check_launcher(args)
    check_wandb(args.run.wandb)
    task = planned_task(args)
    horizon_steps(task, 1)
    check_memory(task)
    workers = worker_count(args.run)
    if args.run.compile == "on" and (args.run.device == "cpu" or not hardware.gpu_count(args.run.launcher)):
        precision.choose_compile("on", torch.device("cpu"))
    # With --mc_auto_batch the device batch is chosen later, and rows are shared out one at a time in the worst case.
    shrinks = task.memory is not None and task.memory.mc_auto_batch
    BatchPlan(task.rows_per_step, 1 if shrinks else task.train.device_batch_size, workers)


def check_launcher(args: Args) -> None:
    """Raise UserError for settings of one launcher that are given to the other."""
    run = args.run
    if run.launcher != "local":
        return
    if args.train.stream == "ray":
        raise UserError("--stream ray needs --launcher ray; use --stream mmap (or auto) with --launcher local.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if run.num_workers not in (0, processes):
        raise UserError(
            f"--num_workers is {run.num_workers}, but --launcher local trains in {processes} process"
            f"{'es' if processes > 1 else ''}: it starts none itself. Use --launcher ray, or start them with `torchrun "
            f"--nproc_per_node {run.num_workers}`, or leave --num_workers out."
        )


def worker_count(run: RunConfig) -> int:
    """Training processes of a job. Raises UserError when a GPU is asked for, or the tier needs one, and there is none."""
    if run.device == "cpu":
        gpus = 0
    else:
        gpus = hardware.gpu_count(run.launcher)
        if not gpus and (run.device == "cuda" or hardware.needs_gpu(run.tier)):
            asked = "--device cuda asks" if run.device == "cuda" else f"--tier {run.tier} is sized"
            remedy = "Use --device auto" if run.device == "cuda" else "Use --tier cpu"
            insist = (
                ""
                if run.device == "cuda"
                else ", or insist with --device cpu: a tier for GPUs takes very long on a CPU"
            )
            raise UserError(
                f"{asked} for a GPU, and there is none on {hardware.searched(run.launcher)}. {remedy}, or submit the job "
                f"to a cluster with GPUs{insist}."
            )
    if run.launcher == "local":
        return int(os.environ.get("WORLD_SIZE", "1"))
    if gpus and run.num_workers > gpus:
        raise UserError(
            f"--num_workers {run.num_workers} needs {run.num_workers} GPUs, there are {gpus}; use --num_workers {gpus} or fewer."
        )
    return run.num_workers or max(1, gpus)


def check_wandb(mode: str) -> None:
    """Raise UserError when uploads are asked for and there is no key for them."""
    if resolve_wandb_mode(mode, os.environ) != "online" or os.environ.get("WANDB_API_KEY"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        known = netrc.netrc().authenticators(host)  # `wandb login` keeps the key there
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        raise UserError(
            "--wandb online needs a key, and WANDB_API_KEY is not set. Set it in the environment or in .mc_env (cluster/"
            "setup.sh asks for it), or use --wandb offline or off."
        )


def check_memory(task: TrainTask) -> None:
    """Raise UserError when the contexts or the recall tasks of `--mc` do not fit into a row of training."""
    memory, tokens = task.memory, task.gpt.sequence_len
    if memory is None:
        return
    ViewSettings.of(memory, tokens)
    if memory.mc_recall_share:
        # The tokenizer does not exist yet. No vocabulary has more words than merges, and a list that is too long for a
        # row is not the problem: only what fails with as many words as there can be is refused here.
        words = WordList.from_ids(np.arange(1, 1 + task.gpt.vocab_size - MIN_VOCAB_SIZE), 0)
        RecallMix(memory.mc_recall_share, task.seed, words, tokens + 1, memory.block_size)


def planned_task(args: Args, stage: Stage = BASE) -> TrainTask:
    """A stage of training as the settings plan it; its tokenizer and its shards need not exist.

    Raises UserError when the shape of the model cannot be.
    """
    where = paths(args)
    if args.run.init_from:
        taken, _ = shape_of_start(args.run.init_from, where.start_dir)
        gpt = replace(taken, sequence_len=args.data.max_seq_len)
    else:
        gpt = shape_of_flags(args, args.data.vocab_size)
    return TrainTask(
        stage=stage.checkpoint,
        run_dir=where.run_dir,
        train_tokens_dir="",
        val_tokens_dir="",
        tokenizer_dir=where.tokenizer_dir,
        gpt=gpt,
        train=args.train,
        memory=args.memory if args.memory.mc else None,
        seed=args.run.seed,
        dtype=args.run.dtype,
        compile=args.run.compile,
        verify_shards=bool(args.data.verify_shards),
    )


def shape_of_flags(args: Args, vocab_size: int) -> GPTConfig:
    """The shape of the model that the flags describe. Raises UserError naming them when there is none."""
    model = args.model
    try:
        return GPTConfig.from_depth(
            model.depth,
            vocab_size=vocab_size,
            sequence_len=args.data.max_seq_len,
            width=model.width,
            n_kv_head=model.n_kv_head,
            token_shift=bool(model.token_shift),
        )
    except UserError as error:
        raise UserError(
            f"--depth {model.depth} with --width {model.width} and --n_kv_head {model.n_kv_head} is no model: {error}"
        ) from None
