"""Folders of parquet shards in nanochat's layout: a string column `text`, files in name order, the last is validation."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megacontext import storage
from megacontext.errors import DataError

COLUMN = "text"
ROW_GROUP_ROWS = 1024
ZSTD_LEVEL = 3


def list_parquet(data_dir: str) -> list[str]:
    """Paths of the parquet files of a local folder or fsspec URI, in name order.

    Hidden and temporary files are left out. Raises DataError when there are none, StorageError when the storage
    cannot be reached.
    """
    names = [name for name in storage.list_dir(data_dir) if name.endswith(".parquet") and not name.startswith(".")]
    if not names:
        state = "holds no .parquet files" if storage.exists(data_dir) else "does not exist"
        raise DataError(
            f"data folder {data_dir!r} {state}; point --data_dir at a folder of shards with a `{COLUMN}` column."
        )
    return [storage.join(data_dir, name) for name in names]


def split_parquet(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """(train, validation) shards: the last in name order is validation. Raises DataError when there is only one."""
    ordered = sorted(paths)
    if len(ordered) < 2:
        raise DataError(
            f"there is {len(ordered)} parquet shard {ordered}; at least 2 are needed, "
            "because the last is kept for validation. Split the file or add one."
        )
    return ordered[:-1], ordered[-1:]


def read_texts(path: str) -> Iterator[list[str]]:
    """Texts of a shard, one list per row group, so that memory stays that of one group.

    Raises DataError, naming the file, when it is absent or damaged, has no rows, no `text` column, another type than
    string there, nulls, or text that is not UTF-8.
    """
    with _open(path) as file:
        for group in range(file.num_row_groups):
            try:
                column = file.read_row_group(group, columns=[COLUMN]).column(COLUMN)
                nulls = column.null_count
                texts: list[str] = [] if nulls else column.to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"row group {group} of {path!r} cannot be read: {error}. Fetch or write the file again."
                ) from error
            if nulls:
                raise DataError(f"row group {group} of {path!r} has {nulls} null texts; remove these rows.")
            if texts:
                yield texts


def count_rows(path: str) -> int:
    """Rows of a shard, from its footer alone. Raises DataError as `read_texts` does."""
    with _open(path) as file:
        return int(file.metadata.num_rows)


def encode_texts(texts: Sequence[str]) -> bytes:
    """A shard as bytes, written as nanochat writes its own: zstd, groups of 1,024 rows, no dictionary, no statistics."""
    sink = io.BytesIO()
    pq.write_table(
        pa.table({COLUMN: pa.array(texts, type=pa.string())}),
        sink,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=False,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        write_statistics=False,
    )
    return sink.getvalue()


@contextmanager
def _open(path: str) -> Iterator[pq.ParquetFile]:
    """A checked parquet file, closed at the end."""
    try:
        handle = storage.open_file(path)
    except FileNotFoundError:
        raise DataError(f"no parquet file at {path!r}.") from None
    with handle:
        try:
            file = pq.ParquetFile(handle)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path!r} is not a whole parquet file: {error}. Fetch or write it again.") from error
        with file:
            _check(path, file)
            yield file


def _check(path: str, file: Any) -> None:
    """Raise DataError unless there are rows and a string column `text`."""
    schema = file.schema_arrow
    if COLUMN not in schema.names:
        raise DataError(
            f"{path!r} has no column `{COLUMN}`; its columns are {schema.names}. Rename the one that holds the text."
        )
    kind = schema.field(COLUMN).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        raise DataError(f"column `{COLUMN}` of {path!r} has type {kind}; it must be string.")
    if not file.metadata.num_rows:
        raise DataError(f"{path!r} has no rows; remove the file or write it again.")
