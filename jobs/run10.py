"""The pipeline on one GPU of your own or rented: python jobs/run10.py --gpu 5090|h100|cpu

All flags of jobs/speedrun.py apply; --gpu chooses the tier.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.runtime import cli
from jobs.speedrun import SECTIONS, pipeline


def main() -> None:
    args = cli.parse(SECTIONS, __doc__, ["--run", "run10", *sys.argv[1:]], aliases={"tier": ["--gpu"]})
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: pipeline(args))


if __name__ == "__main__":
    main()
