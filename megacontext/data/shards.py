"""Token shards: rows of T+1 ids in Arrow IPC files that are read through a memory map, and their manifest.

A split (train, val) is one folder. Each shard is an uncompressed Arrow IPC file with one record batch. Its column `ids`
(uint16, or uint32 for vocabularies above 65,536) has T+1 numbers a row; `COLUMNS` lists what some data have beside it.
So a column is one flat array on disk, a row is arithmetic, and opening costs nothing.
`manifest.json` is written last: a folder without it is not finished.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import uuid
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megacontext import storage
from megacontext.errors import DataError, StorageError

MANIFEST = "manifest.json"
VERSION = 1
REMEDY = "Run jobs/prepare_data.py"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Column:
    """A column beside `ids`: T+1 numbers a row, or one number a row."""

    dtype: np.dtype[Any]
    per_token: bool


COLUMNS = {
    "mask": Column(np.dtype(np.uint8), per_token=True),  # 1: the id is a target that counts
    "kind": Column(np.dtype(np.uint8), per_token=False),  # what the row is (data/stream.py)
    "end": Column(np.dtype(np.uint32), per_token=False),  # inputs of the row before its padding
}


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest dtype of the `ids` column that holds a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class ShardInfo:
    """One shard file: its name inside the folder, rows, size in bytes and zlib CRC-32 of the file."""

    name: str
    rows: int
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. Token counts are those of the documents, without the BOS that packing adds."""

    version: int
    split: str
    row_tokens: int
    dtype: str
    vocab_size: int
    tokenizer_digest: str
    columns: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    documents: int
    tokens_in: int
    tokens_kept: int
    source: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def write(self, directory: str) -> None:
        """Publish the folder: atomic, and the last thing that is written. Raises StorageError."""
        storage.write_json(storage.join(directory, MANIFEST), asdict(self))

    @classmethod
    def read(cls, directory: str) -> Manifest:
        """Raises DataError when it is absent, unreadable or of another version."""
        path = storage.join(directory, MANIFEST)
        try:
            raw = storage.read_json(path)
        except FileNotFoundError:
            what = "has no manifest.json" if storage.exists(directory) else "does not exist"
            raise DataError(f"token folder {directory!r} {what}: it was never completed. {REMEDY}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path!r} is not JSON ({error}). {REMEDY} to rewrite it.") from error
        try:
            if raw["version"] != VERSION:
                raise DataError(f"{path!r} has version {raw['version']}, this program reads {VERSION}. {REMEDY}.")
            values = {item.name: raw[item.name] for item in fields(cls)}
            values["shards"] = tuple(ShardInfo(**shard) for shard in raw["shards"])
            values["columns"] = tuple(raw["columns"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{path!r} lacks or misnames a field ({error}). {REMEDY} to rewrite it.") from error
        unknown = sorted(set(values["columns"]) - {"ids", *COLUMNS})
        if unknown:
            raise DataError(f"{path!r} has columns {', '.join(unknown)} that this program does not know. {REMEDY}.")
        return cls(**values)


class _ChecksumWriter:
    """A file that counts and checksums what is written to it, for Arrow's writer."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.crc32 = 0
        self.bytes = 0

    closed = False

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        written = self._file.write(data)
        self.bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()


def write_shard(path: str, columns: Mapping[str, npt.NDArray[Any]]) -> ShardInfo:
    """Write one shard atomically: temporary file, fsync, rename; to an fsspec URI, one upload of a finished file.

    Args:
        path: local path or URI of the file.
        columns: `ids` [rows, row_tokens], and any of `COLUMNS`; dtypes are kept.

    Raises:
        StorageError: the disk is full or the path cannot be written; the temporary file is gone.
    """
    assert "ids" in columns, f"a shard needs a column `ids`, not only {sorted(columns)}"
    rows = len(columns["ids"])
    for name, array in columns.items():
        due = columns["ids"].shape if name == "ids" or COLUMNS[name].per_token else (rows,)
        assert array.shape == due, f"column {name} has shape {array.shape}, not {due}"
    batch = pa.record_batch([to_arrow(array) for array in columns.values()], names=list(columns))
    local = storage.is_local(path)
    target = storage.local_path(path) if local else Path(tempfile.gettempdir()) / path.rsplit("/", 1)[-1]
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            sink = _ChecksumWriter(file)
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, target, path)
    except OSError as error:
        raise StorageError(
            f"cannot write token shard {path!r}: {error}. Free space or choose another --base_dir."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return ShardInfo(path.rsplit("/", 1)[-1], rows, sink.bytes, sink.crc32)


def to_arrow(array: npt.NDArray[Any]) -> pa.Array:
    """A column [n] or [n, width] as an Arrow array of numbers or of fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _publish(temporary: Path, target: Path, path: str) -> None:
    if storage.is_local(path):
        os.replace(temporary, target)
        storage.sync_dir(target.parent)
        return
    fs, inner = storage.filesystem(path)
    fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
    fs.put_file(str(temporary), inner)


class ShardSet:
    """A folder of shards as one table of rows. Shards are fetched (if remote) and mapped when first read.

    Safe to use from several threads; pickles as its folder, so it can cross to another process.
    """

    def __init__(self, directory: str, manifest: Manifest, cache_dir: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self._cache_dir = cache_dir
        self._ends = np.cumsum([shard.rows for shard in manifest.shards], dtype=np.int64)
        self._open: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str, cache_dir: str | None = None) -> ShardSet:
        """Open a local folder or fsspec URI.

        `cache_dir` is where remote shards are copied to, once (default: a folder of the system's temporary one).

        Raises:
            DataError: no manifest, no rows, or a shard that is missing or of another size than the manifest says.
        """
        manifest = Manifest.read(directory)
        cache = cache_dir or os.path.join(tempfile.gettempdir(), "megacontext-shards")
        shards = cls(directory, manifest, cache)
        if manifest.num_rows == 0 or any(shard.rows == 0 for shard in manifest.shards):
            raise DataError(
                f"token folder {directory!r} has an empty shard or no rows at all. Give more text, then run jobs/prepare_data.py."
            )
        if storage.is_local(directory):
            for index in range(len(manifest.shards)):
                shards._check_size(index, storage.local_path(shards._path(index)))
        return shards

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.directory, self.manifest, self._cache_dir)

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1])

    @property
    def row_tokens(self) -> int:
        """Ids of a row, T+1."""
        return self.manifest.row_tokens

    @property
    def row_bytes(self) -> int:
        """Bytes of a row over all columns."""
        return sum(math.prod(self._shape(name, 1)) * self._dtype(name).itemsize for name in self.manifest.columns)

    def read(self, rows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """Gather rows by index in [0, num_rows), in the order asked for.

        Returns:
            each column as a new array of its stored dtype, [n, T+1] or [n].

        Raises:
            DataError: a shard is missing, truncated or not what the manifest says.
        """
        rows = np.asarray(rows, dtype=np.int64)
        assert rows.size == 0 or (rows.min() >= 0 and rows.max() < self.num_rows), "row index out of range"
        shard_of = np.searchsorted(self._ends, rows, side="right")
        touched = np.unique(shard_of)
        out = {name: np.empty(self._shape(name, len(rows)), self._dtype(name)) for name in self.manifest.columns}
        for index in touched:
            here = np.flatnonzero(shard_of == index)
            local = rows[here] - (self._ends[index] - self.manifest.shards[index].rows)
            for name, column in self.columns(int(index)).items():
                out[name][here] = column[local]
        return out

    def columns(self, index: int) -> dict[str, npt.NDArray[Any]]:
        """Zero-copy views, [rows, T+1] or [rows], of one shard. Raises DataError when the file is damaged."""
        with self._lock:
            if index not in self._open:
                path = self._fetch(index)
                self._open[index] = self._map(index, path)
            return self._open[index]

    def verify(self, threads: int = 4) -> None:
        """Compare every shard's size and checksum with the manifest. Raises DataError naming the file."""
        with ThreadPoolExecutor(max(1, min(threads, len(self.manifest.shards)))) as pool:
            list(pool.map(self._verify_one, range(len(self.manifest.shards))))

    def check_fits(self, *, vocab_size: int, tokenizer_digest: str, seq_len: int) -> None:
        """Raises DataError unless the rows were made by this tokenizer, for this model's vocabulary and length."""
        mine = self.manifest
        if mine.tokenizer_digest != tokenizer_digest:
            raise DataError(
                f"token folder {self.directory!r} was made by tokenizer {mine.tokenizer_digest[:12]}, the run uses "
                f"{tokenizer_digest[:12]}. {REMEDY} with this tokenizer, or use the tokenizer of the shards."
            )
        if mine.vocab_size != vocab_size:
            raise DataError(
                f"token folder {self.directory!r} has a vocabulary of {mine.vocab_size}, the model one of {vocab_size}. "
                f"{REMEDY} with the model's tokenizer, or build the model with --vocab_size {mine.vocab_size}."
            )
        if mine.row_tokens != seq_len + 1:
            raise DataError(
                f"token folder {self.directory!r} has rows for a sequence length of {mine.row_tokens - 1} tokens, the run "
                f"asks for {seq_len}. {REMEDY} with --max_seq_len {seq_len}, or train with --max_seq_len {mine.row_tokens - 1}."
            )

    def _path(self, index: int) -> str:
        return storage.join(self.directory, self.manifest.shards[index].name)

    def _dtype(self, column: str) -> np.dtype[Any]:
        return np.dtype(self.manifest.dtype) if column == "ids" else COLUMNS[column].dtype

    def _shape(self, column: str, rows: int) -> tuple[int, ...]:
        return (rows, self.row_tokens) if column == "ids" or COLUMNS[column].per_token else (rows,)

    def _fetch(self, index: int) -> Path:
        remote = self._path(index)
        try:
            path = storage.localize(remote, os.path.join(self._cache_dir, f"{self.manifest.shards[index].crc32:08x}"))
        except FileNotFoundError:
            raise DataError(f"token shard {remote!r} is missing. {REMEDY} to restore it.") from None
        self._check_size(index, path)
        return path

    def _check_size(self, index: int, path: Path) -> None:
        info = self.manifest.shards[index]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"token shard {str(path)!r} is missing. {REMEDY} to restore it.") from None
        if size != info.bytes:
            raise DataError(
                f"token shard {str(path)!r} has {size} bytes, its manifest says {info.bytes}: it is truncated or from "
                f"another run. Delete it, then run jobs/prepare_data.py."
            )

    def _map(self, index: int, path: Path) -> dict[str, npt.NDArray[Any]]:
        info = self.manifest.shards[index]
        try:
            shapes = {name: (self._dtype(name), self._shape(name, info.rows)) for name in self.manifest.columns}
            return open_shard(path, shapes)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise DataError(
                f"token shard {str(path)!r} is damaged: {error}. Delete it, then run jobs/prepare_data.py."
            ) from error

    def _verify_one(self, index: int) -> None:
        path, info = self._fetch(index), self.manifest.shards[index]
        crc32 = crc32_file(path)
        if crc32 != info.crc32:
            raise DataError(
                f"token shard {str(path)!r} has checksum {crc32:08x}, its manifest says {info.crc32:08x}: the file was "
                "changed or damaged. Delete it, then run jobs/prepare_data.py."
            )


def open_shard(path: Path, columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, npt.NDArray[Any]]:
    """Map one shard file; arrays of the given dtypes and shapes that share its pages. Raises ValueError on others."""
    batches = pa.ipc.open_file(pa.memory_map(str(path)))
    if batches.num_record_batches != 1:
        raise ValueError(f"it has {batches.num_record_batches} record batches, not 1")
    batch = batches.get_batch(0)
    views = {}
    for name, (dtype, shape) in columns.items():
        if name not in batch.schema.names:
            raise ValueError(f"it has no column {name!r}")
        numbers = pa.from_numpy_dtype(dtype)
        want = pa.list_(numbers, shape[1]) if len(shape) == 2 else numbers
        if not batch.schema.field(name).type.equals(want):
            raise ValueError(f"column {name!r} is {batch.schema.field(name).type}, not {want}")
        if batch.num_rows != shape[0]:
            raise ValueError(f"it has {batch.num_rows} rows, its manifest says {shape[0]}")
        flat = batch.column(name).flatten() if len(shape) == 2 else batch.column(name)
        views[name] = flat.to_numpy(zero_copy_only=True).reshape(shape)
    return views


def crc32_file(path: Path) -> int:
    """zlib CRC-32 of a file, read in pieces."""
    crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
