"""Binarizing a file and a folder: the tokens are the tokenizer's, restarts redo only what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import PATIENCE_S

from jobs import prepare_data
from jobs.runtime import cli
from megacontext import storage
from megacontext.data import binarize, parquet
from megacontext.data.identity import identify
from megacontext.data.shards import Manifest, ShardSet
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError, StorageError, UserError

ROOT = Path(__file__).resolve().parents[1]
WORDS = re.findall(
    r"\w+", "the quick brown fox jumps over a lazy dog and finds that nothing there is quite as it was before"
)


def texts(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 60, count)
    sizes[::10] = 400  # some are longer than a row
    return [" ".join(generator.choice(WORDS, size)) + "." for size in sizes]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(texts(50, 0), 300)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A folder of three parquet shards and a tokenizer."""
    (tmp_path / "text").mkdir()
    for index in range(3):
        (tmp_path / "text" / f"shard_{index:05d}.parquet").write_bytes(parquet.encode_texts(texts(60, index)))
    tokenizer.save(str(tmp_path / "tokenizer"))
    return tmp_path


def document_tokens(ids: np.ndarray, bos: int) -> Counter[int]:
    flat = ids.reshape(-1)
    return Counter(flat[flat != bos].tolist())


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_file_becomes_its_tokens(folder: Path, tokenizer: Tokenizer, num_threads: int) -> None:
    path = str(folder / "text" / "shard_00000.parquet")
    seen: list[int] = []
    out = str(folder / f"out{num_threads}" / "shard_00000")
    receipt = binarize.binarize_file(
        path, out, tokenizer, 65, num_threads, shard_bytes=65 * 2 * 20, on_progress=seen.append
    )
    assert [info.rows for info in receipt.shards[:-1]] == [20] * (len(receipt.shards) - 1)
    assert seen[-1] == receipt.tokens_kept
    manifest = binarize.build_manifest("train", [receipt], tokenizer, 65, "text")
    manifest.write(str(folder / f"out{num_threads}"))
    shards = ShardSet.open(str(folder / f"out{num_threads}"))
    shards.check_fits(vocab_size=300, tokenizer_digest=tokenizer.digest, seq_len=64)
    shards.verify()
    ids = shards.read(np.arange(shards.num_rows))["ids"]
    assert (ids[:, 0] == tokenizer.bos_id).all()
    want: Counter[int] = Counter()
    for text in texts(60, 0):
        want.update(tokenizer.encode(text))
    missing = want - document_tokens(ids, tokenizer.bos_id)
    assert not document_tokens(ids, tokenizer.bos_id) - want
    assert missing.total() == receipt.tokens_in - receipt.tokens_kept < 64
    assert (receipt.documents, receipt.tokens_in) == (60, want.total())


def test_the_same_bytes_again_and_at_any_thread_count(folder: Path, tokenizer: Tokenizer) -> None:
    path = str(folder / "text" / "shard_00000.parquet")
    first = binarize.binarize_file(path, str(folder / "a" / "x"), tokenizer, 65, num_threads=1)
    again = binarize.binarize_file(path, str(folder / "b" / "x"), tokenizer, 65, num_threads=4)
    assert first.shards == again.shards  # sizes and checksums too


