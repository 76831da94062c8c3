"""Train a tiny task as a job does: python tests/stop_tiny.py FOLDER RUN LAUNCHER [key=value …].

With RAY_ADDRESS it joins that cluster. Output and exit status are those of `jobs/base_train.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import make_task

from jobs.runtime import cli
from jobs.runtime.launch import run_training
from jobs.training import result_of
from megacontext.stages import BASE


def main(folder: Path, run: str, launcher: str, *overrides: str) -> None:
    """Train to the end or to a stop signal."""
    task = make_task(folder, run, **{name: int(value) for name, value in (item.split("=") for item in overrides)})
    args = cli.resolve(
        {"tier": "cpu", "run": run, "base_dir": str(folder), "wandb": "off", "launcher": launcher, "cpus_per_worker": 1}
    )

    def work() -> None:
        print("ready", flush=True)
        result_of(BASE, run_training(task, args))

    cli.finish(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
