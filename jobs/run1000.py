"""The pipeline of the large tier, depth 32 on eight H100s: python jobs/run1000.py

All flags of jobs/speedrun.py apply.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.runtime import cli
from jobs.speedrun import SECTIONS, pipeline


def main() -> None:
    args = cli.parse(SECTIONS, __doc__, ["--tier", "run1000", "--run", "run1000", *sys.argv[1:]])
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: pipeline(args))


if __name__ == "__main__":
    main()
