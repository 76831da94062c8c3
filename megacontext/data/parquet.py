"""Folders of parquet shards in nanochat's layout: a string column `text`, files in name order, the last is validation."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megacontext import storage
from megacontext.errors import DataError, StorageError

COLUMN = "text"
SUFFIX = ".parquet"
ROW_GROUP_ROWS = 1024
ZSTD_LEVEL = 3
_NAMED = 5  # most things that a message names one by one
_CHECKS_AT_ONCE = 8  # footers read at once


def list_parquet(data_dir: str) -> list[str]:
    """Paths of the parquet files of a local folder or fsspec URI, in name order.

    Hidden and temporary files, other kinds of files and folders are left out. Raises DataError, saying what is there
    instead, when there are no parquet files; StorageError when the storage cannot be reached.
    """
    names, _ = _entries(data_dir)
    found = [name for name in names if name.endswith(SUFFIX)]
    if not found:
        raise DataError(
            f"data folder {data_dir!r} {_instead(data_dir)}; point --data_dir at a folder of shards with a `{COLUMN}` column."
        )
    for name in found:
        if name != name.encode(errors="replace").decode():
            raise DataError(f"the file name {name!r} in {data_dir!r} is not UTF-8; rename the file.")
    return [storage.join(data_dir, name) for name in found]


def text_shards(data_dir: str) -> tuple[list[str], list[str]]:
    """(train, validation) shards of a folder, each checked as far as its footer tells: the first step of every job.

    Raises DataError as `list_parquet`, `split_parquet` and `count_rows` do; with several unusable shards it names them.
    """
    train, validation = split_parquet(list_parquet(data_dir))
    with ThreadPoolExecutor(_CHECKS_AT_ONCE) as pool:
        problems = [problem for problem in pool.map(_problem, [*train, *validation]) if problem]
    if problems:
        more = f" There are {len(problems) - _NAMED} more such files." if len(problems) > _NAMED else ""
        raise DataError(" ".join(problems[:_NAMED]) + more)
    return train, validation


def unread_subfolders(data_dir: str) -> list[str]:
    """Names of the subfolders of a data folder that hold parquet files: nothing in them is read."""
    return [name for name, _ in _subfolders(data_dir)]


def _entries(data_dir: str) -> tuple[list[str], list[str]]:
    """Sorted names of the files and of the folders in a folder, without hidden ones; none when it is absent or a file."""
    fs, inner = storage.filesystem(data_dir)
    try:
        fs.invalidate_cache()
        if fs.isfile(inner):
            return [], []
        listed = fs.ls(inner, detail=True)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise StorageError(
            f"cannot list {data_dir!r}: {error}. Check the address, its permissions, the network and credentials."
        ) from error
    files: list[str] = []
    folders: list[str] = []
    for entry in listed:
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        is_folder = entry["type"] == "directory" or (entry.get("islink") and fs.isdir(entry["name"]))
        if not name.startswith("."):
            (folders if is_folder else files).append(name)
    return sorted(files), sorted(folders)


def _subfolders(data_dir: str) -> list[tuple[str, int]]:
    """(path below the folder, number of parquet files) of each subfolder that has some, two levels deep."""
    found = []
    for name in _entries(data_dir)[1]:
        files, below = _entries(storage.join(data_dir, name))
        counts = {name: files} | {
            f"{name}/{inner}": _entries(storage.join(data_dir, name, inner))[0] for inner in below
        }
        found += [(path, sum(file.endswith(SUFFIX) for file in files)) for path, files in counts.items()]
    return [(path, count) for path, count in found if count]


def _instead(data_dir: str) -> str:
    """What is at the place of a data folder without parquet files."""
    fs, inner = storage.filesystem(data_dir)
    if not storage.exists(data_dir):
        return "does not exist"
    if fs.isfile(inner):
        return "is a file, and a folder of at least 2 shards is needed: the last one is kept for validation"
    below = _subfolders(data_dir)
    if below:
        listed = ", ".join(f"{storage.join(data_dir, path)!r} ({count})" for path, count in below[:_NAMED])
        more = f" and {len(below) - _NAMED} more" if len(below) > _NAMED else ""
        return f"holds no {SUFFIX} files itself; they are in its subfolders {listed}{more}"
    files = _entries(data_dir)[0]
    kinds = Counter(f".{name.rsplit('.', 1)[1]}" if "." in name else "without ending" for name in files)
    held = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_NAMED))
    return f"holds no {SUFFIX} files" + (f" (it holds {held})" if held else "")


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
                raise _null_error(path, group, nulls)
            if texts:
                yield texts


def count_rows(path: str) -> int:
    """Rows of a shard, from its footer alone. Raises DataError as `read_texts` does, for what a footer tells."""
    with _open(path) as file:
        return int(file.metadata.num_rows)


def _problem(path: str) -> str:
    """Why a shard cannot be used, as far as its footer tells; empty when nothing speaks against it."""
    try:
        count_rows(path)
    except DataError as error:
        return str(error)
    return ""


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
    """Raise DataError unless there are rows, one string column `text`, and no nulls in it that its statistics count."""
    schema = file.schema_arrow
    count = schema.names.count(COLUMN)
    if count == 0:
        raise DataError(
            f"{path!r} has no column `{COLUMN}`; its columns are {schema.names}. Rename the one that holds the text."
        )
    if count > 1:
        raise DataError(
            f"{path!r} has {count} columns `{COLUMN}`, and one is needed; its columns are {schema.names}. "
            "Keep the one that holds the text, and remove or rename the others."
        )
    kind = schema.field(COLUMN).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        raise DataError(
            f"column `{COLUMN}` of {path!r} has type {kind}; it must be string. Write the file again with a string column."
        )
    if not file.metadata.num_rows:
        raise DataError(f"{path!r} has no rows; remove the file or write it again.")
    index = [file.schema.column(i).path for i in range(len(file.schema))].index(COLUMN)
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(index).statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count:
            raise _null_error(path, group, statistics.null_count)


def _null_error(path: str, group: int, nulls: int) -> DataError:
    return DataError(f"row group {group} of {path!r} has {nulls} null texts; remove these rows.")
