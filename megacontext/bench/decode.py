"""Tokens per second of generation: prefill and decode by batch, fp32 and bf16, beside a model without a cache.

    python -m megacontext.bench.decode --depth 4 --width 256 --threads 1

Every combination is warmed up, then timed `repeats` times in turn, so that a busy moment of the machine hits all of
them; figures are medians. Prints a table; the last line is JSON.

To compare with nanochat's engine on the CPU, give the folder of a nanochat checkout:

    git clone https://github.com/karpathy/nanochat
    python -m megacontext.bench.decode --nanochat nanochat --dtypes fp32 --batches 1,8 --threads 1 --device cpu

Both engines then generate by turns from one prompt: same shape, fp32, temperature 1, top-k 50. The ratio
`speed_over_nanochat` is nanochat's CPU time of a step over ours: above 1, ours is faster. CPU time is that of this
process, so with one thread it does not count what other programs on the machine take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megacontext import precision
from megacontext.bench.command import shape_parser
from megacontext.bench.nanochat_engine import NoStops, nanochat_engine
from megacontext.config import GPTConfig
from megacontext.errors import UserError
from megacontext.inference.engine import Engine, naive_generate
from megacontext.model.gpt import GPT

NAIVE_TOKENS = 16  # its first ones, where recomputing costs it least
NANOCHAT = "nanochat"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    precision.set_threads(args.threads)
    result = measure(args)
    print(
        f"{'dtype':>6} {'batch':>6} {'prefill tok/s':>14} {'decode tok/s':>13} {'ms/step':>8} {'CPU ms/step':>12} "
        f"{'vs no cache':>12} {'vs nanochat':>12}"
    )
    for row in result["rows"]:
        ratio = row.get("speed_over_nanochat")
        print(
            f"{row['dtype']:>6} {row['batch']:>6} {row['prefill_tokens_per_s']:>14,.0f} "
            f"{row['decode_tokens_per_s']:>13,.0f} {row['step_ms']:>8.2f} {row['cpu_step_ms']:>12.2f} "
            f"{row['speedup_over_naive']:>11.1f}× {'-' if ratio is None else f'{ratio:.2f}×':>12}"
        )
    print(json.dumps(result))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = shape_parser(__doc__)
    parser.add_argument("--head_dim", type=int, default=0, help="width of a head; 0 is by depth and width")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated per row")
    parser.add_argument("--batches", default="1,8,32", help="samples of the prompt at a time, comma-separated")
    parser.add_argument("--dtypes", default="fp32,bf16", help="compute dtypes, comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions")
    parser.add_argument(
        "--nanochat", default="", help="folder of a nanochat checkout to compare with, in fp32 on the CPU"
    )
    return parser


@dataclass
class _Times:
    """Seconds of one cell: to the first column, and of every further one by the clock and by the CPU."""

    first: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time every dtype and batch. The speed-up is in tokens per second, over `naive_generate` of one row.

    Raises UserError for a comparison with nanochat that cannot be: of another dtype than fp32, or on a GPU.
    """
    config = GPTConfig.from_depth(
        args.depth, vocab_size=args.vocab, sequence_len=args.prompt + args.new, width=args.width
    )
    if args.head_dim:
        heads = config.n_embd // args.head_dim
        config = replace(config, n_head=heads, n_kv_head=heads)
    device, dtypes = precision.device_of(args.device), args.dtypes.split(",")
    if args.nanochat and ("fp32" not in dtypes or device.type != "cpu"):
        raise UserError("--nanochat compares in fp32 on the CPU; add --dtypes fp32 --device cpu.")
    prompt = torch.randint(1, args.vocab, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    models = {dtype: _model(config, dtype, device) for dtype in dtypes}
    engines: dict[str, Any] = {dtype: Engine(model, NoStops(args.vocab)) for dtype, model in models.items()}  # type: ignore[arg-type]
    with nanochat_engine(args.nanochat, models["fp32"]) if args.nanochat else nullcontext() as other:
        if other is not None:
            engines[NANOCHAT] = other
        times, naive = _timed(engines, models, prompt, args)
    return {
        "bench": "decode",
        "config": vars(args),
        "params": sum(parameter.numel() for parameter in models[dtypes[0]].parameters()),
        "threads": torch.get_num_threads(),
        "rows": [_row(cell, times, naive, args) for cell in times if cell[0] != NANOCHAT],
    }


def _timed(
    engines: dict[str, Any], models: dict[str, GPT], prompt: list[int], args: argparse.Namespace
) -> tuple[dict[tuple[str, int], _Times], dict[str, list[float]]]:
    """Times of every (engine, batch), and seconds a token of every model without a cache, all taken in turn."""
    cells = [(name, int(batch)) for name in engines for batch in args.batches.split(",")]
    times = {cell: _Times() for cell in cells}
    naive: dict[str, list[float]] = {dtype: [] for dtype in models}
    for repeat in range(args.repeats + 1):
        for dtype, model in models.items():
            began = time.perf_counter()
            naive_generate(model, prompt, NAIVE_TOKENS)
            naive[dtype].append((time.perf_counter() - began) / NAIVE_TOKENS)
        for name, batch in cells:
            _time(engines[name], prompt, batch, args.new, times[name, batch])
        if not repeat:  # the first warms up
            times, naive = {cell: _Times() for cell in cells}, {dtype: [] for dtype in models}
    return times, naive


def _row(
    cell: tuple[str, int], times: dict[tuple[str, int], _Times], naive: dict[str, list[float]], args: argparse.Namespace
) -> dict[str, Any]:
    dtype, batch = cell
    step_s, cpu_s = statistics.median(times[cell].step), statistics.median(times[cell].cpu)
    row = {
        "dtype": dtype,
        "batch": batch,
        "prefill_tokens_per_s": args.prompt / statistics.median(times[cell].first),
        "decode_tokens_per_s": batch / step_s,
        "step_ms": 1e3 * step_s,
        "cpu_step_ms": 1e3 * cpu_s,
        "naive_tokens_per_s": 1 / statistics.median(naive[dtype]),
        "speedup_over_naive": batch * statistics.median(naive[dtype]) / step_s,
    }
    if dtype == "fp32" and (NANOCHAT, batch) in times:
        other = statistics.median(times[NANOCHAT, batch].cpu)
        row |= {"nanochat_cpu_step_ms": 1e3 * other, "speed_over_nanochat": other / cpu_s}
    return row


def _model(config: GPTConfig, dtype: str, device: torch.device) -> GPT:
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    model.compute_dtype = precision.choose_dtype(dtype, device)
    model.prepare_inference()
    return model


def _time(engine: Any, prompt: list[int], batch: int, new: int, times: _Times) -> None:
    """Generate `new` columns and add how long each took."""
    columns = engine.generate(prompt, num_samples=batch, max_tokens=new, temperature=1.0, top_k=50)
    wall, cpu = time.perf_counter(), time.process_time()
    for number, _ in enumerate(columns):
        now, cpu_now = time.perf_counter(), time.process_time()
        if number:
            times.step.append(now - wall)
            times.cpu.append(cpu_now - cpu)
        else:
            times.first.append(now - wall)
        wall, cpu = time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
