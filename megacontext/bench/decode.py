"""Tokens per second of generation: prefill and decode by batch, fp32 and bf16, beside a model without a cache.

    python -m megacontext.bench.decode --depth 4 --width 256 --threads 1

Every combination is warmed up, then timed `repeats` times in turn, so that a busy moment of the machine hits all of
them; figures are medians. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megacontext import precision
from megacontext.bench.command import shape_parser
from megacontext.config import GPTConfig
from megacontext.inference.engine import Engine, naive_generate
from megacontext.model.gpt import GPT

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer

NAIVE_TOKENS = 16  # its first ones, where recomputing costs it least


class _NoStops:
    """Stands in for a tokenizer whose special ids never occur, so that no row ends early and no tool runs."""

    bos_id = -2

    def special(self, name: str) -> int:
        return -2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    precision.set_threads(args.threads)
    result = measure(args)
    print(f"{'dtype':>6} {'batch':>6} {'prefill tok/s':>14} {'decode tok/s':>13} {'ms/step':>8} {'vs no cache':>12}")
    for row in result["rows"]:
        print(
            f"{row['dtype']:>6} {row['batch']:>6} {row['prefill_tokens_per_s']:>14,.0f} "
            f"{row['decode_tokens_per_s']:>13,.0f} {row['step_ms']:>8.2f} {row['speedup_over_naive']:>11.1f}×"
        )
    print(json.dumps(result))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = shape_parser(__doc__)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated per row")
    parser.add_argument("--batches", default="1,8,32", help="samples of the prompt at a time, comma-separated")
    parser.add_argument("--dtypes", default="fp32,bf16", help="compute dtypes, comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every dtype and batch. The speed-up is in tokens per second, over `naive_generate` of one row."""
    config = GPTConfig.from_depth(
        args.depth, vocab_size=args.vocab, sequence_len=args.prompt + args.new, width=args.width
    )
    device = torch.device(args.device)
    prompt = torch.randint(1, args.vocab, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    models = {dtype: _model(config, dtype, device) for dtype in args.dtypes.split(",")}
    cells = [(dtype, int(batch)) for dtype in models for batch in args.batches.split(",")]
    naive: dict[str, list[float]] = {dtype: [] for dtype in models}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {cell: [] for cell in cells}
    for repeat in range(args.repeats + 1):  # the first warms up
        for dtype, model in models.items():
            began = time.perf_counter()
            naive_generate(model, prompt, NAIVE_TOKENS)
            naive[dtype] += [(time.perf_counter() - began) / NAIVE_TOKENS] if repeat else []
        for cell in cells:
            timed = _time(models[cell[0]], prompt, cell[1], args.new)
            times[cell] += [timed] if repeat else []
    rows = []
    for dtype, batch in cells:
        prefill_s = statistics.median(prefill for prefill, _ in times[dtype, batch])
        step_s = statistics.median(step for _, step in times[dtype, batch])
        rows.append(
            {
                "dtype": dtype,
                "batch": batch,
                "prefill_tokens_per_s": args.prompt / prefill_s,
                "decode_tokens_per_s": batch / step_s,
                "step_ms": 1e3 * step_s,
                "naive_tokens_per_s": 1 / statistics.median(naive[dtype]),
                "speedup_over_naive": batch * statistics.median(naive[dtype]) / step_s,
            }
        )
    return {
        "bench": "decode",
        "config": vars(args),
        "params": sum(parameter.numel() for parameter in models[cells[0][0]].parameters()),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def _model(config: GPTConfig, dtype: str, device: torch.device) -> GPT:
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    model.compute_dtype = precision.choose_dtype(dtype, device)
    model.prepare_inference()
    return model


def _time(model: GPT, prompt: list[int], batch: int, new: int) -> tuple[float, float]:
    """Seconds to the first column, and median seconds of every further one."""
    tokenizer: Tokenizer = _NoStops()  # type: ignore[assignment]  # all that Engine needs when no tool runs
    columns = Engine(model, tokenizer).generate(prompt, batch, new, temperature=1.0, top_k=50)
    began = time.perf_counter()
    next(columns)
    marks = [time.perf_counter()]
    marks += [time.perf_counter() for _ in columns]
    return marks[0] - began, statistics.median(b - a for a, b in itertools.pairwise(marks))


if __name__ == "__main__":
    main()
