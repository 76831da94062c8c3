"""Unigram and bigram models of the same tokens: the floor a trained model has to beat.

The bigram is interpolated modified Kneser-Ney (Chen and Goodman 1999): three discounts, estimated from the counts of
counts, and a backoff to how many different tokens a token follows. It is a strong bigram on purpose, with nothing to tune.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megacontext.errors import DataError
from megacontext.eval.bpb import BpbResult, split_row

if TYPE_CHECKING:
    from megacontext.data.shards import ShardSet

TRAIN_TOKENS = 1 << 25
CHUNK_TOKENS = 1 << 22
UNIGRAM_PRIOR = 0.5


@dataclass(frozen=True)
class PairCounts:
    """Sparse bigram counts: sorted keys `context * vocab_size + token` and how often each was seen."""

    vocab_size: int
    keys: np.ndarray  # [P] int64, sorted, unique
    counts: np.ndarray  # [P] int64
    tokens: np.ndarray  # [V] int64: how often each token was a target

    @property
    def total(self) -> int:
        return int(self.tokens.sum())


@dataclass(frozen=True)
class NgramResult:
    """Both baselines on the same targets, and how much text they were fitted to."""

    unigram: BpbResult
    bigram: BpbResult
    train_tokens: int


def count_pairs(chunks: Iterator[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> PairCounts:
    """Count (context, target) pairs of equally shaped integer arrays; targets of -1 do not count.

    Memory is that of the distinct pairs plus one chunk. Raises DataError when nothing is counted.
    """
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    tokens = np.zeros(vocab_size, np.int64)
    for contexts, targets in chunks:
        keep = targets >= 0
        kept = targets[keep].astype(np.int64)
        tokens += np.bincount(kept, minlength=vocab_size)
        new_keys, new_counts = np.unique(contexts[keep].astype(np.int64) * vocab_size + kept, return_counts=True)
        keys, counts = _merge(keys, counts, new_keys, new_counts)
    if not len(keys):
        raise DataError("no training tokens to count; the n-gram baselines need at least one row.")
    return PairCounts(vocab_size, keys, counts, tokens)


def _merge(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add two sorted sparse counts."""
    every = np.concatenate([keys, more_keys])
    order = np.argsort(every, kind="stable")
    every = every[order]
    starts = np.flatnonzero(np.diff(every, prepend=-1))
    if not len(starts):
        return every, counts
    return every[starts], np.add.reduceat(np.concatenate([counts, more_counts])[order], starts)


class Unigram:
    """P(token) = (count + 1/2) / (total + V/2), so that no token is impossible."""

    def __init__(self, pairs: PairCounts) -> None:
        self.probabilities = _smooth(pairs.tokens)  # [V] float64

    def log_prob(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural log P(target), any shape; contexts are not looked at."""
        return np.asarray(np.log(self.probabilities[targets]))


class Bigram:
    """P(w | v) = (c(v,w) - D(c)) / c(v) + backoff(v) * P_continuation(w), interpolated modified Kneser-Ney.

    P_continuation(w) is the share of distinct pairs that end in w. Contexts never seen use it alone.
    """

    def __init__(self, pairs: PairCounts) -> None:
        self.pairs = pairs
        contexts, tokens = np.divmod(pairs.keys, pairs.vocab_size)
        discount = np.asarray(discounts(pairs.counts))  # [4], by min(count, 3)
        taken = discount[np.minimum(pairs.counts, 3)]  # [P]
        seen = np.bincount(contexts, weights=pairs.counts, minlength=pairs.vocab_size)  # [V] c(v)
        freed = np.bincount(contexts, weights=taken, minlength=pairs.vocab_size)  # [V]
        self.backoff = np.divide(freed, seen, out=np.ones_like(freed), where=seen > 0)  # [V]
        self.direct = (pairs.counts - taken) / seen[contexts]  # [P]
        self.continuation = _smooth(np.bincount(tokens, minlength=pairs.vocab_size))  # [V]

    def log_prob(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural log P(target | context) of equally shaped arrays of ids."""
        keys = contexts.astype(np.int64) * self.pairs.vocab_size + targets
        at = np.minimum(np.searchsorted(self.pairs.keys, keys), len(self.pairs.keys) - 1)
        direct = np.where(self.pairs.keys[at] == keys, self.direct[at], 0.0)
        return np.asarray(np.log(direct + self.backoff[contexts] * self.continuation[targets]))


def discounts(counts: np.ndarray) -> tuple[float, float, float, float]:
    """Discounts for counts of 0, 1, 2 and 3 or more: D_c = c - (c+1) * Y * n_{c+1} / n_c with Y = n_1 / (n_1 + 2 n_2).

    n_c is how many pairs were seen c times. Where too few pairs were seen for the estimate to lie in [0, c], the
    discount is c/2.
    """
    n = [0, *(int((counts == c).sum()) for c in (1, 2, 3, 4))]
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0
    out = [0.0]
    for c in (1, 2, 3):
        estimate = c - (c + 1) * y * n[c + 1] / n[c] if n[c] and y else -1.0
        out.append(estimate if 0.0 < estimate < c else c / 2)
    return out[0], out[1], out[2], out[3]


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Counts [V] -> probabilities [V] with half a count added to each."""
    padded = counts + UNIGRAM_PRIOR
    return np.asarray(padded / padded.sum())


def evaluate_ngrams(
    train: ShardSet,
    val: ShardSet,
    val_rows: np.ndarray,
    token_bytes: np.ndarray,
    max_train_tokens: int = TRAIN_TOKENS,
) -> NgramResult:
    """Fit both baselines on training rows and score the targets of `val_rows`: what the model is scored on.

    At most `max_train_tokens` tokens are counted, in rows spread evenly over the training set. token_bytes [V] has the
    bytes per id; targets without bytes are left out, as in `evaluate_bpb`.
    """
    target_tokens = train.row_tokens - 1
    wanted = min(train.num_rows, max(1, max_train_tokens // target_tokens))
    rows = np.unique(np.linspace(0, train.num_rows - 1, wanted).astype(np.int64))
    pairs = count_pairs(_chunks(train, rows), len(token_bytes))
    unigram, bigram = Unigram(pairs), Bigram(pairs)
    unigram_sum = bigram_sum = BpbResult(0.0, 0, 0)
    for contexts, targets in _chunks(val, val_rows):
        unigram_sum += score(unigram, contexts, targets, token_bytes)
        bigram_sum += score(bigram, contexts, targets, token_bytes)
    return NgramResult(unigram_sum, bigram_sum, pairs.total)


def score(model: Unigram | Bigram, contexts: np.ndarray, targets: np.ndarray, token_bytes: np.ndarray) -> BpbResult:
    """Nats, bytes and tokens of the targets that have bytes (contexts and targets of one shape, -1 ignored)."""
    sizes = np.where(targets >= 0, token_bytes[np.maximum(targets, 0)], 0)
    keep = sizes > 0
    nats = -model.log_prob(contexts[keep], targets[keep]).sum()
    if not math.isfinite(nats):
        raise DataError("an n-gram baseline gave a target probability 0; the validation ids do not fit the vocabulary.")
    return BpbResult(float(nats), int(sizes.sum()), int(keep.sum()))


def _chunks(shards: ShardSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = max(1, CHUNK_TOKENS // shards.row_tokens)
    for start in range(0, len(rows), step):
        yield split_row(shards.read(rows[start : start + step]))
