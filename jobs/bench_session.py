"""What a token of a session costs at different lengths of history, refocuses included.

    python jobs/bench_session.py --histories 16384 1000000 --budget 256 --tokens 256
    python jobs/bench_session.py --checkpoint runs/mine

Each history is appended to a session of its own; then the sessions generate in turns, `--turn` tokens at a time, so that
both meet the same load. Without a checkpoint the model has random weights and a memory. Times are CPU time of this
process; with `--threads 1` they are what one core needs. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import megacontext as mc
from jobs.runtime.user_paths import user_path
from megacontext import precision
from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.model.gpt import GPT


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    precision.set_threads(args.threads)
    model, tokenizer = _model(args)
    random = np.random.default_rng(0)
    sessions = []
    for history in args.histories:
        session = mc.Session(model, tokenizer, args.budget, recent_tokens=args.tail)
        began = time.process_time()
        session.append(random.integers(0, model.config.vocab_size - 9, history))
        sessions.append((session, time.process_time() - began))
    seconds = [0.0] * len(sessions)
    list(sessions[0][0].generate(max_tokens=2, stop=()))  # the first call of everything is not what a token costs
    turns = range(0, args.tokens, args.turn)
    for _ in turns:
        for number, (session, _) in enumerate(sessions):
            began = time.process_time()
            list(session.generate(max_tokens=args.turn, stop=()))
            seconds[number] += time.process_time() - began
    rows = [
        {
            "history": history,
            "ms_per_token": 1e3 * spent / (len(turns) * args.turn),
            "append_us_per_token": 1e6 * appended / history,
            "entries": len(session.entries),
            **session.stats.metrics(),
        }
        for history, (session, appended), spent in zip(args.histories, sessions, seconds, strict=True)
    ]
    result = {"rows": rows, "last_over_first": rows[-1]["ms_per_token"] / rows[0]["ms_per_token"], **vars(args)}
    print(f"{'history':>12} {'ms/token':>9} {'append µs':>9} {'entries':>8} {'recomputed/token':>17}")
    for row in rows:
        recomputed = row["runtime/recompute_tokens_per_token"]
        print(f"{row['history']:>12,} {row['ms_per_token']:>9.2f} {row['append_us_per_token']:>9.1f} "
              f"{row['entries']:>8} {recomputed:>17.2f}")  # fmt: skip
    print(json.dumps(result))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="", help="a checkpoint or run folder; random weights without it")
    parser.add_argument("--histories", type=int, nargs="+", default=[16_384, 1_000_000], help="tokens of the histories")
    parser.add_argument("--budget", type=int, default=256, help="entries of a working context, W")
    parser.add_argument("--tail", type=int, default=32, help="newest tokens that stay raw")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that each session generates")
    parser.add_argument("--turn", type=int, default=64, help="tokens of a turn; a turn begins with a refocus")
    parser.add_argument("--depth", type=int, default=4, help="layers of the model with random weights")
    parser.add_argument("--width", type=int, default=256, help="width of that model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0 is all cores")
    return parser


def _model(args: argparse.Namespace) -> tuple[GPT, Tokenizer]:
    if args.checkpoint:
        model, tokenizer = mc.load(user_path(args.checkpoint, "--checkpoint"))
    else:
        tokenizer = Tokenizer.train([__doc__ or ""] * 4, 300)
        shape = GPTConfig.from_depth(
            args.depth, vocab_size=tokenizer.vocab_size, sequence_len=max(args.budget, 512), width=args.width
        )
        model = GPT(shape)
        model.attach_memory(MemoryConfig(mc=1), router_trained=True)
        model.init_weights(torch.Generator().manual_seed(0))
    model.prepare_inference()
    return model, tokenizer


if __name__ == "__main__":
    main()
