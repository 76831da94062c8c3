"""All tests in two processes at once: those that start a Ray cluster in one, all others in the other.

More processes would gain nothing: these two keep two cores busy.

    python tests/side_by_side.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run both and print the log of the Ray tests after that of the others; 0 only when both ran tests and all passed."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=15", "-m"]
    with tempfile.TemporaryFile() as log:
        with_ray = subprocess.Popen([*pytest, "ray"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            one_core = os.environ | {"OMP_NUM_THREADS": "1"}  # the cluster has the others
            others = subprocess.run([*pytest, "not ray"], cwd=ROOT, env=one_core, check=False).returncode
            ray = with_ray.wait()
        except BaseException:
            with_ray.terminate()
            raise
        log.seek(0)
        print("== tests that start a Ray cluster", flush=True)
        sys.stdout.buffer.write(log.read())
        sys.stdout.flush()
    print(f"== pytest ended with {others} without Ray and {ray} with it; 0 is good", flush=True)
    return others or ray


if __name__ == "__main__":
    raise SystemExit(main())
