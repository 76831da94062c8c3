"""A log of the shard rows each step trained on: the proof that no row was skipped or taken twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from megacontext import storage
from megacontext.errors import UserError


class RowLog:
    """Appends `{"step": s, "rows": [...]}` lines to `rows/<stage>_rank<r>.jsonl` of a run on local storage.

    A resumed run drops the lines of steps its checkpoint does not hold. Raises UserError on remote storage.
    """

    def __init__(self, run_dir: str, stage: str, rank: int, first_step: int, enabled: bool) -> None:
        self._file: IO[str] | None = None
        if not enabled:
            return
        if not storage.is_local(run_dir):
            raise UserError(f"--log_rows appends to a local file, but the run lives at {run_dir!r}; use --log_rows 0.")
        path = storage.local_path(storage.join(run_dir, "rows", f"{stage}_rank{rank}.jsonl"))
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < first_step]
        storage.write_bytes(str(path), "".join(kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by __exit__

    def write(self, step: int, rows: np.ndarray) -> None:
        """Record the rows of a step, in the order they were read."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "rows": rows.tolist()}) + "\n")
            self._file.flush()

    def __enter__(self) -> RowLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
