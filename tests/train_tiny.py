"""Train a tiny task in its own process: python tests/train_tiny.py FOLDER RUN [key=value …]; under torchrun with several.

With kills=K seed=S it trains in K forked children, one after another, and each meets SIGKILL at a random moment: half
of them by the clock, half after a random number of bytes of a checkpoint. Then it trains to the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny import make_task

from megacontext.telemetry.tracker import Tracker
from megacontext.train import checkpoint, loop
from megacontext.train.worker import LocalWorker


def run(folder: Path, run_name: str, **overrides: int) -> None:
    """Train to the end, or to the stop file."""
    torch.set_num_threads(1)
    task = make_task(folder, run_name, **overrides)
    worker = LocalWorker.start(task.run_dir, "cpu")
    tracker = Tracker(run_dir=task.run_dir, run_name=run_name, config={}, wandb_mode="off", enabled=worker.rank == 0)
    result = loop.train(task, worker, tracker)
    print(f"finished={result.finished} step={result.step}", flush=True)


def die_in_write(after_bytes: int) -> None:
    """Make this process kill itself when its checkpoints have grown by so many bytes."""
    written, write = 0, checkpoint._HashingFile.write

    def counting_write(self: checkpoint._HashingFile, data: object) -> int:
        nonlocal written
        written += memoryview(data).nbytes  # type: ignore[arg-type]
        if written >= after_bytes:
            self.file.write(bytes(memoryview(data))[: max(1, memoryview(data).nbytes // 2)])  # type: ignore[arg-type]
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    checkpoint._HashingFile.write = counting_write  # type: ignore[method-assign]


def run_with_kills(folder: Path, run_name: str, kills: int, seed: int, **overrides: int) -> None:
    """Start, kill, start again, …, and finish."""
    dice = random.Random(seed)
    make_task(folder, run_name)
    for number in range(kills):
        by_clock = number % 2 == 0
        delay_s, after_bytes = dice.uniform(0.02, 0.6), dice.randrange(1, 1_500_000)
        child = os.fork()
        if child == 0:
            if not by_clock:
                die_in_write(after_bytes)
            run(folder, run_name, **overrides)
            os._exit(0)
        if by_clock:
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(f"child {number}: {'killed' if os.WIFSIGNALED(status) else 'ended'}", flush=True)
    run(folder, run_name, **overrides)


if __name__ == "__main__":
    given = {key: int(value) for key, value in (item.split("=") for item in sys.argv[3:])}
    (run_with_kills if "kills" in given else run)(Path(sys.argv[1]), sys.argv[2], **given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
