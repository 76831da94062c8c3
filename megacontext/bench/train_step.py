"""Training tokens per second of our step: forward, backward, clip and update, on synthetic or given tokens.

    python -m megacontext.bench.train_step --depth 4 --width 256 --seq 512 --micro_tokens 4096 --threads 1

Prints a table; the last line is JSON. `cpu` figures are process time: with one thread they do not count what other
programs on the machine take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megacontext import precision
from megacontext.bench.command import add_training, device_name, shape_parser, show
from megacontext.config import GPTConfig, TrainConfig
from megacontext.model.flops import count_params, peak_flops, train_flops_per_token
from megacontext.model.gpt import GPT
from megacontext.train import schedule
from megacontext.train.optim import build_optimizer


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    result = measure(args)
    show(result)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = shape_parser(__doc__)
    add_training(parser, seq=512, steps=20, warmup=3)
    parser.add_argument("--head_dim", type=int, default=64, help="width of a head")
    parser.add_argument("--micro_tokens", type=int, default=4096, help="tokens per forward and backward")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--tokens", default="", help=".npy of token ids to train on; random ids unless given")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time `args.steps` optimizer steps. Raises UserError for shapes or settings that cannot be."""
    device = torch.device(args.device)
    threads = precision.set_threads(args.threads)
    precision.keep_freed_memory()
    width = args.width or 64 * args.depth
    heads = width // args.head_dim
    config = GPTConfig(sequence_len=args.seq, vocab_size=args.vocab, n_layer=args.depth, n_head=heads, n_kv_head=heads,
                       n_embd=width)  # fmt: skip
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.compute_dtype = precision.choose_dtype(args.dtype, device)
    model.to(device)
    compiled = precision.choose_compile(args.compile, device)
    forward = model.compiled() if compiled else model
    optimizer = build_optimizer(model, TrainConfig())
    rows = max(1, args.micro_tokens // args.seq)
    stream = _token_stream(args.tokens, config.vocab_size, rows * args.seq)
    wall, cpu, losses = [], [], []
    for step in range(args.warmup + args.steps):
        began, cpu_began = time.perf_counter(), time.process_time()
        total = torch.zeros((), device=device)
        for _ in range(args.accum):
            chunk = torch.from_numpy(next(stream)).to(device)
            loss = forward.loss(chunk[:-1].view(rows, -1), chunk[1:].view(rows, -1)) / args.accum
            loss.backward()
            total += loss.detach()
        optimizer.reduce(1)
        optimizer.clip(1.0)
        optimizer.step(1.0, schedule.muon_momentum(step))
        optimizer.zero_grad()
        losses.append(float(total))  # waits for the device
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    tokens = rows * args.seq * args.accum
    wall_s, cpu_s = (statistics.median(times[args.warmup :]) for times in (wall, cpu))
    flops = train_flops_per_token(config, args.seq)
    result = {
        "device": device_name(device, threads),
        "dtype": str(model.compute_dtype).removeprefix("torch."), "compiled": compiled,
        "parameters": count_params(config), "tokens_per_step": tokens, "first_step_s": wall[0],
        "step_ms": 1e3 * wall_s, "cpu_step_ms": 1e3 * cpu_s,
        "tok_per_s": tokens / wall_s, "tok_per_s_best": tokens / min(wall[args.warmup :]),
        "tok_per_cpu_s": tokens / cpu_s, "gflop_per_s": flops * tokens / wall_s / 1e9, "last_loss": losses[-1],
    }  # fmt: skip
    peak = peak_flops(device, model.compute_dtype)
    if peak is not None:
        result["mfu_percent"] = 100 * flops * tokens / wall_s / peak
    return result


def _token_stream(path: str, vocab: int, count: int) -> Any:
    """Endless chunks [count + 1] int64, one after the other, from a .npy file or a seeded generator."""
    rng = np.random.default_rng(0)
    ids = np.load(path, mmap_mode="r") if path else None
    start = 0
    while True:
        if ids is None:
            yield rng.integers(0, vocab, count + 1, dtype=np.int64)
            continue
        if start + count + 1 > len(ids):
            start = 0
        yield np.asarray(ids[start : start + count + 1]).astype(np.int64)
        start += count


if __name__ == "__main__":
    main()
