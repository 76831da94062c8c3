"""`metrics.jsonl`: one JSON object a line, in a local folder or on object storage, and one clean curve.

A crash leaves whole lines and at most one cut tail line. Readers ignore the tail; a resumed run removes it, and with
it the records of its stage from the step it continues at.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from typing import Any, Protocol

from megacontext import storage
from megacontext.errors import StorageError, UserError

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """All records of a run in file order; a truncated last line is ignored, a missing file has no records.

    Raises UserError when a line before the last is damaged.
    """
    return [json.loads(line) for line in _whole_lines(storage.join(run_dir, METRICS_FILE))]


def open_sink(run_dir: str, stage: str, start_step: int, upload_every_s: float = 60.0) -> Sink:
    """Drop what a resumed stage will write again, then open the file for more lines. Raises StorageError."""
    path = storage.join(run_dir, METRICS_FILE)
    kept = drop_from(path, stage, start_step)
    return LocalSink(path) if storage.is_local(path) else RemoteSink(path, kept, upload_every_s)


class Sink(Protocol):
    """Takes lines without their newline."""

    def append(self, line: str) -> None: ...
    def close(self) -> None: ...


class LocalSink:
    """Appends whole lines: one write call each, cut back if the disk took only a part."""

    def __init__(self, path: str) -> None:
        self._path = storage.local_path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise StorageError(f"cannot write {str(self._path)!r}: {error}.") from error

    def append(self, line: str) -> None:
        data = line.encode() + b"\n"
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
        except OSError as error:
            raise StorageError(
                f"cannot write {str(self._path)!r}: {error}. Free space, then run the same command again."
            ) from error
        if written != len(data):
            os.ftruncate(self._file, before)
            raise StorageError(f"no room left for {str(self._path)!r}. Free space, then run the same command again.")

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


class RemoteSink:
    """Keeps the lines and uploads the whole file from a thread: object stores cannot append."""

    def __init__(self, path: str, kept: list[str], every_s: float) -> None:
        self._path, self._lines, self._every_s = path, list(kept), every_s
        self._uploaded = len(kept)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-upload", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self._upload()
            except StorageError as error:
                print(f"metrics not uploaded, will try again: {error}", flush=True)

    def _upload(self) -> None:
        with self._lock:
            count, data = len(self._lines), "".join(f"{line}\n" for line in self._lines).encode()
        if count != self._uploaded:
            storage.write_bytes(self._path, data)
            self._uploaded = count

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._upload()


def _whole_lines(path: str) -> list[str]:
    """Lines of the file that parse; only the last may be damaged. Raises UserError otherwise."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return []
    lines = data.decode(errors="replace").split("\n")
    tail = lines.pop()  # empty when the file ends with a newline, else a line that a crash cut
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of {path!r} is damaged: {error}. Repair or remove the file.") from error
    if tail:
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(tail)
            lines.append(tail)  # whole but for its newline
    return lines


def drop_from(path: str, stage: str, step: int) -> list[str]:
    """Rewrite the file without the stage's records from `step` on and without a cut tail; returns the lines kept."""
    lines = _whole_lines(path)
    kept = []
    for line in lines:
        record = json.loads(line)
        if record.get("stage") != stage or record.get("step", 0) < step:
            kept.append(line)
    data = "".join(f"{line}\n" for line in kept).encode()
    if (lines and data != storage.read_bytes(path)) or (not lines and storage.exists(path)):
        storage.write_bytes(path, data)
    return kept


def json_number(value: Any) -> float | int | None:
    """A metric as a JSON number: ints stay ints, tensors and numpy scalars become floats, not finite becomes None."""
    if isinstance(value, bool | int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
