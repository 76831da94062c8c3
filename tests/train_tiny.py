"""Train a tiny task in its own process: python tests/train_tiny.py FOLDER RUN [key=value …]; under torchrun with several.

With mc=1 it has a memory. With kills=K seed=S it trains in K forked children, one after another, and each meets
SIGKILL: half of them at a random moment, half after a random number of bytes of a checkpoint. Then it trains to the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import make_task

from megacontext.telemetry.tracker import Tracker
from megacontext.train import checkpoint, loop, setup
from megacontext.train.task import TrainTask
from megacontext.train.worker import LocalWorker


def run(folder: Path, run_name: str, mc: int = 0, **overrides: int) -> None:
    """Train to the end, or to the stop file."""
    torch.set_num_threads(1)
    checkpoint.WAIT_S = float(os.environ.get("MC_TEST_WAIT_S", checkpoint.WAIT_S))
    task = make(mc)(folder, run_name, **overrides)
    worker = LocalWorker.start(task.run_dir, "cpu")
    tracker = Tracker(run_dir=task.run_dir, run_name=run_name, config={}, wandb_mode="off", enabled=worker.rank == 0)
    result = loop.train(task, worker, tracker)
    print(f"finished={result.finished} step={result.step}", flush=True)


def make(mc: int) -> Callable[..., TrainTask]:
    """What makes the task of a run."""
    if not mc:
        return make_task
    from test_mc_training import make_mc_task

    return make_mc_task


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


def run_with_kills(folder: Path, run_name: str, kills: int, seed: int, mc: int = 0, **overrides: int) -> None:
    """Start, kill, start again, …, and finish."""
    dice = random.Random(seed)
    # An optimizer imports torch's compiler, a second of a core: here once, not in every child.
    setup.fresh(make(mc)(folder, run_name, **overrides), torch.device("cpu"), torch.float32)
    for number in range(kills):
        in_write = number % 2 == 1
        steps, delay_s, after_bytes = dice.randrange(4), dice.uniform(0, 0.1), dice.randrange(1, 1_500_000)
        beats, beat = os.pipe()
        child = os.fork()
        if child == 0:
            if in_write:
                die_in_write(after_bytes)
            tell_steps(beat)
            run(folder, run_name, mc, **overrides)
            os._exit(0)
        os.close(beat)
        if not in_write:
            while steps and os.read(beats, 1):
                steps -= 1
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(beats)
        how = ("killed in a write" if in_write else "killed") if os.WIFSIGNALED(status) else "ended"
        print(f"child {number}: {how}", flush=True)
    run(folder, run_name, mc, **overrides)


def tell_steps(beat: int) -> None:
    """Make this process write a byte for each step that it has done."""
    advance = loop._advance

    def telling(*given: Any) -> None:
        advance(*given)
        os.write(beat, b".")

    loop._advance = telling


if __name__ == "__main__":
    given = {key: int(value) for key, value in (item.split("=") for item in sys.argv[3:])}
    (run_with_kills if "kills" in given else run)(Path(sys.argv[1]), sys.argv[2], **given)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
