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
        (pa.table([["a"], ["b"]], names=["text", "text"]), r"2 columns `text`.*\['text', 'text'\].*Keep the one"),
        (pa.table({"text": [["a"], ["b"]]}), "type list<.*>; it must be string. Write the file again"),
        (pa.table({"text": pa.nulls(2)}), "type null"),
        (pa.table({"text": pa.array([b"x"]).dictionary_encode()}), "type dictionary<values=binary"),
        (pa.table({"text": [{"text": "x"}]}), "type struct<text: string>"),
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


def shards(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(parquet.encode_texts([name]))


def test_shards_in_subfolders_are_pointed_at(tmp_path: Path) -> None:
    shards(tmp_path / "data", "a.parquet", "b.parquet")
    shards(tmp_path / "more" / "en", "c.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"holds no \.parquet files itself; .* '\S*/data' \(2\), '\S*/more/en' \(1\); point"
    ):
        parquet.text_shards(str(tmp_path))
    shards(tmp_path, "a.parquet", "b.parquet")
    assert parquet.text_shards(str(tmp_path)) == ([str(tmp_path / "a.parquet")], [str(tmp_path / "b.parquet")])
    assert parquet.unread_subfolders(str(tmp_path)) == ["data", "more/en"]


def test_a_folder_that_is_named_like_a_shard_is_no_shard(tmp_path: Path) -> None:
    """Spark writes a folder `x.parquet` with the shards inside."""
    shards(tmp_path / "x.parquet", "part-0.snappy.parquet", "part-1.snappy.parquet")
    (tmp_path / "x.parquet" / "_SUCCESS").touch()
    with pytest.raises(DataError, match=r"subfolders '\S*/x\.parquet' \(2\)"):
        parquet.text_shards(str(tmp_path))
    assert len(parquet.text_shards(str(tmp_path / "x.parquet"))[0]) == 1


def test_a_file_in_place_of_a_folder_and_other_kinds_of_files(tmp_path: Path) -> None:
    shards(tmp_path / "one", "a.parquet")
    with pytest.raises(DataError, match=r"one/a\.parquet' is a file, and a folder of at least 2 shards is needed"):
        parquet.text_shards(str(tmp_path / "one" / "a.parquet"))
    with pytest.raises(DataError, match="at least 2 are needed"):
        parquet.text_shards(str(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.txt", "README"):
        (tmp_path / "two" / name).touch()
    with pytest.raises(DataError, match=r"holds no \.parquet files \(it holds 2 \.jsonl, 1 without ending, 1 \.txt\)"):
        parquet.list_parquet(str(tmp_path / "two"))


def test_links_and_odd_names_are_read(tmp_path: Path) -> None:
    odd = ["a b.parquet", "ü#%20?*[1].parquet", "~z.parquet"]
    shards(tmp_path / "real", *odd)
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for name in odd:
        (tmp_path / "links" / name).symlink_to(tmp_path / "real" / name)
    for folder in ("real", "linked", "links"):
        train, val = parquet.text_shards(str(tmp_path / folder))
        assert [text for path in train + val for group in parquet.read_texts(path) for text in group] == sorted(odd)
    (tmp_path / "real" / "\udcff.parquet").touch()
    with pytest.raises(DataError, match=r"'\\udcff\.parquet' .* is not UTF-8; rename"):
        parquet.list_parquet(str(tmp_path / "real"))


def test_all_unusable_shards_are_named_at_once(tmp_path: Path) -> None:
    shards(tmp_path, "a.parquet", "z.parquet")
    write(tmp_path / "b.parquet", pa.table({"text": [1]}))
    write(tmp_path / "c.parquet", pa.table({"text": ["x", None]}))
    (tmp_path / "d.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(
        DataError, match=r"b\.parquet' has type int64.*c\.parquet' has 1 null.*d\.parquet' is not a whole"
    ):
        parquet.text_shards(str(tmp_path))
    for index in range(9):
        (tmp_path / f"e{index}.parquet").touch()
    with pytest.raises(DataError, match="There are 7 more such files"):
        parquet.text_shards(str(tmp_path))


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "ls", refuse)
    with pytest.raises(StorageError, match=f"cannot list '{tmp_path}': .*Permission denied.*permissions"):
        parquet.text_shards(str(tmp_path))
