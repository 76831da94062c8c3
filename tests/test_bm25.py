"""BM25 over blocks against the formula, written out."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.eval.bm25 import best_blocks, bm25_scores


def written_out(ids: list[int], query: list[int], r: int) -> list[float]:
    blocks = [ids[start : start + r] for start in range(0, len(ids) - r + 1, r)]
    mean_length = r
    scores = []
    for block in blocks:
        score = 0.0
        for word in set(query):
            n = sum(word in other for other in blocks)
            idf = math.log((len(blocks) - n + 0.5) / (n + 0.5) + 1)
            f = block.count(word)
            score += idf * f * (1.2 + 1) / (f + 1.2 * (1 - 0.75 + 0.75 * len(block) / mean_length))
        scores.append(score)
    return scores


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 9), max_size=70),
    query=st.lists(st.integers(0, 12), max_size=6),
    block_size=st.integers(2, 8),
)
def test_scores_are_those_of_the_formula(ids: list[int], query: list[int], block_size: int) -> None:
    scores = bm25_scores(np.array(ids, np.int64), np.array(query, np.int64), block_size)
    assert np.allclose(scores, written_out(ids, query, block_size))
    order = best_blocks(scores).tolist()
    assert order == sorted((n for n in range(len(scores)) if scores[n] > 0), key=lambda n: (-scores[n], -n))


def test_rare_words_count_more_and_the_newest_of_equals_comes_first() -> None:
    ids = np.array([1, 1, 2, 9, 1, 3, 1, 8, 1, 3, 9, 9])
    scores = bm25_scores(ids, np.array([1, 2]), 2)
    assert best_blocks(scores)[0] == 1
    assert best_blocks(bm25_scores(ids, np.array([3]), 2)).tolist() == [4, 2]
    assert best_blocks(bm25_scores(ids, np.array([77]), 2)).tolist() == []
