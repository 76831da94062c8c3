"""Which content a file has: a SHA-256, and a stamp by which an unchanged file is known without being read again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megacontext import storage
from megacontext.errors import DataError, StorageError

_HASHES_AT_ONCE = 4


@dataclass(frozen=True)
class FileIdentity:
    """Name, size in bytes, SHA-256 of the content, and the stamp that the file had when its content was read."""

    name: str
    bytes: int
    sha256: str
    stamp: str

    @property
    def content(self) -> tuple[str, int, str]:
        """What stays when a file is copied or touched."""
        return self.name, self.bytes, self.sha256


def identify(path: str, known: FileIdentity | None = None) -> FileIdentity:
    """The identity of a file now. Its content is not read when name, size and stamp are those of `known`.

    Raises DataError when the file is absent, StorageError when it cannot be read.
    """
    size, stamp = read_stamp(path)
    name = path.rsplit("/", 1)[-1]
    if known is not None and (known.name, known.bytes, known.stamp) == (name, size, stamp):
        return known
    try:
        return FileIdentity(name, size, storage.sha256_file(path), stamp)
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise StorageError(f"cannot read {path!r}: {error}.") from error


def identify_all(paths: Sequence[str], known: Iterable[FileIdentity] = ()) -> list[FileIdentity]:
    """`identify` for several files at once, in their order; `known` identities are matched by name."""
    by_name = {identity.name: identity for identity in known}
    with ThreadPoolExecutor(_HASHES_AT_ONCE) as pool:
        return list(pool.map(lambda path: identify(path, by_name.get(path.rsplit("/", 1)[-1])), paths))


def read_stamp(path: str) -> tuple[int, str]:
    """Size in bytes and stamp of a file. The stamp changes when the file is written or replaced, also by one of its size.

    On a local disk the stamp is the inode with the times of the last change of content and of inode: copying a file's
    modification time onto another does not make their stamps equal. In an object store it is a digest of what the store
    tells of the object (ETag or modification time among it).
    Raises DataError when the file is absent, StorageError when the storage does not answer.
    """
    fs, inner = storage.filesystem(path)
    try:
        if storage.is_local(path):
            status = storage.local_path(path).stat()
            return status.st_size, f"{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}"
        return int(fs.size(inner)), str(fs.ukey(inner))
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise StorageError(
            f"cannot reach {path!r}: {error}. Check the address, the network and credentials."
        ) from error


def check_unchanged(path: str, identity: FileIdentity) -> None:
    """Raises DataError when a file is no longer the one that was identified: it was written to in between."""
    if read_stamp(path) != (identity.bytes, identity.stamp):
        raise DataError(f"{path!r} was changed while it was read. Wait until its writer has ended, then run again.")


def from_json(value: Any) -> FileIdentity:
    """An identity as `dataclasses.asdict` has stored it. Raises KeyError or TypeError for anything else."""
    return FileIdentity(name=value["name"], bytes=value["bytes"], sha256=value["sha256"], stamp=value["stamp"])


def _missing(path: str) -> DataError:
    return DataError(f"{path!r} is missing; restore it, or point --data_dir elsewhere.")
