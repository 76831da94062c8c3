"""Parquet shards: layout, order, and what is said about unusable ones."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacontext.data import parquet
from megacontext.errors import DataError, StorageError


def write(path: Path, table: pa.Table) -> str:
    pq.write_table(table, path)
    return str(path)


def test_list_and_split(tmp_path: Path) -> None:
    for name in (
        "shard_00010.parquet",
        "shard_00002.parquet",
        ".shard_00003.parquet.part",
        ".hidden.parquet",
        "x.json",
    ):
        (tmp_path / name).write_bytes(b"")
    paths = parquet.list_parquet(str(tmp_path))
    assert [Path(path).name for path in paths] == ["shard_00002.parquet", "shard_00010.parquet"]
    assert parquet.split_parquet(paths[::-1]) == ([paths[0]], [paths[1]])


def test_round_trip_by_row_groups(tmp_path: Path) -> None:
    texts = [f"document {i} é\n" for i in range(2500)]
    path = tmp_path / "shard_00000.parquet"
    path.write_bytes(parquet.encode_texts(texts))
    groups = list(parquet.read_texts(str(path)))
    assert [len(group) for group in groups] == [1024, 1024, 452]
    assert [text for group in groups for text in group] == texts
    assert parquet.count_rows(str(path)) == 2500
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert (column.compression, column.is_stats_set, column.has_dictionary_page) == ("ZSTD", False, False)


def test_other_columns_and_string_types(tmp_path: Path) -> None:
    plain = pa.array(["a", "b", "a"])
    for kind in (plain, plain.cast(pa.large_string()), plain.dictionary_encode()):
        path = write(tmp_path / "x.parquet", pa.table({"id": [1, 2, 3], "text": kind}))
        assert list(parquet.read_texts(path)) == [["a", "b", "a"]]


def test_uri(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for index in range(2):
        fs.pipe_file(f"/parquet-test/shard_{index:05d}.parquet", parquet.encode_texts([f"text {index}"]))
    paths = parquet.list_parquet("memory://parquet-test")
    assert paths == ["memory://parquet-test/shard_00000.parquet", "memory://parquet-test/shard_00001.parquet"]
    assert list(parquet.read_texts(paths[1])) == [["text 1"]]


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet files"):
        parquet.list_parquet(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        parquet.list_parquet(str(tmp_path / "absent"))
    with pytest.raises(StorageError, match="nosuchprotocol"):
        parquet.list_parquet("nosuchprotocol://bucket/folder")


def test_one_shard_has_no_validation() -> None:
    with pytest.raises(DataError, match="at least 2 are needed"):
        parquet.split_parquet(["/data/shard_00000.parquet"])


def test_unusable_shards(tmp_path: Path) -> None:
    good = parquet.encode_texts([str(number**3) for number in range(3000)])
    cases = [
        (pa.table({"content": ["x"], "id": [1]}), r"no column `text`; its columns are \['content', 'id'\]"),
        (pa.table({"text": [1, 2]}), "type int64; it must be string"),
        (pa.table({"text": pa.array([b"x"])}), "type binary"),
        (pa.table({"text": pa.array([], type=pa.string())}), "has no rows"),
        (pa.table({"text": ["x", None, None]}), "2 null texts"),
        (b"", "not a whole parquet file"),
        (b"<html>not found</html>", "not a whole parquet file"),
        (good[:-100], "not a whole parquet file"),
        (good[:40] + b"\xff" * 1000 + good[1040:], "row group 0 .* cannot be read"),
    ]
    for number, (content, message) in enumerate(cases):
        path = tmp_path / f"bad_{number}.parquet"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path)
        with pytest.raises(DataError, match=message) as caught:
            list(parquet.read_texts(str(path)))
        assert path.name in str(caught.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    path = write(tmp_path / "x.parquet", pa.table({"text": broken}))
    with pytest.raises(DataError, match="cannot be read"):
        list(parquet.read_texts(path))


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no parquet file at"):
        list(parquet.read_texts(str(tmp_path / "absent.parquet")))
