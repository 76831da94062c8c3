"""One small face for local paths and fsspec URIs (`s3://…`, `gs://…`, `memory://…`).

Writes are atomic: a reader sees the old content or the new, never a half. On a local disk that is a temporary file,
an fsync and a rename; object stores publish an object only when its upload has ended.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from megacontext.errors import StorageError, UserError


def is_local(path: str) -> bool:
    """True for a plain path or a `file://` URI."""
    return "://" not in path or path.startswith(("file://", "local://"))


def local_path(path: str) -> Path:
    """The plain path behind a local path or `file://` URI. Raises StorageError for `~` where no home folder is known."""
    plain = Path(path.split("://", 1)[1] if "://" in path else path)
    try:
        return plain.expanduser()
    except RuntimeError:
        raise StorageError(
            f"{path!r} begins at a home folder that is not known. Set HOME, or give an absolute path."
        ) from None


def local_folder(path: str) -> Path:
    """The plain path of a local folder. Raises UserError for a path that no file system can hold."""
    try:
        os.fsencode(path)
        if "\0" in path:
            raise ValueError("it contains a NUL character")
    except ValueError as error:
        raise UserError(f"{path!r} cannot be a folder: {error}. Choose another path.") from error
    return local_path(path)


def join(base: str, *parts: str) -> str:
    """Append path segments to a path or URI."""
    return "/".join([base.rstrip("/") if base != "/" else "", *(part.strip("/") for part in parts)])


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path and the path inside it.

    Raises StorageError when the protocol is unknown, its package is missing, or the store refuses.
    """
    if is_local(path):
        return fsspec.filesystem("file"), str(local_path(path).absolute())
    try:
        fs, inner = url_to_fs(path)
    except (ImportError, ValueError, OSError) as error:
        raise StorageError(
            f"cannot use storage {path!r}: {error}. Check the URI, its package and credentials."
        ) from error
    return fs, inner


def exists(path: str) -> bool:
    """Whether a file or folder is there. Raises StorageError if the store cannot be asked."""
    fs, inner = filesystem(path)
    try:
        return bool(fs.exists(inner))
    except OSError as error:
        raise StorageError(
            f"cannot reach {path!r}: {error}. Check the address, the network and credentials."
        ) from error


def makedirs(path: str) -> None:
    """Create a folder and its parents; nothing happens if it is there."""
    fs, inner = filesystem(path)
    try:
        fs.makedirs(inner, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create {path!r}: {error}. Check the address, permissions and free space."
        ) from error


def list_dir(path: str) -> list[str]:
    """Sorted names (not paths) inside a folder; an absent folder has none."""
    fs, inner = filesystem(path)
    try:
        fs.invalidate_cache()
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=False)})
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot list {path!r}: {error}. Check the address, the network and credentials.") from error


def remove_tree(path: str) -> None:
    """Delete a file or folder with all it holds; nothing happens if it is absent. Raises StorageError if it stays."""
    fs, inner = filesystem(path)
    try:
        if fs.exists(inner):
            fs.rm(inner, recursive=True)
    except FileNotFoundError:
        return  # another process was faster
    except OSError as error:
        raise StorageError(f"cannot delete {path!r}: {error}. {remedy(error)}") from error


def open_file(path: str, mode: str = "rb") -> IO[Any]:
    """Open a file for reading or (not atomically) writing. FileNotFoundError passes through."""
    fs, inner = filesystem(path)
    try:
        return fs.open(inner, mode)  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot open {path!r}: {error}. {remedy(error)}") from error


def read_bytes(path: str) -> bytes:
    """The whole content of a file. FileNotFoundError if it is absent, StorageError if it cannot be read."""
    with open_file(path) as file:
        try:
            return bytes(file.read())
        except OSError as error:
            raise StorageError(f"cannot read {path!r}: {error}. {remedy(error)}") from error


def read_json(path: str) -> Any:
    """Parse a JSON file. FileNotFoundError or json.JSONDecodeError pass through."""
    return json.loads(read_bytes(path))


def write_bytes(path: str, data: bytes) -> None:
    """Replace a file's content atomically and durably; parents are created. Raises StorageError, e.g. on a full disk."""
    if not is_local(path):
        fs, inner = filesystem(path)
        try:
            fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
            fs.pipe_file(inner, data)
        except OSError as error:
            raise StorageError(f"cannot write {path!r}: {error}.") from error
        return
    target = local_path(path)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_dir(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # where nothing could be written, nothing can be removed either
            temporary.unlink()
        raise StorageError(f"cannot write {str(target)!r}: {error}. {remedy(error)}") from error


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given. A number that is not finite becomes null."""
    write_bytes(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """A JSON value with None in place of each NaN and infinity: JSON has no word for them, and strict readers refuse them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def file_size(path: str) -> int:
    """Size of a file in bytes. FileNotFoundError if it is absent, StorageError if the store does not say."""
    fs, inner = filesystem(path)
    try:
        return int(fs.size(inner))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot read the size of {path!r}: {error}. {remedy(error)}") from error


def remedy(error: OSError) -> str:
    """What to do about a write or a read that failed, as a sentence."""
    place = "choose another place: --storage for runs, NANOCHAT_BASE_DIR for all"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"Free space, or {place}; then run the same command again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Give this user the right to read and write there, or {place}."
    return f"Check the path, the disk and the network, or {place}."


def sync_dir(path: Path) -> None:
    """Make a rename inside a local folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: str) -> str:
    """Hex digest of a file's content. FileNotFoundError if it is absent, StorageError if it cannot be read."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        try:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        except OSError as error:
            raise StorageError(f"cannot read {path!r}: {error}. {remedy(error)}") from error
    return digest.hexdigest()


def localize(path: str, cache_dir: str) -> Path:
    """A local copy of a file, fetched once into `cache_dir` when `path` is remote; the path itself when it is local."""
    if is_local(path):
        return local_path(path)
    target = Path(cache_dir) / hashlib.sha256(path.encode()).hexdigest()[:16] / path.rsplit("/", 1)[-1]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
        with open_file(path) as source, open(temporary, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 22)
        os.replace(temporary, target)
    return target
