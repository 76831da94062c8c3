"""Pretrain the base model on token shards, from its newest checkpoint if the run has one.

ray job submit --working-dir . -- python jobs/base_train.py --run mine --depth 12
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs import training
from megacontext.stages import BASE

JOB = training.job(BASE)


def main() -> None:
    training.main(JOB, __doc__)


if __name__ == "__main__":
    main()
