"""Recall tasks: a plain reader of the text must agree with every answer and every place that the generators claim."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.data.recall import TASKS, RecallItem, RecallRows, recall_items, recall_rows
from megacontext.data.recall_words import WordList
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import UserError

WORDS = WordList.from_ids(np.arange(300, 900), bos=7)
TEXT = np.random.default_rng(0).integers(0, 1000, 5000)  # words of the tasks and of their grammar among it


class Reader:
    """Reads a text token by token, and knows the facts so far: (first token, words of the key, what it says)."""

    def __init__(self, ids: np.ndarray, words: WordList) -> None:
        self.facts: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
        self.asked: list[tuple[int, ...]] = []
        ids = list(map(int, ids))
        for at, word in enumerate(ids):
            key = tuple(ids[at + 1 : at + 3])
            if word == words.ask:
                self.asked.append(key)
            if word == words.tell:
                end = next(n for n in range(at + 4, at + 6) if ids[n] == words.end)
                self.facts.append((at, key, tuple(ids[at + 3 : end])))

    def answer(self, key: tuple[int, ...]) -> tuple[int, list[int]]:
        """The value of a key, through links, and the first tokens of the facts that it takes, oldest first."""
        start, said = [(start, said) for start, known, said in self.facts if known == key][-1]
        if len(said) == 1:
            return said[0], [start]
        value, starts = self.answer(said)
        return value, [*starts, start]


def check_item(item: RecallItem, words: WordList, block_size: int, recent: int) -> Reader:
    reader = Reader(item.ids, words)
    for question in item.questions:
        assert question.ids[0] == words.ask
        assert len(question.ids) == 3
        value, starts = reader.answer(tuple(question.ids[1:3].tolist()))
        assert question.answer.tolist() == [value]
        assert list(question.evidence) == starts
        assert question.distance == len(item.ids) - starts[0]
    for start, key, said in reader.facts:
        end = start + 3 + len(said)
        assert start // block_size == end // block_size > 0
        assert end < len(item.ids) - recent
        assert {*key} <= {*words.keys.tolist()}
    assert len({tuple(question.ids.tolist()) for question in item.questions}) == len(item.questions)
    assert item.ids[0] == words.bos
    return reader


@settings(max_examples=60, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    seed=st.integers(0, 1 << 30),
    block_size=st.sampled_from([6, 8, 32]),
    blocks=st.integers(16, 60),
    ragged=st.integers(0, 40),
    recent=st.integers(0, 40),
    text=st.booleans(),
)
def test_a_reader_agrees(
    task: str, seed: int, block_size: int, blocks: int, ragged: int, recent: int, text: bool
) -> None:
    tokens = (blocks + 1) * block_size + ragged + recent
    (item,) = recall_items(
        task, WORDS, tokens, 1, seed, block_size=block_size, recent_tokens=recent, pairs=11, questions=2,
        haystack=TEXT if text else None,
    )  # fmt: skip
    assert item.ids.shape == (tokens,)
    assert len(item.questions) == 2
    reader = check_item(item, WORDS, block_size, recent)
    per_block = np.bincount([start // block_size for start, _, _ in reader.facts], minlength=1)
    keys = [key for _, key, _ in reader.facts]
    if task == "niah":
        assert len(keys) == 2
    elif task == "mqar":
        assert len(keys) == 11
        assert per_block.max() == 1
    else:
        filled = np.flatnonzero(per_block)
        assert set(np.diff(filled)) == {2}
        assert filled[0] in (1, 2)
        assert len(filled) == (tokens - recent - block_size) // block_size // 2
        assert set(per_block[filled]) == {block_size // 5 if task == "phonebook" else 1}
    for question in item.questions:
        said = [what for _, key, what in reader.facts if key == tuple(question.ids[1:3].tolist())]
        assert len(said) == (3 if task == "update" else 1)
        assert said[-1] not in said[:-1]
        assert len(question.evidence) == (3 if task == "vt" else 1)
    if task != "update":
        assert len(set(keys)) == len(keys)


def test_text_goes_on_where_it_was_cut() -> None:
    clean = np.arange(1000, 1700)
    (item,) = recall_items("niah", WORDS, 2000, 1, 3, haystack=clean)
    text = np.delete(np.arange(2000), [0, *range(item.questions[0].evidence[0], item.questions[0].evidence[0] + 5)])
    assert (item.ids[text] == clean[(item.ids[1] - 1000 + text - 1) % 700]).all()


def test_an_item_does_not_depend_on_the_others() -> None:
    three = list(recall_items("mk_niah", WORDS, 900, 3, 5))
    seven = list(recall_items("mk_niah", WORDS, 900, 7, 5))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(three, seven, strict=False))
    assert not np.array_equal(three[0].ids, three[1].ids)
    assert not np.array_equal(three[0].ids, next(iter(recall_items("mk_niah", WORDS, 900, 1, 6))).ids)


def check_rows(rows: RecallRows, words: WordList, block_size: int, again: bool = False) -> None:
    for ids, answers, positions, blocks, earlier in zip(
        rows.ids, rows.answers, rows.question_position, rows.evidence_block, rows.earlier_block, strict=True
    ):
        there = positions >= 0
        assert (blocks[there] > 0).all()
        assert (blocks[~there] == -1).all()
        assert (earlier[~there] == -1).all()
        assert np.array_equal(np.sort(positions[there] + 1), np.flatnonzero(answers))
        assert answers[-1]
        for position, block, before in zip(positions[there], blocks[there], earlier[there], strict=True):
            reader = Reader(ids[: position + 1], words)
            key = tuple(ids[position - 1 : position + 1].tolist())
            value, starts = reader.answer(key)
            assert ids[position + 1] == value
            assert starts[-1] // block_size == block
            told = [start // block_size for start, known, _ in reader.facts if known == key]
            assert [*(known for known in before if known >= 0), block] == told
            assert (block + 1) * block_size <= position - 2
        reader = Reader(ids, words)
        assert len(reader.asked) == there.sum()
        assert again or len(set(reader.asked)) == len(reader.asked)
        assert all(s // block_size == (s + 3 + len(said)) // block_size for s, _, said in reader.facts)
        assert ids[0] == words.bos


@settings(max_examples=40, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    seed=st.integers(0, 1 << 30),
    block_size=st.sampled_from([6, 8, 32]),
    blocks=st.integers(6, 40),
    ragged=st.integers(0, 20),
    questions=st.integers(1, 8),
    interleaved=st.integers(0, 5),
)
def test_rows_ask_what_they_told(
    task: str, seed: int, block_size: int, blocks: int, ragged: int, questions: int, interleaved: int
) -> None:
    tokens = blocks * block_size + ragged + questions * 4 + 24
    rows = recall_rows(
        np.random.default_rng(seed), WORDS, 3, tokens, block_size=block_size, haystack=TEXT, mix={task: 1},
        questions=questions, interleaved=interleaved,
    )  # fmt: skip
    check_rows(rows, WORDS, block_size)


@pytest.mark.parametrize("task", TASKS)
def test_long_rows_ask_many_questions_and_interleave_them(task: str) -> None:
    rows = recall_rows(np.random.default_rng(1), WORDS, 40, 1025, mix={task: 1})
    check_rows(rows, WORDS, 32)
    asked = (rows.question_position >= 0).sum(1)
    assert asked.min() >= 8
    assert asked.mean() >= 10
    early = rows.question_position[:, :4]
    assert (early >= 0).mean() > 0.9
    assert early.max() < 980 < rows.question_position[:, 4:].max()


@pytest.mark.parametrize("task", TASKS)
def test_facts_may_be_asked_for_again(task: str) -> None:
    rows = recall_rows(np.random.default_rng(2), WORDS, 20, 513, mix={task: 1}, questions=64, again=True)
    check_rows(rows, WORDS, 32, again=True)
    assert (rows.question_position >= 0).sum(1).min() >= 50


def test_rows_mix_tasks_and_follow_their_seed() -> None:
    def make(seed: int) -> RecallRows:
        return recall_rows(np.random.default_rng(seed), WORDS, 200, 513, mix={"niah": 3, "vt": 1})

    one, same, other = make(1), make(1), make(2)
    assert all(np.array_equal(a, b) for a, b in zip(one.__dict__.values(), same.__dict__.values(), strict=True))
    assert not np.array_equal(one.ids, other.ids)
    links = sum(any(len(said) == 2 for _, _, said in Reader(ids, WORDS).facts) for ids in one.ids)
    assert 30 <= links <= 70


@pytest.mark.parametrize("tokens", [97, 129, 161, 257])
def test_short_rows_have_the_tasks_that_fit(tokens: int) -> None:
    rows = recall_rows(np.random.default_rng(0), WORDS, 60, tokens)
    check_rows(rows, WORDS, 32)
    if tokens < 160:
        with pytest.raises(
            UserError, match=f"a row of {tokens} tokens has . blocks of 32 tokens for facts; vt needs 3"
        ):
            recall_rows(np.random.default_rng(0), WORDS, 60, tokens, mix={"vt": 1, "niah": 1})


def test_every_fact_is_as_likely_to_be_asked() -> None:
    """No place in a history and no value is favoured."""
    rows = recall_rows(np.random.default_rng(0), WORDS, 2000, 1025, mix={"mk_niah": 1}, interleaved=0)
    counts = np.bincount(rows.evidence_block.ravel(), minlength=31)[1:29]
    assert counts.min() > 0.8 * counts.mean()
    values = np.bincount(rows.ids[rows.answers], minlength=900)[WORDS.values]
    assert values.min() > 0.4 * values.mean()


def test_keys_of_evaluation_are_not_trained_on() -> None:
    rows = recall_rows(np.random.default_rng(0), WORDS, 300, 1025, mix={"phonebook": 1, "vt": 1})
    trained = {key for ids in rows.ids for _, key, _ in Reader(ids, WORDS).facts}
    held_out = {
        key for item in recall_items("phonebook", WORDS, 4096, 10, 0) for _, key, _ in Reader(item.ids, WORDS).facts
    }
    assert len(trained) > 10_000
    assert len(held_out) > 2_000
    assert not trained & held_out
    assert {word for key in trained for word in key} == {word for key in held_out for word in key}
    every = np.concatenate([WORDS.key_ids(np.arange(WORDS.num_keys), held_out=side) for side in (False, True)])
    assert len(np.unique(every, axis=0)) == 2 * WORDS.num_keys == len(WORDS.keys) ** 2


def test_words_of_a_tokenizer() -> None:
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(list("abcdefghij"), 4)) for _ in range(150)]
    text = " ".join(rng.choice(made, 20_000))
    tokenizer = Tokenizer.train([text + " The WORLD 12 (ab) x y"], 500)
    words = WordList.from_tokenizer(tokenizer)
    grammar = [words.ask, words.tell, words.end]
    every = [*words.keys.tolist(), *words.values.tolist(), *grammar]
    assert len(set(every)) == len(every)
    assert words.bos == tokenizer.bos_id
    for word in [*every, *words.filler.tolist()]:
        piece = tokenizer.decode_bytes([word])
        assert piece[:1] == b" "
        assert piece[1:].isalpha()
        assert piece[1:].islower()
        assert len(piece) >= 4
    assert not {*words.filler.tolist()} & {*grammar}
    assert len(words.keys) % 2 == 0
    assert len(WordList.from_tokenizer(tokenizer, max_words=40).keys) == 40
    small = Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 50], 290)
    with pytest.raises(UserError, match=r"has \d tokens that are whole words .* need 64"):
        WordList.from_tokenizer(small)


def test_what_has_no_room_is_refused() -> None:
    with pytest.raises(UserError, match="'needle' is unknown; choose one of niah"):
        recall_items("needle", WORDS, 1000, 1, 0)
    with pytest.raises(UserError, match="a history of 20 tokens has 0 blocks of 32 tokens for facts; niah needs 1"):
        recall_items("niah", WORDS, 20, 1, 0)
    with pytest.raises(UserError, match=r"has 9 blocks .* mqar needs 64"):
        recall_items("mqar", WORDS, 320, 1, 0)
    with pytest.raises(UserError, match="update needs 6"):
        recall_items("update", WORDS, 192, 1, 0)
    with pytest.raises(
        UserError, match="phonebook in a history of 1000000 tokens needs 93744 keys, and the vocabulary gives 32768"
    ):
        recall_items("phonebook", WORDS, 1_000_000, 1, 0)
    with pytest.raises(UserError, match="takes 5 tokens, which a block of 4 cannot hold"):
        recall_items("niah", WORDS, 100, 1, 0, block_size=4)
    with pytest.raises(UserError, match="the haystack is empty"):
        next(recall_items("niah", WORDS, 100, 1, 0, haystack=np.empty(0, np.int64)))
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="a row of 60 tokens has 0 blocks"):
        recall_rows(rng, WORDS, 1, 60)
    for mix in ({}, {"niah": 0.0}, {"niah": -1.0, "vt": 2.0}, {"needle": 1.0}):
        with pytest.raises(UserError, match="mix of recall tasks"):
            recall_rows(rng, WORDS, 1, 600, mix=mix)
