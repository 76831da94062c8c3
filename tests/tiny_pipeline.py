"""The whole pipeline on a text and a model so small that it takes two seconds, in this process and without Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jobs import speedrun
from jobs.runtime import cli
from megacontext.data import parquet

WORDS = "the harbour def return count some other words that people use often when writing text about things they know"
MODEL = {"depth": 1, "width": 32, "vocab_size": 280, "max_seq_len": 64, "num_iterations": 3, "eval_tokens": 512}
FLAGS = {**MODEL, "device_batch_size": 2, "total_batch_size": 256, "sample_tokens": 2}


def write_text(folder: Path) -> None:
    """Three parquet shards of random words."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(3):
        texts = [" ".join(generator.choice(WORDS.split(), 60)) for _ in range(30)]
        (folder / f"shard_{number}.parquet").write_bytes(parquet.encode_texts(texts))


def where(base: Path, run: str = "mine") -> list[str]:
    """Flags that say where a run of the folder is and how it is launched; no settings of its model."""
    return [f"--base_dir={base}", f"--run={run}", "--launcher=local", "--wandb=off", "--device=cpu"]


def arguments(base: Path, *flags: str, run: str = "mine") -> cli.Args:
    """The settings of the run as the pipeline would have them with these flags more."""
    return cli.parse(speedrun.SECTIONS, None, [*where(base, run), *flags])


def run_pipeline(base: Path, *flags: str, run: str = "mine") -> None:
    """Make the run from text to report; an attempt to import Ray fails."""
    write_text(base / "text")
    first = [f"--{name}={value}" for name, value in FLAGS.items()]
    with without("ray"):
        speedrun.pipeline(arguments(base, "--tier=cpu", f"--data_dir={base / 'text'}", *first, *flags, run=run))


@contextmanager
def without(module: str) -> Iterator[None]:
    """Importing the module fails inside."""
    known = sys.modules.pop(module, None)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
        if known is not None:
            sys.modules[module] = known
