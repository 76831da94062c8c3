"""Tokens per second of binarizing a parquet file, beside what tiktoken alone does with the same text and threads.

    python -m megacontext.bench.binarize --data_dir DIR --threads 1

`tiktoken` is `Encoding.encode_ordinary_batch(texts, num_threads)` over texts that are in memory already: no parquet,
no packing, no disk. `binarize` is `binarize_file`: it reads the parquet file, tokenizes on the same number of threads,
packs, checksums and writes shards that are durable on disk. The two take turns, so that a busy moment of the machine
hits both; the ratio is the median over turns of binarize ÷ tiktoken, the rates are medians. Without `--tokenizer` a
vocabulary of `--vocab` tokens is trained on the file first. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacontext.data import parquet
from megacontext.data.binarize import binarize_file
from megacontext.data.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    result = measure(args)
    print(f"{'':>10} {'M tokens/s':>11} {'MB text/s':>10} {'seconds':>8}")
    for name in ("tiktoken", "binarize"):
        row = result[name]
        print(f"{name:>10} {row['tokens_per_s'] / 1e6:>11.3f} {row['bytes_per_s'] / 1e6:>10.2f} {row['seconds']:>8.2f}")
    print(
        f"binarize ÷ tiktoken: {result['ratio']:.3f} (per turn: {', '.join(f'{r:.3f}' for r in result['ratios'])}); "
        f"{result['tokens_kept_share']:.4%} of {result['tokens']:,} tokens kept"
    )
    print(json.dumps(result))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder of parquet shards; the last one is used")
    parser.add_argument("--tokenizer", default="", help="tokenizer folder; empty trains one on the file")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens of a vocabulary that is trained here")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a row, T")
    parser.add_argument("--threads", type=int, default=1, help="tokenizer threads of both")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time both in turns; one turn of each before that is not counted."""
    path = parquet.list_parquet(args.data_dir)[-1]
    texts = [text for group in parquet.read_texts(path) for text in group]
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else Tokenizer.train(texts, args.vocab)
    text_bytes = sum(len(text.encode()) for text in texts)
    seconds: dict[str, list[float]] = {"tiktoken": [], "binarize": []}
    with tempfile.TemporaryDirectory(prefix="bench-binarize-") as folder:
        for turn in range(args.repeats + 1):
            began = time.perf_counter()
            ids = tokenizer.encoding.encode_ordinary_batch(texts, num_threads=args.threads)
            tokens = sum(map(len, ids))
            bare_s = time.perf_counter() - began
            del ids
            out = str(Path(folder) / f"turn{turn}")
            began = time.perf_counter()
            receipt = binarize_file(path, out, tokenizer, args.seq_len + 1, num_threads=args.threads)
            ours_s = time.perf_counter() - began
            assert receipt.tokens_in == tokens, "both must make the same tokens"
            if turn:
                seconds["tiktoken"].append(bare_s)
                seconds["binarize"].append(ours_s)
    ratios = [bare / ours for bare, ours in zip(seconds["tiktoken"], seconds["binarize"], strict=True)]
    rates = {
        name: {
            "tokens_per_s": tokens / statistics.median(values),
            "bytes_per_s": text_bytes / statistics.median(values),
            "seconds": statistics.median(values),
        }
        for name, values in seconds.items()
    }
    return {
        "bench": "binarize",
        "threads": args.threads,
        "seq_len": args.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "tokens": tokens,
        "tokens_kept_share": receipt.tokens_kept / receipt.tokens_in,
        **rates,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


if __name__ == "__main__":
    main()
