"""What Ray costs: the same training without Ray, through Ray with a memory map, and through Ray with Ray Data.

    python jobs/bench_ray.py --depth 4 --width 256 --seq 512 --steps 60 --rounds 3

All three train the same model on the same generated shards, one worker, interleaved round by round; compared is the
median time of a step inside the loop. A table for people, JSON on the last line.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import statistics
import tempfile
from dataclasses import replace

import numpy as np

from jobs.runtime import cli
from jobs.runtime.launch import run_training
from jobs.runtime.parser import Parser
from megacontext.config import GPTConfig, TrainConfig
from megacontext.data.shards import Manifest, write_shard
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import UserError
from megacontext.train.task import TrainTask

WAYS = {
    "local": {"launcher": "local", "stream": "mmap"},
    "ray_mmap": {"launcher": "ray", "stream": "mmap"},
    "ray_data": {"launcher": "ray", "stream": "ray"},
}
SKIPPED_S = 15.0  # Ray starts processes beside the first steps, which import for some seconds
VOCAB = 2048


def make_data(folder: Path, seq: int, rows: int) -> Tokenizer:
    """A small tokenizer and random shards; what the ids are does not change the time of a step."""
    tokenizer = Tokenizer.train(
        [Path(module.__file__).read_text() for module in (argparse, statistics, tempfile)], VOCAB
    )
    tokenizer.save(str(folder / "tokenizer"))
    for split, count in (("train", rows), ("val", 8)):
        ids = np.random.default_rng(0).integers(0, VOCAB - 9, (count, seq + 1)).astype(np.uint16)
        info = write_shard(str(folder / split / "shard_00000.arrow"), {"ids": ids})
        Manifest(
            version=1, split=split, row_tokens=seq + 1, dtype="uint16", vocab_size=VOCAB, columns=("ids",),
            tokenizer_digest=tokenizer.digest, shards=(info,), documents=count, tokens_in=count * seq,
            tokens_kept=count * seq, source={},
        ).write(str(folder / split))  # fmt: skip
    return tokenizer


def step_seconds(task: TrainTask) -> list[float]:
    """Time of each step of a finished run, those of the first seconds left out."""
    records = [json.loads(line) for line in Path(task.run_dir, "metrics.jsonl").read_text().splitlines()]
    seconds = [record["train/dt"] for record in records if "train/dt" in record]
    kept = [step for step, total in zip(seconds, np.cumsum(seconds), strict=True) if total > SKIPPED_S]
    if not kept:
        raise UserError(
            f"{len(seconds)} steps took {sum(seconds):.0f} s, of which {SKIPPED_S:.0f} s are warm-up; raise --steps."
        )
    return kept


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--depth", type=int, default=4, help="layers [default 4]")
    parser.add_argument("--width", type=int, default=256, help="model width [default 256]")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a row [default 512]")
    parser.add_argument("--device_batch_size", type=int, default=8, help="rows per micro-batch [default 8]")
    parser.add_argument("--steps", type=int, default=60, help="steps of one run [default 60]")
    parser.add_argument("--threads", type=int, default=0, help="cores of the training process; 0 is all [default 0]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, interleaved [default 3]")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="compute dtype [default auto]"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, flags.seq, rows=4096)
        base = TrainTask(
            stage="base", run_dir="", train_tokens_dir=str(folder / "train"), val_tokens_dir=str(folder / "val"),
            tokenizer_dir=str(folder / "tokenizer"), seed=1, dtype=flags.dtype,
            gpt=replace(GPTConfig.from_depth(flags.depth, vocab_size=VOCAB, sequence_len=flags.seq, width=flags.width)),
            train=TrainConfig(num_iterations=flags.steps, device_batch_size=flags.device_batch_size,
                              total_batch_size=flags.device_batch_size * flags.seq, eval_every=-1, save_every=-1,
                              eval_tokens=flags.seq, log_every=1000),
        )  # fmt: skip
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(flags.rounds):
            for way, settings in WAYS.items():
                train = replace(base.train, stream=settings["stream"])
                task = replace(base, run_dir=str(folder / f"{way}{number}"), train=train)
                run_training(
                    task,
                    cli.resolve(
                        {"tier": "cpu", "base_dir": name, "wandb": "off", "cpus_per_worker": flags.threads, **settings}
                    ),
                )
                seconds[way].append(statistics.median(step_seconds(task)))
    tokens = base.train.total_batch_size
    result: dict[str, float] = {f"{way}_tok_per_s": tokens / statistics.median(times) for way, times in seconds.items()}
    result["ray_over_local"] = result["ray_mmap_tok_per_s"] / result["local_tok_per_s"]
    result["ray_data_over_mmap"] = result["ray_data_tok_per_s"] / result["ray_mmap_tok_per_s"]
    result["ray_data_over_local"] = result["ray_data_tok_per_s"] / result["local_tok_per_s"]
    for key, value in result.items():
        print(f"{key:24} {value:12,.3f}")
    print(json.dumps({**vars(flags), **result, "step_s": seconds}))


if __name__ == "__main__":
    main()
