"""Ray job entry points. Each file is a script, a module (`python -m jobs.x`) and a function that the pipeline calls."""

from __future__ import annotations

import os
import sys
from types import TracebackType

# An OpenMP thread that waits spins a little and then sleeps. By default it spins on, on the core of whatever else runs,
# Ray's own processes among them: two threads on two busy cores are then four times slower, while sleeping at once costs
# a quarter of the speed of an idle machine. Read when torch is loaded; means something to GNU's OpenMP only.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for a Ctrl-C that no job handles: it came while the job's imports were loaded. Python exits with 130."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything began", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _interrupted
