"""tok_train and tok_eval: what they record, when they start over, and that nothing is fetched."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st

from jobs import tok_eval
from jobs.tok_train import capped, known_shards, train_tokenizer
from megacontext.config import DataConfig
from megacontext.data import parquet
from megacontext.data.identity import identify
from megacontext.data.tokenizer import Tokenizer

WORDS = ["the", "harbour", "def", "return", "count", "naïve", "12", "345", "x**2", "ein", "möwe"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 200)) for _ in range(20)]


def shard_folder(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    for index, part in enumerate([texts[:8], texts[8:16], texts[16:]]):
        (folder / f"shard_{index:05d}.parquet").write_bytes(parquet.encode_texts(part))
    return str(folder)


def test_tok_train_job(texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir, out = shard_folder(tmp_path / "data", texts), str(tmp_path / "tok")
    config = DataConfig(vocab_size=290, tok_doc_cap=500)
    metrics = train_tokenizer(config, data_dir, out)
    assert metrics["tok_train/vocab_size"] == 290
    assert metrics["tok_train/documents"] == 16, "the validation shard is not read"
    assert metrics["tok_train/chars"] == sum(min(500, len(text)) for text in texts[:16])
    assert Tokenizer.load(out).digest == Tokenizer.train([text[:500] for text in texts[:16]], 290).digest
    before = Path(out, "tokenizer.pkl").stat().st_mtime_ns
    assert train_tokenizer(config, data_dir, out) == metrics
    assert "complete, skipped" in capsys.readouterr().out
    assert Path(out, "tokenizer.pkl").stat().st_mtime_ns == before
    sizes = Path(out, "token_bytes.pt").read_bytes()
    Path(out, "token_bytes.pt").unlink()
    assert train_tokenizer(config, data_dir, out) == metrics
    assert "had no token_bytes.pt; it is made again" in capsys.readouterr().out
    assert Path(out, "token_bytes.pt").read_bytes() == sizes
    assert train_tokenizer(DataConfig(vocab_size=280, tok_doc_cap=500), data_dir, out)["tok_train/vocab_size"] == 280
    assert "vocab_size changed" in capsys.readouterr().out
    Path(out, "tokenizer.pkl").write_bytes(b"broken")
    train_tokenizer(DataConfig(vocab_size=280, tok_doc_cap=500), data_dir, out)
    assert "is not a tokenizer" in capsys.readouterr().out
    assert Tokenizer.load(out).vocab_size == 280


def test_a_tokenizer_is_made_again_when_its_text_changed(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir, out = shard_folder(tmp_path / "data", texts), str(tmp_path / "tok")
    shard = Path(data_dir, "shard_00000.parquet")
    config = DataConfig(vocab_size=290)

    def write(documents: list[str]) -> None:
        pq.write_table(
            pa.table({"text": documents}), shard, compression="none", use_dictionary=False, write_statistics=False
        )

    write(texts[:8])
    size = shard.stat().st_size
    digest = train_tokenizer(config, data_dir, out)["tok_train/digest"]
    write([text[::-1] for text in texts[:8]])
    assert shard.stat().st_size == size
    assert train_tokenizer(config, data_dir, out)["tok_train/digest"] != digest
    assert "shards_digest changed" in capsys.readouterr().out
    write([text[::-1] for text in texts[:8]])  # the same content written again
    train_tokenizer(config, data_dir, out)
    assert "complete, skipped" in capsys.readouterr().out
    assert known_shards(out)[0] == identify(str(shard))


@given(st.lists(st.text(max_size=30), max_size=10), st.integers(1, 100), st.integers(1, 20))
def test_capped_texts(texts: list[str], max_chars: int, doc_cap: int) -> None:
    got = list(capped(texts, max_chars, doc_cap))
    assert sum(map(len, got)) == min(max_chars, sum(min(doc_cap, len(text)) for text in texts))
    assert all(text.startswith(piece) and len(piece) <= doc_cap for piece, text in zip(got, texts, strict=False))


def test_tok_eval_job_never_downloads(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: pytest.fail(f"tried to fetch {path}"))
    for url, _ in (file for baseline in tok_eval.BASELINES for file in baseline.files):
        (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"damaged")  # tiktoken would fetch it again
    tokenizer = Tokenizer.train(texts, 300)
    tokenizer.save(str(tmp_path / "tok"))
    data_dir = shard_folder(tmp_path / "data", texts)
    metrics = tok_eval.evaluate_tokenizer(data_dir, str(tmp_path / "tok"))
    out = capsys.readouterr().out
    assert "comparison with gpt2 skipped" in out
    assert "comparison with gpt4 skipped" in out
    names = {*tok_eval.SAMPLES, "train", "val"}
    assert set(metrics) == {f"tok_eval/{name}_bytes_per_token" for name in names}
    val = texts[16:]
    plain = sum(len(t.encode()) for t in val) / sum(len(tokenizer.encoding.encode_ordinary(t)) for t in val)
    assert metrics["tok_eval/val_bytes_per_token"] == pytest.approx(plain)

    monkeypatch.setattr(tok_eval, "is_cached", lambda url, sha256: "cl100k" in url)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer.encoding)
    metrics = tok_eval.evaluate_tokenizer(data_dir, str(tmp_path / "tok"))
    assert metrics["tok_eval/gpt4_val_bytes_per_token"] == metrics["tok_eval/val_bytes_per_token"]
    assert "tok_eval/gpt2_val_bytes_per_token" not in metrics
