"""Windows over documents: true continuations, no overlap, even shares, any file kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import make_tokenizer

from megacontext.data.parquet import encode_texts
from megacontext.data.recall import RecallItem, RecallQuestion
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError, UserError
from megacontext.eval.windows import LongDocument, question_windows, read_long_documents, sample_windows

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "away", "from", "old", "house"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def text(words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.md").write_text("# beta")
    (tmp_path / "c.parquet").write_bytes(encode_texts(["gamma", "delta"]))
    (tmp_path / "d.py").write_text("not a document")
    found = read_long_documents(str(tmp_path))
    assert [(d.name, d.text) for d in found] == [
        ("a.txt", "alpha"), ("b.md", "# beta"), ("c.parquet:0", "gamma"), ("c.parquet:1", "delta"),
    ]  # fmt: skip
    assert [d.text for d in read_long_documents(str(tmp_path / "b.md"))] == ["# beta"]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"bad\.txt.*not UTF-8"):
        read_long_documents(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        read_long_documents(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        read_long_documents(str(tmp_path / "empty"))


def test_windows_are_the_text_and_do_not_overlap(tokenizer: Tokenizer) -> None:
    documents = [LongDocument(f"d{n}", text(words, n)) for n, words in enumerate((20, 3000, 300, 1000))]
    ids = [tokenizer.encode(document.text) for document in documents]
    windows = sample_windows(documents, tokenizer, history=65, horizon=8, count=30, seed=1)
    assert len(windows) == 30
    assert windows.history_tokens == 65
    spans = set()
    for k in range(30):
        whole = [*windows.history(k)[1:].tolist(), *windows.continuation(k).tolist()]
        assert windows.history(k)[0] == tokenizer.bos_id
        source = ids[[d.name for d in documents].index(windows.names[windows.document[k]])]
        places = [at for at in range(0, len(source), 8) if source[at : at + 72] == whole]
        assert places
        spans.add((int(windows.document[k]), tuple(whole)))
    assert len(spans) == 30
    counts = np.bincount(windows.document)
    assert counts[counts > 0].max() - counts[counts > 0].min() <= 1  # no document is short of room here
    assert np.array_equal(sample_windows(documents, tokenizer, 65, 8, 30, 1).ids, windows.ids)
    assert not np.array_equal(sample_windows(documents, tokenizer, 65, 8, 30, 2).ids, windows.ids)


def test_shorter_histories_end_at_the_same_token(tokenizer: Tokenizer) -> None:
    windows = sample_windows([LongDocument("d", text(2000, 0))], tokenizer, history=129, horizon=16, count=4)
    long, short = windows.history(2), windows.history(2, 33)
    assert len(short) == 33
    assert short[0] == tokenizer.bos_id
    assert np.array_equal(short[1:], long[-32:])
    with pytest.raises(UserError, match="sampled for 129"):
        windows.history(0, 130)


def test_a_short_document_gives_what_it_has_and_others_the_rest(tokenizer: Tokenizer) -> None:
    short, long = LongDocument("short", text(60, 1)), LongDocument("long", text(2000, 2))
    room = (len(tokenizer.encode(short.text)) - 32) // 8
    windows = sample_windows([short, long], tokenizer, 33, 8, 2 * room + 20)
    assert np.bincount(windows.document).tolist() == [room, room + 20]


def test_too_little_text_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"1 documents hold \d+ windows of 129 \+ 16 tokens, not 1000"):
        sample_windows([LongDocument("d", text(500, 0))], tokenizer, 129, 16, 1000)
    with pytest.raises(DataError, match="hold 0 windows"):
        sample_windows([LongDocument("d", "too short")], tokenizer, 129, 16, 1)
    with pytest.raises(UserError, match="horizon 0"):
        sample_windows([], tokenizer, 129, 0, 1)


def test_questions_are_windows_that_end_with_the_question() -> None:
    def question(number: int) -> RecallQuestion:
        return RecallQuestion(np.array([7, number, number]), np.array([10 + number]), (4,), 20)

    items = [RecallItem(np.arange(20) + n, tuple(question(k) for k in range(n + 1))) for n in range(2)]
    windows = question_windows(items, bos=99)
    assert (len(windows), windows.horizon, windows.history_tokens) == (3, 1, 23)
    assert windows.document.tolist() == [0, 1, 1]
    assert windows.history(2).tolist() == [99, *range(2, 21), 7, 1, 1]
    assert windows.continuation(2).tolist() == [11]
    with pytest.raises(UserError, match="no questions"):
        question_windows([RecallItem(np.arange(20), ())], bos=99)
