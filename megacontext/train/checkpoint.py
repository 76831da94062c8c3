"""Writing checkpoints, atomically, on local disk or any fsspec URI, while training goes on. See `megacontext/checkpoint.py`.

A stage of a run has one writer at a time, which holds a lock. What a crash left half written has a name of its own
(`.tmp-…`), and the next writer removes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch

from megacontext import locks, storage
from megacontext.checkpoint import (
    FORMAT,
    MANIFEST,
    META,
    TEMPORARY,
    Checkpoint,
    checkpoint_name,
    damage,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_meta,
)
from megacontext.errors import CheckpointError, StorageError, UserError
from megacontext.telemetry import otel

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointWriter",
    "checkpoint_name",
    "damage",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "read_meta",
]

WAIT_S = 20.0  # a process that was told to end may still hold the lock; Ray ends a worker within seconds
ASIDE = ".old-"  # a checkpoint that another of the same step is about to replace; as long as TEMPORARY
TOKENIZER_FILES = ("tokenizer.pkl", "token_bytes.pt")


def refuse_second_writer(directory: str, stage: str) -> None:
    """Raise UserError, naming the other process, when a stage of a run is being trained already. Changes nothing."""
    if storage.exists(_lock_file(directory, stage)):
        _lock(directory, stage).release()


def _lock_file(directory: str, stage: str) -> str:
    return storage.join(directory, f".writer-{stage}")


def _lock(directory: str, stage: str) -> locks.Lock:
    def refusal(holder: str) -> UserError:
        return UserError(
            f"the checkpoints of stage {stage} in {directory!r} are being written by {holder}, so this run is trained "
            "already. Stop that process or wait for its end, or start another --run."
        )

    return locks.exclusive(_lock_file(directory, stage), refusal, WAIT_S)


@dataclass
class CheckpointWriter:
    """Writes checkpoints of one stage in the background (rank 0 only) and prunes old ones.

    There is one writer of a stage of a run: UserError, naming the other process, when that does not end within
    `WAIT_S` seconds. What a checkpoint holds beside the state is read at once, so that no save fails for it:
    CheckpointError when a file of the tokenizer is missing, StorageError when the folder cannot be written.

    `save` copies the state and returns; a failed write (a full disk, say) is raised by the next `save` or `close`,
    after its half-written files are gone, and leaves every earlier checkpoint as it was.
    """

    directory: str
    stage: str
    tokenizer_dir: str | None
    keep: int
    saved_step: int | None = field(default=None, init=False)  # the newest step that this writer has published
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _intact: dict[str, bool] = field(default_factory=dict, init=False)  # what was written or read in full, by path

    def __post_init__(self) -> None:
        self._tokenizer = {} if self.tokenizer_dir is None else read_tokenizer(self.tokenizer_dir)
        storage.makedirs(self.directory)
        self._lock = _lock(self.directory, self.stage)
        try:
            self._clear()
        except BaseException:
            self._lock.release()
            raise

    def _clear(self) -> None:
        """Remove what an earlier process had half written or half deleted when it died."""
        begin = checkpoint_name(self.stage, 0)[:-6]
        for name in storage.list_dir(self.directory):
            path, final = storage.join(self.directory, name), storage.join(self.directory, name[len(TEMPORARY) :])
            if name.startswith(ASIDE + begin) and not storage.exists(final):
                os.rename(storage.local_path(path), storage.local_path(final))
            elif name.startswith((TEMPORARY + begin, ASIDE + begin)):
                if not storage.is_local(self.directory) and damage(final, thorough=False) is not None:
                    storage.remove_tree(final)
                storage.remove_tree(path)

    def save(
        self, step: int, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Snapshot the state and write it in the background. Raises what the previous write raised."""
        self._lock.check()
        self.wait()
        parts = {"model.pt": _snapshot(model), "optimizer.pt": _snapshot(optimizer)}
        full_meta = {
            "format": FORMAT,
            "stage": self.stage,
            "step": step,
            **json.loads(json.dumps(storage.finite(meta))),
        }
        span = otel.active().start("checkpoint_save", stage=self.stage, step=step)  # ends when all is on the disk
        self._thread = threading.Thread(
            target=self._write, args=(step, parts, full_meta, span), name="checkpoint-writer"
        )
        self._thread.start()

    def wait(self) -> None:
        """Block until the write under way has ended. Raises StorageError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the write under way, and let another process write. Raises StorageError if the write failed."""
        try:
            self.wait()
        finally:
            self._lock.release()

    def _write(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any], span: otel.Span) -> None:
        try:
            if storage.is_local(self.directory):
                self._write_local(step, parts, meta)
            else:
                self._write_remote(step, parts, meta)
        except StorageError as error:
            self._error = error
        except OSError as error:
            self._error = StorageError(
                f"checkpoint of step {step} could not be written to {self.directory!r}: {error}. Earlier checkpoints "
                f"are whole. {storage.remedy(error)}"
            )
        except BaseException as error:  # must reach the training thread, which raises it
            self._error = error
        else:
            self.saved_step = step
            self._intact[storage.join(self.directory, checkpoint_name(self.stage, step))] = True
            self._prune(checkpoint_name(self.stage, step), meta.get("best_checkpoint"))
        finally:
            if self._error is not None:
                span.fail(self._error)
            span.end()

    def _write_local(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        parent = storage.local_path(self.directory)
        temporary = parent / f"{TEMPORARY}{checkpoint_name(self.stage, step)}-{os.getpid()}"
        final = parent / checkpoint_name(self.stage, step)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            files = {}
            for name, data in self._contents(parts, meta):
                files[name] = _write_durably(temporary / name, data)
            _write_durably(temporary / MANIFEST, json.dumps({"files": files}, indent=1).encode())
            for folder in {(temporary / name).parent for name in (*files, MANIFEST)}:
                storage.sync_dir(folder)
            self._check(step, str(temporary))
            # What is no folder was never a checkpoint of ours: it keeps a name that is not cleared.
            aside = parent / (f"{ASIDE}{final.name}" if final.is_dir() else f"{final.name}.aside")
            if os.path.lexists(final):  # one of the same step: damaged, or this run was told to train it again
                os.rename(final, aside)
            os.rename(temporary, final)
            storage.sync_dir(parent)
            if aside.name.startswith(ASIDE):
                shutil.rmtree(aside, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_remote(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        target = storage.join(self.directory, checkpoint_name(self.stage, step))
        mark = self._mark(target)
        storage.write_bytes(mark, b"")
        storage.remove_tree(target)
        files = {}
        for name, data in self._contents(parts, meta):
            blob = data if isinstance(data, bytes) else _serialized(data)
            storage.write_bytes(storage.join(target, name), blob)
            files[name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        storage.write_json(storage.join(target, MANIFEST), {"files": files})
        self._check(step, target)
        storage.remove_tree(mark)

    def _mark(self, target: str) -> str:
        """The file beside a remote checkpoint that says it is being written or deleted: there are no renames."""
        return storage.join(self.directory, TEMPORARY + target.rsplit("/", 1)[-1])

    def _check(self, step: int, path: str) -> None:
        """Raise StorageError when what is about to be published is not what was written."""
        reason = damage(path, thorough=False)
        if reason is not None:
            raise StorageError(
                f"checkpoint of step {step} was not published in {self.directory!r}: {reason}. Something else changed "
                f"{path!r} while it was written. Earlier checkpoints are whole; run the same command again."
            )

    def _contents(self, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> Any:
        yield from parts.items()
        yield META, json.dumps(meta, indent=1).encode()
        for name, data in self._tokenizer.items():
            yield f"tokenizer/{name}", data

    def _prune(self, written: str, best: str | None) -> None:
        """Delete the intact checkpoints beyond the `keep` newest intact ones, but never `written` and `best`.

        A damaged one counts for nothing and stays: it is no copy of ours to delete, and something in it may be needed.
        """
        kept = 0
        try:
            for path in reversed(list_checkpoints(self.directory, self.stage) if self.keep > 0 else []):
                if kept < self.keep:
                    kept += self._is_intact(path)
                elif path.rsplit("/", 1)[-1] not in (written, best) and self._is_intact(path):
                    self._delete(path)
        except OSError as error:  # the new checkpoint is there, so training goes on
            print(f"an old checkpoint in {self.directory} could not be deleted: {error}", flush=True)

    def _is_intact(self, path: str) -> bool:
        """Whether a checkpoint counts. What this writer did not write is read in full once, all others by their sizes."""
        if path not in self._intact:
            self._intact[path] = damage(path) is None
        return self._intact[path] and damage(path, thorough=False) is None

    def _delete(self, path: str) -> None:
        mark = self._mark(path)
        if storage.is_local(self.directory):
            os.rename(storage.local_path(path), storage.local_path(mark))
        else:
            storage.write_bytes(mark, b"")
            storage.remove_tree(path)
        storage.remove_tree(mark)


def read_tokenizer(directory: str) -> dict[str, bytes]:
    """The files of a tokenizer that a checkpoint holds a copy of. Raises CheckpointError naming what is missing."""
    found, missing = {}, []
    for name in TOKENIZER_FILES:
        try:
            found[name] = storage.read_bytes(storage.join(directory, name))
        except FileNotFoundError:
            missing.append(name)
    if missing:
        raise CheckpointError(
            f"the tokenizer in {directory!r} has no {' and no '.join(missing)}, and every checkpoint holds a copy. "
            "Run jobs/tok_train.py with the same --run: it makes what is missing."
        )
    return found


def _snapshot(value: Any) -> Any:
    """A copy on the CPU that training cannot change any more."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _snapshot(item) for key, item in value.items()}
    return value


def _serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _HashingFile:
    """A file that knows the size and SHA-256 of what was written to it, so nothing is read back."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = error  # torch's zip writer raises another in its place
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_durably(path: Path, data: Any) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        hashing = _HashingFile(file)
        if isinstance(data, bytes):
            hashing.write(data)
        else:
            try:
                torch.save(data, cast(IO[bytes], hashing))
            except RuntimeError as error:
                raise hashing.error or OSError(f"writing {path.name} failed ({error})") from error
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()}
