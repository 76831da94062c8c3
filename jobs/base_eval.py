"""Measure the newest base checkpoint of a run: validation bits per byte beside n-gram baselines, CORE, samples.

    python jobs/base_eval.py --run mine --eval_bundle /path/to/eval_bundle

CORE needs `--eval_bundle`: a folder with core.yaml, eval_meta_data.csv and eval_data/, or another yaml file in it.
Tasks whose file is absent are named and left out of the mean. Prompts are not cropped, as in nanochat.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import time
from collections.abc import Callable
from typing import Any, TypeVar

import megacontext as mc
from jobs.runtime import cli
from jobs.runtime.stage import Job, run_stage
from megacontext import storage
from megacontext.checkpoint import MANIFEST, latest_checkpoint, list_checkpoints
from megacontext.config import DataConfig, EvalConfig, RunConfig
from megacontext.data.shards import ShardSet
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError
from megacontext.eval.bpb import evaluate_bpb, shard_batches, validation_rows
from megacontext.eval.core import evaluate_core
from megacontext.eval.core_tasks import CoreBundle, load_bundle
from megacontext.eval.ngram import evaluate_ngrams
from megacontext.eval.samples import continuations
from megacontext.model.gpt import GPT
from megacontext.stages import BASE_EVAL
from megacontext.telemetry import otel
from megacontext.train.worker import choose_device, prepare_process

SECTIONS = [RunConfig, DataConfig, EvalConfig]
STAGE = "base"

Value = TypeVar("Value")


def ready(args: cli.Args) -> None:
    """Raises CheckpointError when the run has no checkpoint, DataError when there is no evaluation bundle."""
    if not list_checkpoints(cli.paths(args).checkpoints_dir, STAGE):
        raise _nothing_trained(args)
    if args.eval.eval_bundle:
        load_bundle(args.eval.eval_bundle)


def inputs(args: cli.Args) -> dict[str, str]:
    """The newest checkpoint of the run: its name and a digest of its manifest, which names the content of its files."""
    paths = list_checkpoints(cli.paths(args).checkpoints_dir, STAGE)
    if not paths:
        return {}
    try:
        digest = storage.sha256_file(storage.join(paths[-1], MANIFEST))
    except FileNotFoundError:
        digest = "no manifest"
    return {"checkpoint": f"{paths[-1].rsplit('/', 1)[-1]} {digest[:12]}"}


def _nothing_trained(args: cli.Args) -> CheckpointError:
    where = cli.paths(args).checkpoints_dir
    return CheckpointError(f"run {args.run.run!r} has no base checkpoint in {where}; train it first.")


def run(args: cli.Args) -> dict[str, Any]:
    """Evaluate; flat metrics `base_eval/…`, and the samples as [prompt, continuation] pairs.

    Raises CheckpointError when the run has no base checkpoint, DataError when shards or bundle are damaged or do not fit.
    """
    where = cli.paths(args)
    path = latest_checkpoint(where.checkpoints_dir, STAGE)
    if path is None:
        raise _nothing_trained(args)
    bundle = load_bundle(args.eval.eval_bundle) if args.eval.eval_bundle else None  # before any work: it may be wrong
    prepare_process(args.run.cpus_per_worker)
    device = choose_device(args.run.device)
    model, tokenizer = mc.load(path, dtype=args.run.dtype, device=str(device))
    model.prepare_inference()
    print(f"checkpoint {path}, {device}, {model.compute_dtype}", flush=True)
    metrics: dict[str, Any] = {}
    metrics |= _timed("bits per byte", lambda: bits_per_byte(model, tokenizer, args))
    if bundle is not None:
        metrics |= _timed("CORE", lambda: core_metrics(model, tokenizer, bundle, args.eval.core_max_per_task))
    else:
        print("CORE: skipped, no --eval_bundle", flush=True)
    samples = _timed("samples", lambda: continuations(model, tokenizer, args.eval.sample_tokens))
    for sample in samples:
        print(f"  {sample.prompt!r} -> {sample.continuation!r}", flush=True)
    return metrics | {"base_eval/samples": [list(sample) for sample in samples]}


def bits_per_byte(model: GPT, tokenizer: Tokenizer, args: cli.Args) -> dict[str, float]:
    """Model, unigram and bigram on the same validation targets: the ones that training validates on."""
    from jobs.prepare_data import token_dirs

    train, val = (ShardSet.open(directory) for directory in token_dirs(args))
    val.check_fits(
        vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest, seq_len=model.config.sequence_len
    )
    if args.data.verify_shards:  # a shard of the same size from elsewhere would give a wrong number
        for shards in (train, val):
            shards.verify()
    rows = validation_rows(val, args.train.eval_tokens)
    token_bytes = tokenizer.token_bytes()
    batches = shard_batches(val, rows, args.train.device_batch_size, model.device)
    ours = evaluate_bpb(model, batches, token_bytes.to(model.device))
    grams = evaluate_ngrams(train, val, rows, token_bytes.numpy())
    print(
        f"bits per byte on {ours.tokens:,} validation tokens: model {ours.bpb:.4f}, bigram {grams.bigram.bpb:.4f}, "
        f"unigram {grams.unigram.bpb:.4f} (n-grams from {grams.train_tokens:,} training tokens)",
        flush=True,
    )
    return {
        "base_eval/val_bpb": ours.bpb,
        "base_eval/val_loss": ours.loss,
        "base_eval/val_tokens": ours.tokens,
        "base_eval/bigram_bpb": grams.bigram.bpb,
        "base_eval/unigram_bpb": grams.unigram.bpb,
        "base_eval/ngram_train_tokens": grams.train_tokens,
    }


def core_metrics(model: GPT, tokenizer: Tokenizer, bundle: CoreBundle, max_per_task: int) -> dict[str, float]:
    """CORE, its coverage, and per task the centred accuracy and the plain one."""
    result = evaluate_core(model, tokenizer, bundle, max_per_task, say=lambda line: print(line, flush=True))
    metrics = {
        "base_eval/core": result.core,
        "base_eval/core_tasks": len(result.tasks),
        "base_eval/core_tasks_listed": len(result.tasks) + len(result.missing),
    }
    for task in result.tasks:
        metrics[f"base_eval/core/{task.label}"] = task.centered
        metrics[f"base_eval/core_accuracy/{task.label}"] = task.accuracy
    return metrics


def _timed(name: str, work: Callable[[], Value]) -> Value:
    began = time.perf_counter()
    with otel.span(name.replace(" ", "_").lower()):
        result = work()
    print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return result


JOB = Job(BASE_EVAL, run, ready, inputs=inputs)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage(JOB, args))


if __name__ == "__main__":
    main()
