"""Write the report card of a run and print it: report.md, report.json and loss plots in `<run folder>/report/`.

python jobs/report.py --run mine
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.runtime import cli
from megacontext.config import RunConfig
from megacontext.telemetry import report

SECTIONS = [RunConfig]


def run(args: cli.Args) -> report.Report:
    """Write and print the report of the run that the flags name. Raises UserError when the run left no results."""
    written = report.write_report(cli.paths(args).run_dir)
    print(report.card(written), flush=True)
    return written


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.finish(lambda: run(args))


if __name__ == "__main__":
    main()
