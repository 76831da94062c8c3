"""BM25 (Robertson and Zaragoza 2009) over blocks of token ids: the retrieval that a learned lens has to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

SATURATION = 1.2  # k1: how soon more of the same word stops counting


def bm25_scores(
    ids: npt.NDArray[np.integer], query: npt.NDArray[np.integer], block_size: int, saturation: float = SATURATION
) -> F64:
    """Scores [blocks] of the whole blocks of ids [N] for query ids [n]; higher is more alike, 0 shares no id.

    Each different id of the query counts once. All blocks are equally long, so BM25's length normalization is 1.
    """
    blocks = len(ids) // block_size
    table = np.asarray(ids)[: blocks * block_size].reshape(blocks, block_size)
    scores = np.zeros(blocks)
    for word in np.unique(query):
        seen = (table == word).sum(1)
        holding = int((seen > 0).sum())
        rarity = np.log(1 + (blocks - holding + 0.5) / (holding + 0.5))
        scores += rarity * seen * (saturation + 1) / (seen + saturation)
    return scores


def best_blocks(scores: F64) -> npt.NDArray[np.int64]:
    """Blocks that score above 0, best first; of equals the newest first."""
    order = np.lexsort((-np.arange(len(scores)), -scores))
    return order[scores[order] > 0].astype(np.int64)
