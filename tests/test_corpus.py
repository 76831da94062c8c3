"""The embedded corpus: what goes in, the split, determinism, atomic writing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext.data import corpus, parquet
from megacontext.errors import DataError, StorageError

ROOT = Path(__file__).resolve().parents[1]
BODY = "".join(f"def function_{i}(value):\n    return value + {i}\n\n\n" for i in range(12))


def fake_library(root: Path, order: int = 1) -> Path:
    """A small standard library, written in either order."""
    files: dict[str, bytes] = {f"module_{i}.py": f'"""Module {i}."""\n\n{BODY}'.encode() for i in range(120)}
    files |= {
        "package/inner.py": ("import os\n\n" + BODY * 30).encode(),
        "windows.py": b"\xef\xbb\xbf" + ("# windows\n" + BODY).replace("\n", "\r\n").encode(),
        "twin_a.py": ("# the same text twice\n" + BODY).encode(),
        "twin_b.py": ("# the same text twice\n" + BODY).encode(),
        "notes.rst": b"Notes\n=====\n\n" + b"Some words about the library and its use.\n" * 5,
        "pydoc_data/topics.py": f"topics = {{'with': {'The with statement. ' * 9!r}, 'if': {'The if. ' * 20!r}}}\n".encode(),
        # all of these stay out
        "site-packages/pkg.py": BODY.encode(),
        "module/__pycache__/x.py": BODY.encode(),
        "_sysconfigdata__linux.py": ("build_time_vars = 1\n" + BODY).encode(),
        "sitecustomize.py": ("import machine\n" + BODY).encode(),
        "config-3.11/Setup.txt": BODY.encode(),
        "lib-dynload/x.txt": BODY.encode(),
        "latin.py": b"# caf\xe9\n" + BODY.encode(),
        "binary.txt": b"a\0b" + BODY.encode(),
        "short.py": b"x = 1\n",
        "numbers.txt": b"0.1234 5678 9012\n" * 30,
        "encodings/cp1.py": b"decoding_table = (\n" + b"    '\\x00'  #  NULL\n" * 20 + b")\n",
        "data.json": b'{"text": "words words words words words words words words words words words"}',
    }
    for name in sorted(files)[::order]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
    (root / "link.py").symlink_to(root / "module_1.py")
    return root


def read_all(folder: Path) -> tuple[list[str], list[str]]:
    train, val = parquet.split_parquet(parquet.list_parquet(str(folder)))
    texts = [[text for path in paths for group in parquet.read_texts(path) for text in group] for paths in (train, val)]
    return texts[0], texts[1]


def test_selection(tmp_path: Path) -> None:
    documents = list(corpus.read_documents(fake_library(tmp_path / "lib")))
    train, val, _ = corpus.build_documents(tmp_path / "lib")
    kept = train + val
    assert len(kept) == len(set(kept)), "no document twice"
    everything = "\n".join(kept)
    sources = {document.source for document in documents}
    assert {"package/inner.py", "notes.rst", "pydoc_data/topics.py/if", "pydoc_data/topics.py/with"} <= sources
    for name in (
        "site-packages",
        "__pycache__",
        "sysconfigdata",
        "customize",
        "Setup",
        "dynload",
        "json",
        "link",
        "cp1",
    ):
        assert not any(name in source for source in sources), name
    for text in ("\r", "\0", "\ufeff", "caf", "0.1234", "topics = "):
        assert text not in everything, text
    assert sum("the same text twice" in text for text in kept) == 1
    assert all(64 <= len(text) <= corpus.DOCUMENT_CHARS for text in kept)


def test_no_file_straddles_the_split(tmp_path: Path) -> None:
    root = fake_library(tmp_path / "lib")
    train, val, _ = corpus.build_documents(root)
    sides: dict[str, set[str]] = {}
    for document in corpus.read_documents(root):
        for side, texts in (("train", train), ("val", val)):
            if document.text in texts and "twin" not in document.source:
                sides.setdefault(document.source, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert {side for found in sides.values() for side in found} == {"train", "val"}


def test_share_of_validation() -> None:
    share = sum(corpus.is_validation(f"folder/file_{i}.py") for i in range(20_000)) / 20_000
    assert abs(share - corpus.VALIDATION_SHARE) < 0.01


def test_same_on_another_machine(tmp_path: Path) -> None:
    """Other folder, other creation order and times, other hash seed and locale: the same corpus, byte for byte."""
    fake_library(tmp_path / "lib")
    fake_library(tmp_path / "elsewhere" / "python", order=-1)
    os.utime(tmp_path / "lib" / "module_3.py", (0, 0))
    here = corpus.write_embedded_corpus(str(tmp_path / "a"), str(tmp_path / "lib"))
    script = "import sys; from megacontext.data import corpus; corpus.write_embedded_corpus(sys.argv[1], sys.argv[2])"
    env = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "b"), str(tmp_path / "elsewhere" / "python")], env=env, check=True
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert corpus.read_info(str(tmp_path / "b")) == here


def test_written_shards_and_info(tmp_path: Path) -> None:
    root = fake_library(tmp_path / "lib")
    info = corpus.write_embedded_corpus(str(tmp_path / "out"), str(root))
    train, val = read_all(tmp_path / "out")
    assert (train, val) == corpus.build_documents(root)[:2]
    assert (info.documents_train, info.documents_val) == (len(train), len(val))
    assert (info.chars_train, info.chars_val) == (sum(map(len, train)), sum(map(len, val)))
    assert len(info.shards) == corpus.TRAIN_SHARDS + 1
    rows = [parquet.count_rows(path) for path in parquet.list_parquet(str(tmp_path / "out"))]
    assert max(rows[:-1]) - min(rows[:-1]) <= 1, "even shards, so that they can be worked on in parallel"


def test_complete_corpus_is_left_alone(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    info = corpus.write_embedded_corpus(out, str(fake_library(tmp_path / "lib")))
    before = {p.name: p.stat().st_mtime_ns for p in Path(out).iterdir()}
    assert corpus.write_embedded_corpus(out, "/nonexistent") == info
    assert {p.name: p.stat().st_mtime_ns for p in Path(out).iterdir()} == before


@pytest.mark.parametrize("damage", ["interrupted", "other python", "shard lost", "half info", "old format"])
def test_incomplete_corpus_is_made_again(tmp_path: Path, damage: str) -> None:
    out, lib = tmp_path / "out", str(fake_library(tmp_path / "lib"))
    info = corpus.write_embedded_corpus(str(out), lib)
    path = out / corpus.INFO_NAME
    value = json.loads(path.read_text())
    if damage == "interrupted":
        path.write_text(json.dumps({"format": 1, "complete": False}))
        (out / info.shards[3]).unlink()
    elif damage == "other python":
        path.write_text(json.dumps({**value, "python": "cpython-2.7.18"}))
        shutil.copy(out / info.shards[0], out / "shard_00042.parquet")  # the other corpus had more shards
    elif damage == "shard lost":
        (out / info.shards[0]).unlink()
    elif damage == "half info":
        path.write_text(path.read_text()[:50])
    else:
        path.write_text(json.dumps({**value, "format": 0}))
    assert corpus.read_info(str(out)) is None
    assert corpus.write_embedded_corpus(str(out), lib) == info
    assert [Path(p).name for p in parquet.list_parquet(str(out))] == list(info.shards)


def test_a_shard_that_was_changed_is_named_and_kept(tmp_path: Path) -> None:
    out, lib = tmp_path / "out", str(fake_library(tmp_path / "lib"))
    info = corpus.write_embedded_corpus(str(out), lib)
    changed = out / info.shards[2]
    data = changed.read_bytes()
    changed.write_bytes(parquet.encode_texts(["mine"]))
    with pytest.raises(DataError, match=r"shard_00002\.parquet' is not the file that was written there.*--data_dir"):
        corpus.write_embedded_corpus(str(out), lib)
    assert parquet.count_rows(str(changed)) == 1
    changed.write_bytes(data)
    assert corpus.write_embedded_corpus(str(out), lib) == info


def test_write_that_dies_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, lib = str(tmp_path / "out"), str(fake_library(tmp_path / "lib"))
    plain = parquet.encode_texts
    calls: list[int] = []

    def dies(texts: list[str]) -> bytes:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(texts)

    monkeypatch.setattr(parquet, "encode_texts", dies)
    with pytest.raises(KeyboardInterrupt):
        corpus.write_embedded_corpus(out, lib)
    assert corpus.read_info(out) is None
    monkeypatch.undo()
    info = corpus.write_embedded_corpus(out, lib)
    assert corpus.read_info(out) == info


def test_shards_of_somebody_else_are_safe(tmp_path: Path) -> None:
    (tmp_path / "shard_00000.parquet").write_bytes(parquet.encode_texts(["mine"]))
    with pytest.raises(DataError, match="not the embedded corpus"):
        corpus.write_embedded_corpus(str(tmp_path), str(fake_library(tmp_path / "lib")))
    assert parquet.count_rows(str(tmp_path / "shard_00000.parquet")) == 1


def test_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="use --data_dir"):
        corpus.write_embedded_corpus(str(tmp_path / "out"), str(tmp_path))


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot"):
        corpus.write_embedded_corpus(str(tmp_path / "file" / "out"), str(fake_library(tmp_path / "lib")))


def test_memory_uri(tmp_path: Path) -> None:
    lib = str(fake_library(tmp_path / "lib"))
    info = corpus.write_embedded_corpus("memory://corpus-test", lib)
    assert corpus.read_info("memory://corpus-test") == info
    assert len(parquet.list_parquet("memory://corpus-test")) == len(info.shards)


@given(st.text(alphabet="ab \n#)", max_size=400), st.integers(1, 60))
def test_pieces_join_to_the_text(text: str, limit: int) -> None:
    pieces = corpus.split_text(text, limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert all(len(piece) > limit // 2 for piece in pieces[:-1])


def test_pieces_end_at_definitions() -> None:
    pieces = corpus.split_text("import os\n\n\n" + BODY * 40)
    assert len(pieces) > 2
    assert all(piece.startswith("def ") for piece in pieces[1:])
    lines = corpus.split_text("a line of words\n" * 1000)
    assert all(piece.endswith("words\n") for piece in lines)
    assert corpus.split_text("x" * 13_000) == ["x" * 6000, "x" * 6000, "x" * 1000]


def test_real_library(tmp_path: Path) -> None:
    """The Python that runs the tests: enough text of both kinds, in a size that a small machine takes."""
    info = corpus.write_embedded_corpus(str(tmp_path))
    assert 4e6 < info.chars_train < 80e6
    assert 0.01 < info.chars_val / info.chars_train < 0.12
    train, val = read_all(tmp_path)
    assert any('The "with" statement' in text or "The ``with`` statement" in text for text in train + val)
    assert any("class TextWrapper" in text for text in train + val)
    assert not set(train) & set(val)
    assert str(Path.home()) not in "".join(train[:200])
