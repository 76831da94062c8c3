"""Complete, atomic checkpoints on local disk or any fsspec URI, written while training goes on.

A checkpoint is a folder `megacontext_<stage>_<step>`: model.pt, optimizer.pt, meta.json, tokenizer/ and, last,
manifest.json with the size and SHA-256 of the others. Only a folder whose manifest holds is a checkpoint; anything
else is what a crash left behind, is passed over with a line that says so, and is cleaned up by the next writer.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch

from megacontext import storage
from megacontext.errors import CheckpointError, StorageError

FORMAT = 1
MANIFEST = "manifest.json"
NAME = re.compile(r"^megacontext_(?P<stage>[a-z0-9-]+)_(?P<step>\d{6,})$")
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. `optimizer` is None when it was not asked for."""

    path: str
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None
    meta: dict[str, Any]


def checkpoint_name(stage: str, step: int) -> str:
    """Folder name of a checkpoint."""
    return f"megacontext_{stage}_{step:06d}"


def list_checkpoints(directory: str, stage: str | None = None) -> list[str]:
    """Paths of the checkpoints of a stage (or of any), oldest step first; damaged ones are included."""
    found = [(int(match["step"]), name) for name in storage.list_dir(directory) if (match := NAME.match(name))]
    return [
        storage.join(directory, name)
        for _, name in sorted(found)
        if stage is None or name.startswith(f"megacontext_{stage}_")
    ]


def damage(path: str) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file has its recorded size and SHA-256."""
    try:
        manifest = storage.read_json(storage.join(path, MANIFEST))
        files = dict(manifest["files"])
    except FileNotFoundError:
        return "it has no manifest, so its writing was cut short"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return "its manifest cannot be read"
    for name, recorded in files.items():
        file_path = storage.join(path, name)
        try:
            if storage.file_size(file_path) != recorded["bytes"]:
                return f"{name} has {storage.file_size(file_path)} bytes instead of {recorded['bytes']}"
            if storage.sha256_file(file_path) != recorded["sha256"]:
                return f"the content of {name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def latest_checkpoint(directory: str, stage: str, warn: Any = print) -> str | None:
    """The newest intact checkpoint of a stage, or None. Each damaged one on the way is named through `warn`."""
    for path in reversed(list_checkpoints(directory, stage)):
        reason = damage(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is damaged ({reason}); looking for the one before it.")
    return None


def read_meta(path: str) -> dict[str, Any]:
    """The meta.json of a checkpoint."""
    meta: dict[str, Any] = storage.read_json(storage.join(path, "meta.json"))
    return meta


def load_checkpoint(path: str, *, with_optimizer: bool, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint whatever the world size it was written at.

    Raises CheckpointError when the folder is absent, damaged or of a newer format.
    """
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(f"checkpoint {path!r} cannot be loaded: {reason}. Use another checkpoint of the run.")
    meta = read_meta(path)
    if meta["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path!r} has format {meta['format']}, this version reads {FORMAT}.")
    optimizer = _load_tensors(storage.join(path, "optimizer.pt"), device) if with_optimizer else None
    return Checkpoint(path, _load_tensors(storage.join(path, "model.pt"), device), optimizer, meta)


def _load_tensors(path: str, device: torch.device | str) -> dict[str, Any]:
    if storage.is_local(path):
        loaded: dict[str, Any] = torch.load(storage.local_path(path), map_location=device, weights_only=True)
    else:
        loaded = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=device, weights_only=True)
    return loaded


@dataclass
class CheckpointWriter:
    """Writes checkpoints of one stage in the background (rank 0 only) and prunes old ones.

    `save` copies the state and returns; a failed write (a full disk, say) is raised by the next `save` or `close`,
    after its half-written files are gone, and leaves every earlier checkpoint as it was.
    """

    directory: str
    stage: str
    tokenizer_dir: str | None
    keep: int
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in storage.list_dir(self.directory):
            if name.startswith(TEMPORARY + checkpoint_name(self.stage, 0)[:-6]):
                storage.remove_tree(storage.join(self.directory, name))  # an earlier process died while writing it

    def save(
        self, step: int, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Snapshot the state and write it in the background. Raises what the previous write raised."""
        self.wait()
        parts = {"model.pt": _snapshot(model), "optimizer.pt": _snapshot(optimizer)}
        full_meta = {"format": FORMAT, "stage": self.stage, "step": step, **json.loads(json.dumps(meta))}
        self._thread = threading.Thread(target=self._write, args=(step, parts, full_meta), name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Block until the write under way has ended. Raises StorageError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    close = wait

    def _write(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        try:
            if storage.is_local(self.directory):
                self._write_local(step, parts, meta)
            else:
                self._write_remote(step, parts, meta)
            self._prune(best=meta.get("best_checkpoint"))
        except StorageError as error:
            self._error = error
        except OSError as error:
            self._error = StorageError(
                f"checkpoint of step {step} could not be written to {self.directory!r}: {error}. Earlier checkpoints "
                "are whole. Free space (or choose another --storage) and run the same command to continue."
            )
        except BaseException as error:  # must reach the training thread, which raises it
            self._error = error

    def _write_local(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        parent = storage.local_path(self.directory)
        parent.mkdir(parents=True, exist_ok=True)
        temporary = parent / f"{TEMPORARY}{checkpoint_name(self.stage, step)}-{os.getpid()}"
        final = parent / checkpoint_name(self.stage, step)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            files = {}
            for name, data in self._contents(parts, meta):
                files[name] = _write_durably(temporary / name, data)
            _write_durably(temporary / MANIFEST, json.dumps({"files": files}, indent=1).encode())
            storage.sync_dir(temporary)
            if final.exists():  # a damaged one of the same step
                shutil.rmtree(final)
            os.rename(temporary, final)
            storage.sync_dir(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_remote(self, step: int, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        target = storage.join(self.directory, checkpoint_name(self.stage, step))
        storage.remove_tree(target)
        files = {}
        for name, data in self._contents(parts, meta):
            blob = data if isinstance(data, bytes) else _serialized(data)
            storage.write_bytes(storage.join(target, name), blob)
            files[name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        storage.write_json(storage.join(target, MANIFEST), {"files": files})

    def _contents(self, parts: Mapping[str, Any], meta: Mapping[str, Any]) -> Any:
        yield from parts.items()
        yield "meta.json", json.dumps(meta, indent=1).encode()
        if self.tokenizer_dir is not None:
            for name in ("tokenizer.pkl", "token_bytes.pt"):
                yield f"tokenizer/{name}", storage.read_bytes(storage.join(self.tokenizer_dir, name))

    def _prune(self, best: str | None) -> None:
        paths = list_checkpoints(self.directory, self.stage)
        for path in paths[: -self.keep] if self.keep > 0 else []:
            if best is None or not path.endswith(best):
                storage.remove_tree(path)


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

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return int(self.file.write(data))

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
            except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk
                raise OSError(f"writing {path.name} failed, most likely because the disk is full ({error})") from error
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.size, "sha256": hashing.digest.hexdigest()}
