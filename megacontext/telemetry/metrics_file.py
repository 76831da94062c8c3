"""`metrics.jsonl` and files like it: one JSON object a line, in a local folder or on object storage, and one clean curve.

A crash leaves whole lines and at most one cut tail line. Readers ignore the tail; a resumed run removes it, and with
it the records of its stage from the step it continues at.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from megacontext import storage
from megacontext.errors import StorageError, UserError

METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """All records of a run in file order; a truncated last line is ignored, a missing file has no records.

    Raises UserError when a line before the last is damaged.
    """
    return read_records(storage.join(run_dir, METRICS_FILE))


def open_sink(run_dir: str, stage: str, start_step: int, upload_every_s: float = 60.0) -> Sink:
    """Drop what a resumed stage will write again, then open the file for more lines.

    Raises UserError when a line that is kept is damaged, StorageError when the file cannot be written.
    """
    path = storage.join(run_dir, METRICS_FILE)
    kept = drop_from(path, stage, start_step)
    return LocalSink(path) if storage.is_local(path) else RemoteSink(path, kept, upload_every_s)


class Sink(Protocol):
    """Takes lines without their newline."""

    def append(self, line: str) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class LocalSink:
    """Appends whole lines to a local file: one write call each, cut back if the disk took only a part.

    Raises StorageError when the file cannot be opened or written, a full disk among the causes.
    """

    def __init__(self, path: str) -> None:
        self._path = storage.local_path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed(error) from error

    def append(self, line: str) -> None:
        """Write a line given without its newline."""
        data = line.encode() + b"\n"
        try:
            before = os.fstat(self._file).st_size
            written = os.write(self._file, data)
            if written != len(data):
                os.ftruncate(self._file, before)
                raise StorageError(
                    f"no room left for {str(self._path)!r}. Free space, then run the same command again."
                )
        except StorageError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            self.sync()
        finally:
            os.close(self._file)

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write {str(self._path)!r}: {error}. {storage.remedy(error)}")


class RemoteSink:
    """Keeps the lines and uploads the whole file from a thread: object stores cannot append."""

    def __init__(self, path: str, kept: list[str], every_s: float) -> None:
        self._path, self._lines, self._every_s = path, list(kept), every_s
        self._uploaded = len(kept)
        self._lock, self._uploading, self._closing = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-upload", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)

    def sync(self) -> None:
        """Upload now."""
        self._try_upload()

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            self._try_upload()

    def _try_upload(self) -> None:
        try:
            self._upload()
        except StorageError as error:
            print(f"metrics not uploaded, will try again: {error}", flush=True)

    def _upload(self) -> None:
        with self._uploading:  # one after the other, or the older file could be the last
            with self._lock:
                count, data = len(self._lines), "".join(f"{line}\n" for line in self._lines).encode()
            if count != self._uploaded:
                storage.write_bytes(self._path, data)
                self._uploaded = count

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._upload()


def drop_from(path: str, stage: str, step: int) -> list[str]:
    """Rewrite the file without the stage's records from `step` on and without a cut tail; returns the lines kept."""

    def again(record: Record) -> bool:
        at = record.get("step", 0)
        return record.get("stage") == stage and isinstance(at, int | float) and at >= step

    return drop_records(path, again)


def read_records(path: str) -> list[Record]:
    """All records in file order; a cut last line is ignored, a missing file has no records.

    Raises UserError naming a damaged line before the last, StorageError when the file cannot be read.
    """
    parsed = [(number, _record(line)) for number, line in enumerate(_lines(path), 1)]
    return [_known(path, number, record) for number, record in parsed]


def drop_records(path: str, again: Callable[[Record], bool]) -> list[str]:
    """Rewrite the file without the records that are written `again` and without a cut last line; returns what is kept.

    A damaged line between records that are written again is one of them. Raises UserError naming any other damaged
    line: what it held would be lost.
    """
    lines = _lines(path)
    records = [_record(line) for line in lines]
    fates = [None if record is None else again(record) for record in records]  # None: damaged
    for i, fate in enumerate(fates):
        if fate is None:
            before = next((fates[j] for j in range(i - 1, -1, -1) if fates[j] is not None), None)
            after = next((fates[j] for j in range(i + 1, len(fates)) if fates[j] is not None), None)
            if False in (before, after) or (before, after) == (None, None):
                _known(path, i + 1, None)
    kept = [line for line, fate in zip(lines, fates, strict=True) if fate is False]
    data = b"".join(line + b"\n" for line in kept)
    if storage.exists(path) and data != storage.read_bytes(path):
        storage.write_bytes(path, data)
    return [line.decode() for line in kept]


def _lines(path: str) -> list[bytes]:
    """Lines without their newlines. What follows the last newline is one of them only when it is whole."""
    try:
        *lines, tail = storage.read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    return [*lines, tail] if tail and _record(tail) is not None else lines


def _record(line: bytes) -> Record | None:
    """The object of a line, None when the line is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _known(path: str, number: int, record: Record | None) -> Record:
    if record is None:
        raise UserError(
            f"line {number} of {path!r} is damaged: it is no JSON object. Restore the file from a copy, or delete the "
            "line; its record is lost then, and the others are kept."
        )
    return record


def json_number(value: Any) -> float | int | None:
    """A metric as a JSON number: ints stay ints, tensors and numpy scalars become floats, not finite becomes None."""
    if isinstance(value, bool | int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None
