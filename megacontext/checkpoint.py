"""Reading checkpoints: which there are, which are intact, and what they hold. `train/checkpoint.py` writes them.

A checkpoint is a folder `megacontext_<stage>_<step>`: model.pt, optimizer.pt, meta.json, tokenizer/ and, last,
manifest.json with the size and SHA-256 of the others. Only a folder whose manifest holds is a checkpoint. Any other
folder of such a name is damaged: it is never loaded, never counted, and never deleted by this program.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megacontext import storage
from megacontext.errors import CheckpointError, StorageError

FORMAT = 1
MANIFEST = "manifest.json"
META, MODEL, OPTIMIZER = "meta.json", "model.pt", "optimizer.pt"
MANDATORY = (MODEL, OPTIMIZER, META)  # what the manifest of every checkpoint lists
NAME = re.compile(r"^megacontext_(?P<stage>[a-z0-9-]+)_(?P<step>\d{6,})$")
TEMPORARY = ".tmp-"  # a folder being written; on storage without renames, a mark beside it

Warn = Callable[[str], object]


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


class _Damage(Exception):
    """What is wrong with a checkpoint folder, as the end of a sentence that begins with the folder's name."""


def damage(path: str, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, or None when nothing is.

    The manifest lists every mandatory file, each file has its recorded size, and meta.json says what the folder's name
    says. With `thorough` each file also has its SHA-256, and the tensors can be read. Raises StorageError when the
    storage cannot be asked: that says nothing about the checkpoint.
    """
    try:
        files = _manifest(path)
        for name, recorded in files.items():
            size = _asked(path, name, storage.file_size)
            if size != recorded["bytes"]:
                raise _Damage(f"{name} has {size} bytes instead of {recorded['bytes']}")
        meta = _asked(path, META, storage.read_bytes)
        _check_bytes(META, meta, files[META])
        _meta(path, meta)
        if thorough:
            for name, recorded in files.items():
                _check_content(path, name, recorded)
    except _Damage as found:
        return str(found)
    return None


def latest_checkpoint(directory: str, stage: str, warn: Warn = print) -> str | None:
    """The newest intact checkpoint of a stage, or None. Each damaged one on the way is named through `warn`."""
    for path in reversed(list_checkpoints(directory, stage)):
        reason = damage(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is damaged ({reason}); looking for the one before it.")
    return None


def read_meta(path: str, *needed: str) -> dict[str, Any]:
    """The meta.json of a checkpoint. Raises CheckpointError when it is absent, damaged, or lacks a `needed` key."""
    try:
        meta = _meta(path, _asked(path, META, storage.read_bytes))
        for key in needed:
            if key not in meta:
                raise _Damage(f"its {META} has no {key!r}")
    except _Damage as found:
        raise CheckpointError(f"checkpoint {path!r} is damaged: {found}. Use another checkpoint of the run.") from None
    return meta


def load_checkpoint(path: str, *, with_optimizer: bool, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint whatever the world size it was written at.

    Raises CheckpointError when the folder is absent, damaged or of another format.
    """
    reason = damage(path)
    if reason is not None:
        raise CheckpointError(f"checkpoint {path!r} cannot be loaded: {reason}. Use another checkpoint of the run.")
    meta = read_meta(path)
    if meta["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path!r} has format {meta['format']}, this version reads {FORMAT}.")
    try:
        model = _load_tensors(storage.join(path, MODEL), device)
        optimizer = _load_tensors(storage.join(path, OPTIMIZER), device) if with_optimizer else None
    except (_Damage, FileNotFoundError) as error:
        raise CheckpointError(f"checkpoint {path!r} changed while it was read: {error}.") from error
    return Checkpoint(path, model, optimizer, meta)


def _manifest(path: str) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists, each with its bytes and sha256."""
    try:
        raw = _asked(path, MANIFEST, storage.read_bytes)
    except _Damage:
        raise _Damage(f"it has no {MANIFEST}, so its writing was cut short or the file was lost") from None
    manifest = _parsed(MANIFEST, raw)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise _Damage(f"its {MANIFEST} has no list of files")
    for name, recorded in files.items():
        if not name or name.startswith("/") or "\\" in name or {"", ".", ".."} & set(name.split("/")):
            raise _Damage(f"its {MANIFEST} lists {name!r}, which is not a file of the folder")
        if (
            not isinstance(recorded, dict)
            or not _is_count(recorded.get("bytes"))
            or not _is_sha(recorded.get("sha256"))
        ):
            raise _Damage(f"its {MANIFEST} has no size and SHA-256 of {name}")
    missing = [name for name in MANDATORY if name not in files]
    if missing:
        raise _Damage(f"its {MANIFEST} does not list {', '.join(missing)}")
    return files


def _meta(path: str, raw: bytes) -> dict[str, Any]:
    """meta.json with its format, and with the stage and step that the folder's name says."""
    meta = _parsed(META, raw)
    for key, right in (("format", _is_count), ("stage", _is_text), ("step", _is_count)):
        if not right(meta.get(key)):
            raise _Damage(
                f"its {META} has no {key!r}" if key not in meta else f"{key!r} of its {META} is {meta[key]!r}"
            )
    name = NAME.match(path.rstrip("/").rsplit("/", 1)[-1])
    if name and (name["stage"], int(name["step"])) != (meta["stage"], meta["step"]):
        raise _Damage(f"its {META} is that of {checkpoint_name(meta['stage'], meta['step'])}")
    return meta


def _parsed(name: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _Damage(f"its {name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise _Damage(f"its {name} holds no JSON object")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sha(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _asked(path: str, name: str, question: Callable[[str], Any]) -> Any:
    """The answer of the storage about a file of a checkpoint. A local file that cannot be read is damage."""
    try:
        return question(storage.join(path, name))
    except FileNotFoundError:
        raise _Damage(f"{name} is missing") from None
    except StorageError as error:
        cause = error.__cause__
        if not storage.is_local(path) or isinstance(cause, PermissionError):
            raise
        raise _Damage(f"{name} cannot be read ({cause or error})") from error


def _check_bytes(name: str, data: bytes, recorded: Mapping[str, Any]) -> None:
    if hashlib.sha256(data).hexdigest() != recorded["sha256"]:
        raise _Damage(f"the content of {name} does not match its checksum")


def _check_content(path: str, name: str, recorded: Mapping[str, Any]) -> None:
    """SHA-256 of a file, and that tensors can be read where it holds some. A remote file is read once."""
    tensors = name in (MODEL, OPTIMIZER)
    if tensors and not storage.is_local(path):
        data = _asked(path, name, storage.read_bytes)
        _check_bytes(name, data, recorded)
        _tensors(name, io.BytesIO(data))
        return
    if _asked(path, name, storage.sha256_file) != recorded["sha256"]:
        raise _Damage(f"the content of {name} does not match its checksum")
    if tensors:
        _tensors(name, str(storage.local_path(storage.join(path, name))), mmap=True)


def _load_tensors(path: str, device: torch.device | str) -> dict[str, Any]:
    name = path.rsplit("/", 1)[-1]
    if storage.is_local(path):
        return _tensors(name, str(storage.local_path(path)), device)
    return _tensors(name, io.BytesIO(storage.read_bytes(path)), device)


def _tensors(name: str, source: Any, device: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
    try:
        loaded = torch.load(source, map_location=device, weights_only=True, mmap=mmap)
    except (FileNotFoundError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # torch and pickle raise almost anything for bytes that are not theirs
        raise _Damage(f"{name} holds no tensors ({type(error).__name__})") from error
    if not isinstance(loaded, dict) or (name == MODEL and not all(map(torch.is_tensor, loaded.values()))):
        raise _Damage(f"{name} holds no named tensors")
    return loaded
