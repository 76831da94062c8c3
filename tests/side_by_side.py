"""All tests in two processes at once: those that start a Ray cluster in one, all others in the other; then the coverage.

More processes would gain nothing: these two keep two cores busy.

    python tests/side_by_side.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run both and print the log of the Ray tests after that of the others; 0 only when both ran tests and all passed."""
    pytest = [sys.executable, "-m", "pytest", "-p", "tests.covered", "-p", "no:cacheprovider", "--durations=15", "-m"]
    began = time.monotonic()
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MC_COVERAGE_FILE": str(Path(folder, "lines"))}
        with_ray = subprocess.Popen([*pytest, "ray"], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            one_core = environment | {"OMP_NUM_THREADS": "1"}  # the cluster has the others
            others = subprocess.run([*pytest, "not ray"], cwd=ROOT, env=one_core, check=False).returncode
            minutes = (time.monotonic() - began) / 60
            ray = with_ray.wait()
        except BaseException:
            with_ray.terminate()
            raise
        log.seek(0)
        print("== tests that start a Ray cluster", flush=True)
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()
        covered = coverage(folder)
    print(
        f"== pytest ended with {others} without Ray ({minutes:.1f} min) and {ray} with it "
        f"({(time.monotonic() - began) / 60:.1f} min in all); 0 is good\n== {covered}",
        flush=True,
    )
    return others or ray


def coverage(folder: str) -> str:
    """The share of the lines of the sources that ran, in words."""
    tool, data = [sys.executable, "-m", "coverage"], f"--data-file={Path(folder, 'lines')}"
    subprocess.run([*tool, "combine", "-q", data], cwd=ROOT, check=False)
    said = subprocess.run(
        [*tool, "report", "--format=total", data], cwd=ROOT, capture_output=True, text=True, check=False
    )
    percent = said.stdout.strip() or f"unknown: {said.stderr.strip()}"
    return f"coverage: {percent} % of the lines of megacontext/ and jobs/, without the processes that tests start"


if __name__ == "__main__":
    raise SystemExit(main())
