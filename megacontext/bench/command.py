"""What the benchmarks of a model have in common on the command line: flags of its shape and its place, the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch


def shape_parser(about: str | None) -> argparse.ArgumentParser:
    """Flags of the model's shape, of the device and of CPU threads."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--depth", type=int, default=4, help="layers")
    made.add_argument("--width", type=int, default=256, help="model width; 0 is 64·depth")
    made.add_argument("--vocab", type=int, default=8192, help="tokens in the vocabulary")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=0, help="CPU threads; 0 is all cores")
    return made


def add_training(made: argparse.ArgumentParser, seq: int, steps: int, warmup: int) -> None:
    """Flags of benchmarks that train, with their defaults."""
    made.add_argument("--seq", type=int, default=seq, help="tokens per row")
    made.add_argument("--steps", type=int, default=steps, help="timed optimizer steps")
    made.add_argument("--warmup", type=int, default=warmup, help="steps before timing starts")
    made.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="compute dtype")


def show(result: Mapping[str, Any]) -> None:
    """A line per figure for people, then all of it as JSON in one line."""
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:>{width}}  {value:,.3f}" if isinstance(value, float) else f"{key:>{width}}  {value}")
    print(json.dumps(result))


def device_name(device: torch.device, threads: int) -> str:
    """The hardware as it stands beside a result."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} threads"
