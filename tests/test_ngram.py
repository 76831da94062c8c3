"""N-gram baselines against dictionaries, and against what probability means."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bpb import FakeShards

from megacontext.errors import DataError
from megacontext.eval import ngram
from megacontext.eval.ngram import Bigram, Unigram, count_pairs, discounts, evaluate_ngrams

VOCAB = 7
ROWS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=6, max_size=6), min_size=1, max_size=12)


def pairs_of(rows: list[list[int]]) -> list[tuple[int, int]]:
    return [pair for row in rows for pair in itertools.pairwise(row)]


class DictionaryBigram:
    """The same formulas in dictionaries, one token at a time."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.count = Counter(pairs_of(rows))
        self.context = Counter(v for v, _ in pairs_of(rows))
        self.unigram = Counter(w for _, w in pairs_of(rows))
        self.follows = Counter(w for _, w in self.count)
        n = Counter(self.count.values())
        y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0
        self.discount = {}
        for c in (1, 2, 3):
            d = c - (c + 1) * y * n[c + 1] / n[c] if n[c] and y else -1
            self.discount[c] = d if 0 < d < c else c / 2

    def probability(self, v: int, w: int) -> float:
        continuation = (self.follows[w] + 0.5) / (len(self.count) + 0.5 * VOCAB)
        if not self.context[v]:
            return continuation
        taken = {pair: self.discount[min(c, 3)] for pair, c in self.count.items() if pair[0] == v}
        direct = max(self.count[v, w] - taken.get((v, w), 0), 0) / self.context[v]
        return direct + sum(taken.values()) / self.context[v] * continuation

    def unigram_probability(self, w: int) -> float:
        return (self.unigram[w] + 0.5) / (sum(self.unigram.values()) + 0.5 * VOCAB)


def fit(rows: list[list[int]], parts: int = 1) -> ngram.PairCounts:
    ids = np.array(rows)
    return count_pairs(((part[:, :-1], part[:, 1:]) for part in np.array_split(ids, parts) if len(part)), VOCAB)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, parts=st.integers(1, 4))
def test_equals_dictionaries_and_sums_to_one(rows: list[list[int]], parts: int) -> None:
    pairs, oracle = fit(rows, parts), DictionaryBigram(rows)
    assert dict(zip(pairs.keys.tolist(), pairs.counts.tolist(), strict=True)) == {
        v * VOCAB + w: count for (v, w), count in oracle.count.items()
    }
    unigram, bigram = Unigram(pairs), Bigram(pairs)
    v, w = np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), indexing="ij")
    found = np.exp(bigram.log_prob(v, w))
    assert np.allclose(found.sum(axis=1), 1)
    assert np.allclose(np.exp(unigram.log_prob(v, w)).sum(axis=1), 1)
    for context in range(VOCAB):
        for token in range(VOCAB):
            assert found[context, token] == pytest.approx(oracle.probability(context, token))
            assert unigram.probabilities[token] == pytest.approx(oracle.unigram_probability(token))


def test_discounts_of_a_worked_example() -> None:
    # n1 = 4, n2 = 2, n3 = 1, n4 = 1: Y = 4/8; D1 = 1 - 2*.5*2/4, D2 = 2 - 3*.5*1/2, D3 = 3 - 4*.5*1/1
    assert discounts(np.array([1, 1, 1, 1, 2, 2, 3, 4])) == (0.0, 0.5, 1.25, 1.0)
    assert discounts(np.array([5, 6])) == (0.0, 0.5, 1.0, 1.5)  # nothing to estimate from


def test_ignored_targets_do_not_count() -> None:
    contexts, targets = np.array([[1, 2, 3]]), np.array([[2, -1, 4]])
    pairs = count_pairs(iter([(contexts, targets)]), VOCAB)
    assert pairs.keys.tolist() == [1 * VOCAB + 2, 3 * VOCAB + 4]
    assert pairs.total == 2


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="no training tokens"):
        count_pairs(iter([]), VOCAB)


def markov_rows(rows: int, seed: int, vocab: int = 50) -> np.ndarray:
    """Rows of a chain in which each token has three likely successors."""
    rng = np.random.default_rng(seed)
    successors = np.random.default_rng(0).integers(0, vocab, (vocab, 3))
    ids = np.empty((rows, 65), np.uint16)
    ids[:, 0] = rng.integers(0, vocab, rows)
    for at in range(1, 65):
        ids[:, at] = successors[ids[:, at - 1], rng.integers(0, 3, rows)]
    return ids


def test_bits_per_byte_of_a_chain_with_known_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "CHUNK_TOKENS", 1000)  # many chunks
    token_bytes = np.full(50, 2)
    token_bytes[:3] = 0
    train, val = FakeShards(markov_rows(600, 1)), FakeShards(markov_rows(50, 2))
    rows = np.arange(40)
    result = evaluate_ngrams(train, val, rows, token_bytes)
    targets = val.ids[rows][:, 1:]
    counted = int((targets >= 3).sum())
    for each in (result.unigram, result.bigram):
        assert (each.tokens, each.bytes) == (counted, 2 * counted)
    assert result.train_tokens == 600 * 64
    assert result.bigram.loss == pytest.approx(math.log(3), abs=0.1)  # the entropy of the chain
    assert result.unigram.loss > 3
    count = Counter(train.ids[:, 1:].ravel().tolist())
    by_hand = sum(-math.log((count[w] + 0.5) / (600 * 64 + 25)) for w in targets.ravel().tolist() if token_bytes[w])
    assert result.unigram.nats == pytest.approx(by_hand)


def test_training_tokens_are_bounded_and_spread() -> None:
    train, val = FakeShards(markov_rows(100, 1)), FakeShards(markov_rows(5, 2))
    read: list[int] = []
    original = train.read
    train.read = lambda rows: (read.extend(rows.tolist()), original(rows))[1]  # type: ignore[method-assign]
    result = evaluate_ngrams(train, val, np.arange(5), np.ones(50, np.int32), max_train_tokens=10 * 64)
    assert result.train_tokens == 640
    assert read == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_large_vocabularies_do_not_overflow() -> None:
    vocab = 65536
    ids = np.array([[65535, 65534, 65535, 65534, 3]], np.uint16)
    pairs = count_pairs(iter([(ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64))]), vocab)
    assert pairs.keys.tolist() == [65534 * vocab + 3, 65534 * vocab + 65535, 65535 * vocab + 65534]
    assert pairs.counts.tolist() == [1, 1, 2]