def test_the_first_rows_are_a_fair_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Packing emits the rows of long documents first; readers of only some rows must not see only those."""
    documents = ["the " * 20_000, *texts(400, 3)]
    (tmp_path / "x.parquet").write_bytes(parquet.encode_texts(documents))
    receipt = binarize.binarize_file(str(tmp_path / "x.parquet"), str(tmp_path / "o" / "x"), tokenizer, 65)
    binarize.build_manifest("train", [receipt], tokenizer, 65, "x").write(str(tmp_path / "o"))
    shards = ShardSet.open(str(tmp_path / "o"))
    rows = shards.read(np.arange(shards.num_rows))["ids"]
    dull = np.array([len(set(row.tolist())) <= 3 for row in rows])
    half = len(rows) // 2
    assert abs(dull[:half].mean() - dull[half:].mean()) < 0.15


def test_tokenize_keeps_order_and_bounds_what_runs_ahead(tokenizer: Tokenizer) -> None:
    taken = 0

    def groups() -> Iterator[list[str]]:
        nonlocal taken
        for index in range(200):
            taken += 1
            yield [WORDS[index % len(WORDS)] * 30_000]

    stream = binarize.tokenize(groups(), tokenizer, num_threads=2)
    for index in range(3):
        assert tokenizer.decode(next(stream)) == WORDS[index % len(WORDS)] * 30_000
    assert taken < 100
    stream.close()  # type: ignore[attr-defined]


def test_bad_input_names_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        binarize.binarize_file(str(tmp_path / "bad.parquet"), str(tmp_path / "o" / "bad"), tokenizer, 65)
    with pytest.raises(DataError, match=r"gone\.parquet"):
        binarize.binarize_file(str(tmp_path / "gone.parquet"), str(tmp_path / "o" / "gone"), tokenizer, 65)
    assert not (tmp_path / "o").exists()


def test_less_text_than_a_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet.encode_texts(["the fox"]))
    receipt = binarize.binarize_file(str(tmp_path / "x.parquet"), str(tmp_path / "o" / "x"), tokenizer, 65)
    with pytest.raises(DataError, match=r"val split.*less than one row of 65"):
        binarize.build_manifest("val", [receipt], tokenizer, 65, "x")


def test_a_receipt_holds_only_while_everything_fits(folder: Path, tokenizer: Tokenizer) -> None:
    path, out = str(folder / "text" / "shard_00000.parquet"), str(folder / "o" / "shard_00000")

    def done(digest: str = tokenizer.digest, row_tokens: int = 65) -> bool:
        return binarize.finished(path, out, digest, row_tokens) is not None

    assert not done()
    receipt = binarize.binarize_file(path, out, tokenizer, 65)
    assert binarize.finished(path, out, tokenizer.digest, 65) == receipt
    assert not done(digest="other")
    assert not done(row_tokens=66)
    shard = folder / "o" / receipt.shards[0].name
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert not done()
    shard.unlink()
    assert not done()
    shard.write_bytes(data)
    assert done()
    Path(path).write_bytes(parquet.encode_texts(texts(61, 0)))
    assert not done()
    Path(out + ".done.json").write_text("{")
    assert not done()


def write_plain(path: Path, documents: list[str]) -> None:
    """A shard whose size depends on the lengths of its documents alone."""
    table = pa.table({"text": documents})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)


def backwards(documents: list[str]) -> list[str]:
    return [document[::-1] for document in documents]


def test_a_replaced_input_of_the_same_name_size_and_time_is_another_input(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, out = tmp_path / "x.parquet", str(tmp_path / "o" / "x")
    write_plain(path, texts(60, 0))
    before = path.stat()
    receipt = binarize.binarize_file(str(path), out, tokenizer, 65)
    write_plain(tmp_path / "y", backwards(texts(60, 0)))
    os.replace(tmp_path / "y", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert binarize.finished(str(path), out, tokenizer.digest, 65) is None
    again = binarize.binarize_file(str(path), out, tokenizer, 65)
    assert [shard.crc32 for shard in again.shards] != [shard.crc32 for shard in receipt.shards]
    assert binarize.finished(str(path), out, tokenizer.digest, 65) == again


def test_an_input_that_was_copied_or_touched_is_read_once_and_is_done(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "x.parquet", str(tmp_path / "o" / "x")
    write_plain(path, texts(60, 0))
    receipt = binarize.binarize_file(str(path), out, tokenizer, 65)
    shutil.copy(path, tmp_path / "y")
    os.replace(tmp_path / "y", path)
    found = binarize.finished(str(path), out, tokenizer.digest, 65)
    assert found is not None
    assert (found.shards, found.input.content) == (receipt.shards, receipt.input.content)
    monkeypatch.setattr(storage, "sha256_file", lambda path: pytest.fail(f"{path} was read again"))
    assert binarize.finished(str(path), out, tokenizer.digest, 65) == found


def test_a_file_in_a_store_is_known_by_its_content_too() -> None:
    fs, path = fsspec.filesystem("memory"), "memory://identity/x.parquet"
    fs.pipe_file("/identity/x.parquet", b"one")
    first = identify(path)
    assert identify(path, first) is first
    fs.rm("/identity/x.parquet")
    with pytest.raises(DataError, match=r"identity/x\.parquet' is missing"):
        identify(path, first)
    fs.pipe_file("/identity/x.parquet", b"two")
    assert identify(path, first).content != first.content


def test_an_input_that_is_written_to_meanwhile_gets_no_receipt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, out = tmp_path / "x.parquet", str(tmp_path / "o" / "x")
    write_plain(path, texts(60, 0))

    def replaces_it(tokens: int) -> None:
        write_plain(tmp_path / "y", backwards(texts(60, 0)))
        os.replace(tmp_path / "y", path)

    with pytest.raises(DataError, match=r"x\.parquet' was changed while it was read.*run again"):
        binarize.binarize_file(str(path), out, tokenizer, 65, on_progress=replaces_it)
    assert binarize.read_receipt(out) is None


def test_short_documents_can_be_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    words = ["word " * n for n in (1, 30, 199, 200, 201)]
    (tmp_path / "x.parquet").write_bytes(parquet.encode_texts(words))
    path, out = str(tmp_path / "x.parquet"), str(tmp_path / "o" / "x")
    assert binarize.binarize_file(path, out, tokenizer, 65).documents == 5
    assert binarize.binarize_file(path, out, tokenizer, 65, min_doc_chars=1000).documents == 2
    settings = {"tier": "cpu", "base_dir": str(tmp_path), "data_dir": str(tmp_path)}
    folders = {cli.paths(cli.resolve(settings | {"min_doc_chars": n})).tokens_dir for n in (0, 1000, 2000)}
    assert len(folders) == 3
    with pytest.raises(UserError, match="--min_doc_chars is -1; it must be a whole number of at least 0"):
        cli.resolve(settings | {"min_doc_chars": -1})


def test_threads_per_task() -> None:
    assert prepare_data.threads_per_task(1, [8.0]) == 8
    assert prepare_data.threads_per_task(3, [8.0]) == 2
    assert prepare_data.threads_per_task(100, [8.0]) == 1
    assert prepare_data.threads_per_task(1, [8.0, 4.0]) == 8  # a task runs on one node
    assert prepare_data.threads_per_task(0, []) == 1


def prepare(folder: Path, seq_len: int = 64, tokens: str = "tokens") -> dict[str, Any]:
    return prepare_data.prepare(str(folder / "text"), str(folder / "tokenizer"), str(folder / tokens), seq_len)


def inodes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*.arrow")}


@pytest.mark.ray
def test_the_job_resumes_and_repairs(
    folder: Path, tokenizer: Tokenizer, ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = prepare(folder)
    assert metrics["prepare_data/tokens_kept_share"] > 0.98
    train, val = (Path(binarize.split_dir(str(folder / "tokens"), 64, tokenizer.digest, s)) for s in ("train", "val"))
    assert ShardSet.open(str(train)).num_rows == metrics["prepare_data/train_rows"]
    assert ShardSet.open(str(val)).num_rows == metrics["prepare_data/val_rows"]
    assert [name for name, *_ in Manifest.read(str(val)).source["inputs"]] == ["shard_00002.parquet"]
    before = inodes(folder)
    # Complete: nothing is written.
    again = prepare(folder)
    assert inodes(folder) == before
    assert again["prepare_data/tokens"] == metrics["prepare_data/tokens"]
    assert "3 of them already done" in capsys.readouterr().out
    # A shard is half gone, a manifest is gone: only that shard is made anew, with the same bytes.
    broken = train / "shard_00001-00000.arrow"
    content = broken.read_bytes()
    os.truncate(broken, 100)
    (train / "manifest.json").unlink()
    prepare(folder)
    assert broken.read_bytes() == content
    changed = {name for name, inode in inodes(folder).items() if before[name] != inode}
    assert changed <= {str(broken.relative_to(folder))}
    ShardSet.open(str(train)).verify()
    # Another row length is another folder; the old one stays.
    prepare(folder, seq_len=32)
    assert ShardSet.open(str(train)).row_tokens == 65
    # An input is replaced by one of the same name, one is added: the tokens are those of the new text.
    write_plain(folder / "text" / "shard_00000.parquet", backwards(texts(60, 0)))
    write_plain(folder / "text" / "shard_00003.parquet", texts(60, 3))
    capsys.readouterr()
    prepare(folder)
    assert "shard_00000.parquet or its token shards changed; it is binarized again" in capsys.readouterr().out
    inputs = [[name for name, *_ in Manifest.read(str(side)).source["inputs"]] for side in (train, val)]
    assert inputs == [[f"shard_{index:05d}.parquet" for index in range(3)], ["shard_00003.parquet"]]
    ids = ShardSet.open(str(train)).read(np.arange(ShardSet.open(str(train)).num_rows))["ids"]
    want = Counter(
        token for text in [*backwards(texts(60, 0)), *texts(60, 1), *texts(60, 2)] for token in tokenizer.encode(text)
    )
    assert not document_tokens(ids, tokenizer.bos_id) - want
    # One is taken away: its tokens are no longer trained on.
    (folder / "text" / "shard_00000.parquet").unlink()
    prepare(folder)
    assert [name for name, *_ in Manifest.read(str(train)).source["inputs"]] == [
        "shard_00001.parquet",
        "shard_00002.parquet",
    ]
    # A file that cannot be read is named, by the error that the library raises, not by a Ray traceback.
    (folder / "text" / "shard_00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"shard_00001\.parquet"):
        prepare(folder)


@pytest.mark.ray
def test_the_job_reports_storage_that_cannot_be_written(folder: Path, ray_cluster: Any) -> None:
    (folder / "blocked").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="blocked"):
        prepare(folder, tokens="blocked")


@pytest.mark.ray
def test_the_command(folder: Path) -> None:
    """The job as a process of its own that starts Ray itself."""
    from jobs.runtime import cli

    given = {
        "base_dir": str(folder),
        "data_dir": str(folder / "text"),
        "vocab_size": 300,
        "max_seq_len": 64,
        "tier": "cpu",
    }
    flags = [f"--{key}={value}" for key, value in given.items()]
    where = cli.paths(cli.resolve(given))
    shutil.copytree(folder / "tokenizer", where.tokenizer_dir)
    done = command("jobs/prepare_data.py", *flags)
    assert done.returncode == 0, done.stderr
    train, _ = prepare_data.token_dirs(cli.resolve(given))
    assert ShardSet.open(train).num_rows > 10
    assert "of the tokens kept" in done.stdout
    record = json.loads((Path(where.run_dir) / "stages" / "prepare_data.json").read_text())
    assert record["metrics"]["prepare_data/train_rows"] == ShardSet.open(train).num_rows


def test_the_command_as_a_module_and_with_a_wrong_flag(tmp_path: Path) -> None:
    done = command("-m", "jobs.prepare_data", f"--base_dir={tmp_path}", f"--data_dir={tmp_path}", "--tier=cpu")
    assert done.returncode == 1
    assert "jobs/tok_train.py" in done.stderr  # there is no tokenizer yet
    assert "Traceback" not in done.stderr
    done = command("jobs/prepare_data.py", "--seq_len=64")
    assert done.returncode == 2
    assert "--seq_len=64" in done.stderr


def command(*parts: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *parts], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
