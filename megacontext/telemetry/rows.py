"""A log of the shard rows each step trained on: the proof that no row was skipped or taken twice."""

from __future__ import annotations

import json
from types import TracebackType

import numpy as np

from megacontext import storage
from megacontext.errors import UserError
from megacontext.telemetry.metrics_file import LocalSink, Record, drop_records


class RowLog:
    """Appends `{"step": s, "rows": [...]}` lines to `rows/<stage>_rank<r>.jsonl` of a run on local storage.

    A resumed run drops the lines of steps its checkpoint does not hold. Raises UserError on remote storage and for a
    damaged line of a step that its checkpoint holds, StorageError when the file cannot be written.
    """

    def __init__(self, run_dir: str, stage: str, rank: int, first_step: int, enabled: bool) -> None:
        self._file: LocalSink | None = None
        if not enabled:
            return
        if not storage.is_local(run_dir):
            raise UserError(f"--log_rows appends to a local file, but the run lives at {run_dir!r}; use --log_rows 0.")

        def again(record: Record) -> bool:
            return isinstance(record.get("step"), int) and record["step"] >= first_step

        path = storage.join(run_dir, "rows", f"{stage}_rank{rank}.jsonl")
        drop_records(path, again)
        self._file = LocalSink(path)

    def write(self, step: int, rows: np.ndarray) -> None:
        """Record the rows of a step, in the order they were read. Raises StorageError, on a full disk for example."""
        if self._file is not None:
            self._file.append(json.dumps({"step": step, "rows": rows.tolist()}))

    def sync(self) -> None:
        """Make what was recorded survive a power cut."""
        if self._file is not None:
            self._file.sync()

    def __enter__(self) -> RowLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
