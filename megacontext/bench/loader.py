"""Tokens per second at which batches are read from a memory map of token shards.

    python -m megacontext.bench.loader --device_batch 8 --seq_len 512

`stream` is `MmapStream`, the reader of training runs without Ray: the permuted order, the gather, the conversion to
int64 and the hand-over from its thread. `order` is the arithmetic of the order alone, `gather` reading the permuted
rows in one call of 4,096 rows. Without `--tokens_dir` it makes shards of random ids in a temporary folder; all reads
come from the page cache. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megacontext import storage
from megacontext.data.shards import VERSION, Manifest, ShardSet, ids_dtype, write_shard
from megacontext.data.stream import BatchPlan, MmapStream, RowOrder

GATHER_ROWS = 4096
VOCAB = 8192


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    if args.tokens_dir:
        result = measure(ShardSet.open(args.tokens_dir), args)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
            result = measure(random_shards(folder, args.seq_len, args.rows), args)
    print(f"{'part':>8} {'M tokens/s':>11}")
    for name, rate in result["tokens_per_s"].items():
        print(f"{name:>8} {rate / 1e6:>11.1f}")
    print(json.dumps(result))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens_dir", default="", help="folder of token shards; empty makes random ones")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a row of random shards, T")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of random shards")
    parser.add_argument("--device_batch", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--batches", type=int, default=2000, help="micro-batches a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns; medians are shown")
    return parser


def random_shards(folder: str, seq_len: int, rows: int, shards: int = 4) -> ShardSet:
    """Shards of random ids in `folder`, `rows` rows in all."""
    generator = np.random.default_rng(0)
    infos = []
    for index, part in enumerate(np.array_split(np.arange(rows), shards)):
        ids = generator.integers(0, VOCAB, (len(part), seq_len + 1)).astype(ids_dtype(VOCAB))
        infos.append(write_shard(storage.join(folder, f"random-{index:05d}.arrow"), {"ids": ids}))
    Manifest(
        version=VERSION,
        split="train",
        row_tokens=seq_len + 1,
        dtype=ids_dtype(VOCAB).name,
        vocab_size=VOCAB,
        tokenizer_digest="random",
        columns=("ids",),
        shards=tuple(infos),
        documents=rows,
        tokens_in=rows * seq_len,
        tokens_kept=rows * seq_len,
        source={},
    ).write(folder)
    return ShardSet.open(folder)


def measure(shards: ShardSet, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of the parts, taken in turns."""
    order = RowOrder(shards.num_rows, seed=0)
    plan = BatchPlan(args.device_batch, args.device_batch, 1)
    count = args.batches * args.device_batch

    def stream() -> int:
        return sum(len(batch.rows) for batch in MmapStream(shards, order, plan, 0, 0, args.batches))

    def permute() -> int:
        return len(order.rows(0, count))

    rows = order.rows(0, GATHER_ROWS)

    def gather() -> int:
        return sum(len(shards.read(rows)["ids"]) for _ in range(max(1, count // GATHER_ROWS)))

    parts: dict[str, Callable[[], int]] = {"stream": stream, "order": permute, "gather": gather}
    rates: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(args.repeats + 1):
        for name, part in parts.items():
            began = time.perf_counter()
            read = part()
            if turn:
                rates[name].append(read * (shards.row_tokens - 1) / (time.perf_counter() - began))
    return {
        "bench": "loader",
        "seq_len": shards.row_tokens - 1,
        "device_batch": args.device_batch,
        "rows": shards.num_rows,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
    }


if __name__ == "__main__":
    main()
