"""What an `--mc` training step costs per entry it processes, against the vanilla step per token.

    python -m megacontext.bench.mc_step --depth 4 --width 256 --seq 1024 --threads 1

An entry is a token of a raw row or an entry of a variant. Both steps train on the same rows, take turns, and include the
optimizer; variants have the length of the end of the curriculum. Times are CPU time of the process where the device is a
CPU, so that other programs do not count. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacontext import precision
from megacontext.bench.command import add_training, device_name, shape_parser, show
from megacontext.config import GPTConfig, MemoryConfig, TrainConfig
from megacontext.data.stream import Batch
from megacontext.model.gpt import GPT
from megacontext.train.lens_loss import RunningScales
from megacontext.train.memory_objective import MemoryObjective
from megacontext.train.objective import Objective, TokenObjective
from megacontext.train.optim import build_optimizer
from megacontext.train.step import Stepper
from megacontext.train.throughput import Stopwatch
from megacontext.train.views import ViewSettings


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    result = measure(args)
    show(result)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = shape_parser(__doc__)
    add_training(parser, seq=1024, steps=9, warmup=2)
    parser.add_argument("--rows", type=int, default=8, help="rows of an optimizer step, and of a vanilla micro-batch")
    parser.add_argument(
        "--micro_rows", type=int, default=0, help="rows of a micro-batch with a memory; 0 is all --rows"
    )
    parser.add_argument("--variants", type=int, default=4, help="variants per row, N")
    parser.add_argument("--progress", type=float, default=1.0, help="where in the curriculum, 0 to 1")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time steps of both kinds in turn. Raises UserError for shapes or settings that cannot be."""
    device = torch.device(args.device)
    threads = precision.set_threads(args.threads)
    precision.keep_freed_memory()
    config = GPTConfig.from_depth(args.depth, vocab_size=args.vocab, sequence_len=args.seq, width=args.width)
    memory = MemoryConfig(mc=1, mc_num_random_variants=args.variants)
    micro = args.micro_rows or args.rows
    vanilla, ours = (_stepper(args, config, chosen, device, count)
                     for chosen, count in ((None, args.rows), (memory, micro)))  # fmt: skip
    watches: dict[str, list[float]] = {"vanilla": [], "mc": []}
    phases: dict[str, list[float]] = {}
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, args.vocab, (args.rows, args.seq + 1)))
    for step in range(args.warmup + args.steps):
        for name, stepper in (("vanilla", vanilla), ("mc", ours)):
            batches = _batches(ids, args.rows // stepper.accum_steps)
            began = _clock(device)
            stepper.run(step, map(stepper.objective.plan, batches), 1.0, 0.9, stop=False)
            if step >= args.warmup:
                watches[name].append(_clock(device) - began)
                if name == "mc":
                    for phase, spent in stepper.watch.phases_ms().items():
                        phases.setdefault(phase, []).append(spent)
    views = ViewSettings.of(memory, args.seq)
    length = views.length(views.entries(args.progress))
    entries = args.rows * (args.seq + views.variants * length)
    vanilla_s, mc_s = (statistics.median(watches[name]) for name in ("vanilla", "mc"))
    per_token, per_entry = 1e6 * vanilla_s / (args.rows * args.seq), 1e6 * mc_s / entries
    return {
        "device": device_name(device, threads),
        "depth": args.depth, "width": config.n_embd, "seq": args.seq, "rows": args.rows, "rows_per_micro_batch": micro,
        "variants": views.variants, "variant_entries": length, "entries_per_step": entries,
        "vanilla_step_ms": 1e3 * vanilla_s, "mc_step_ms": 1e3 * mc_s,
        "vanilla_us_per_token": per_token, "mc_us_per_entry": per_entry, "ratio_per_entry": per_entry / per_token,
        **{f"phase_{name.replace('/', '_')}_ms": statistics.median(values) for name, values in phases.items()},
    }  # fmt: skip


def _stepper(
    args: argparse.Namespace, config: GPTConfig, memory: MemoryConfig | None, device: torch.device, rows: int
) -> Stepper:
    """A model of its own, with weights that are not zero anywhere, and what steps it by micro-batches of `rows`."""
    model = GPT(config)
    if memory is not None:
        model.attach_memory(memory)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    model.lm_head.weight.data.normal_(0.0, 0.02, generator=generator)
    model.compute_dtype = precision.choose_dtype(args.dtype, device)
    model.to(device)
    objective: Objective = TokenObjective(model)
    if memory is not None:
        objective = MemoryObjective(model, 0, args.rows, 1, lambda step: args.progress, RunningScales())
    return Stepper(
        objective, build_optimizer(model, TrainConfig()), device, 1, args.rows // rows, 1.0, Stopwatch(device)
    )


def _batches(ids: Tensor, rows: int) -> list[Batch]:
    positions = np.arange(len(ids))
    return [
        Batch(ids[at : at + rows], positions[at : at + rows], positions[at : at + rows])
        for at in range(0, len(ids), rows)
    ]


def _clock(device: torch.device) -> float:
    """Seconds: of this process's CPUs, or of the wall when a GPU does the work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
