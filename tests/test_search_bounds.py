"""The search reaches blocks within its visits: at every length of history, and whatever the keys are.

Trees here hold no vectors: a node's key is the number that it matches with, drawn from (level, index). So a history
may have billions of tokens, and only the nodes that a search reads are ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from session_programs import VOCAB, make_model, make_tokenizer

import megacontext as mc
from megacontext.config import MemoryConfig
from megacontext.context.gist_function import levels_of
from megacontext.errors import NonFiniteError
from megacontext.inference.focus import LensScorer
from megacontext.inference.search import Found, scan, search
from megacontext.memory_config import FocusConfig

QUERY = torch.zeros(1)
Keys = Callable[[int, np.ndarray], np.ndarray]
TOP_K, MAX_VISITS = FocusConfig().search_blocks, FocusConfig().search_visits


class NumberTree:
    """A tree whose records are the matches themselves, float64 [n, 1] of a level and indices."""

    def __init__(self, tokens: int, block_size: int, keys: Keys) -> None:
        self.tokens, self.block_size, self.keys = tokens, block_size, keys
        self.levels = levels_of(tokens, block_size)
        self.read = 0

    def count(self, level: int) -> int:
        return self.tokens // self.block_size**level

    def records(self, level: int, index: np.ndarray) -> torch.Tensor:
        assert index.min() >= 0
        assert index.max() < self.count(level)
        self.read += len(index)
        return torch.from_numpy(np.asarray(self.keys(level, index), np.float64)[:, None])

    def record_range(self, level: int, start: int, stop: int) -> torch.Tensor:
        return self.records(level, np.arange(start, stop)) if start < stop else torch.empty(0, 1)


class NumberMemory:
    """Takes the record of a node for its match."""

    @staticmethod
    def keys(records: torch.Tensor) -> torch.Tensor:
        return records

    @staticmethod
    def match(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return keys[:, 0]


def noise(level: int, index: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on (level, index) alone."""
    mixed = (index.astype(np.uint64) + np.uint64(level << 40)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return (mixed * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(11)).astype(np.float64) / 2**53


HOSTILE: dict[str, Keys] = {
    "all equal": lambda level, index: np.full(len(index), 0.5),
    "nothing matches": lambda level, index: np.zeros(len(index)),
    "every bound above every block": lambda level, index: noise(level, index) + (level > 1),
    "the higher the level the higher the bound": lambda level, index: level + noise(level, index),
    "the old above all blocks": lambda level, index: np.where(level > 1, 3.0, noise(level, index)) - index / 2.0**50,
    "bounds that overflow": lambda level, index: np.where(level > 1, np.inf, noise(level, index)),
}


def found_in(tree: NumberTree, max_visits: int, before: int, top_k: int = TOP_K) -> Found:
    return search(tree, NumberMemory, QUERY, top_k, max_visits, before)  # type: ignore[arg-type]


POWERS = {2: (1, 3, 6, 12, 20, 28), 4: (1, 2, 3, 5, 7, 10, 14), 32: (1, 2, 3, 4, 5)}
LENGTHS = {
    r: [many * r**power + off for power in powers for many in (1, r - 1) for off in (-1, 0, 1) if many < r or off == 0]
    for r, powers in POWERS.items()
}  # around powers of the block size


def check(tree: NumberTree, found: Found, max_visits: int, before: int) -> None:
    """What holds of every search."""
    blocks = before // tree.block_size
    assert found.visits <= max_visits
    assert len(set(found.block.tolist())) == len(found.block) <= TOP_K
    assert (found.block < blocks).all()
    assert np.array_equal(found.match, tree.keys(1, found.block).astype(np.float32))
    assert np.isfinite(found.match).all()
    assert (np.diff(found.match) <= 0).all()


@pytest.mark.parametrize("keys", HOSTILE, ids=str)
@pytest.mark.parametrize("block_size", [2, 4, 32])
def test_blocks_are_reached_at_every_length(block_size: int, keys: str) -> None:
    for number, tokens in enumerate([n for n in LENGTHS[block_size] if n >= block_size]):
        before = tokens - number % 2 * (tokens // 3)
        tree = NumberTree(tokens, block_size, HOSTILE[keys])
        found = found_in(tree, MAX_VISITS, before)
        check(tree, found, MAX_VISITS, before)
        assert len(found.block) == min(TOP_K, before // block_size), (tokens, before)
        # Beside the blocks that no node covers: the search comes down from the nodes.
        loose = tree.count(1) % block_size
        assert found.exact or len(found.block) + len(found.others) > loose, (tokens, before)
        assert tree.read <= block_size * (MAX_VISITS + tree.levels)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8, 32]),
    st.integers(1, 1 << 34),
    st.integers(0, 40),
    st.floats(0, 1),
    st.sampled_from(sorted(HOSTILE)),
)
def test_a_visit_for_every_level_is_enough_for_a_block(
    block_size: int, tokens: int, more: int, part: float, keys: str
) -> None:
    tree = NumberTree(tokens, block_size, HOSTILE[keys])
    before, visits = int(part * tokens), max(0, tree.levels - 1) + more
    found = found_in(tree, visits, before)
    check(tree, found, visits, before)
    assert bool(len(found.block)) == (before >= block_size)
    visits = max(0, tree.levels - 1) * (-(-TOP_K // block_size) + 1)
    assert len(found_in(tree, visits + more, before).block) == min(TOP_K, before // block_size)


def bounds_of(leaves: np.ndarray, block_size: int, slack: float) -> Keys:
    """Keys of given blocks: each bound is the largest below it, and up to `slack` more."""
    levels = [leaves]
    while len(levels[-1]) >= block_size:
        whole = len(levels[-1]) // block_size
        best = levels[-1][: whole * block_size].reshape(whole, block_size).max(1)
        levels.append(best + slack * noise(len(levels), np.arange(whole)))
    return lambda level, index: levels[level - 1][index]


@pytest.mark.parametrize("block_size", [2, 4, 32])
@pytest.mark.parametrize("slack", [0.0, 0.02, 0.5])
def test_an_exact_search_is_the_flat_scan(block_size: int, slack: float) -> None:
    exact = 0
    for seed, tokens in enumerate([n for n in LENGTHS[block_size] if block_size <= n < 5000]):
        leaves = np.random.default_rng(seed).random(tokens // block_size, np.float32)
        tree = NumberTree(tokens, block_size, bounds_of(leaves, block_size, slack))
        for before in (tokens, tokens // 2):
            wanted = scan(tree, NumberMemory, QUERY, TOP_K, before)  # type: ignore[arg-type]
            for visits in (MAX_VISITS, 10**9):
                found = found_in(tree, visits, before)
                check(tree, found, visits, before)
                exact += found.exact
                assert found.exact or visits == MAX_VISITS
                if found.exact:
                    assert found.block.tolist() == wanted.block.tolist()
    assert exact


@pytest.mark.parametrize("block_size", [4, 32])
@pytest.mark.parametrize("slack", [0.02, 0.5])
def test_descents_take_nothing_from_the_highest_bounds(
    block_size: int, slack: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 visits to the highest bounds at any level come first, so a search finds at least what they alone find."""
    leaves = np.random.default_rng(0).random(20_000, np.float32)
    tree = NumberTree(20_000 * block_size, block_size, bounds_of(leaves, block_size, slack))
    found = found_in(tree, MAX_VISITS, tree.tokens)
    monkeypatch.setattr(
        "megacontext.inference.search._caps", lambda left, descent, levels: np.full(min(32, left), levels)
    )
    alone = found_in(tree, 256, tree.tokens)
    assert found.exact or not alone.exact
    assert set(alone.others.tolist()) | set(alone.match.tolist()) <= {*found.others.tolist(), *found.match.tolist()}
    assert (found.match >= np.pad(alone.match, (0, TOP_K - len(alone.match)))).all()


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_matches_that_are_no_numbers_are_not_found(what: float) -> None:
    tree = NumberTree(4**5, 4, lambda level, index: np.full(len(index), what))
    for found in (found_in(tree, MAX_VISITS, 4**5), scan(tree, NumberMemory, QUERY, TOP_K, 4**5)):  # type: ignore[arg-type]
        assert len(found.block) == len(found.match) == len(found.others) == 0
    half = NumberTree(4**5, 4, lambda level, index: np.where((level == 1) & (index % 2 == 0), what, 2.0 - level / 9))
    assert found_in(half, MAX_VISITS, 4**5).block.tolist() == [255, 253, 251, 249, 247, 245, 243, 241]


# The same through a model


def random_memory(seed: int) -> Any:
    """A model whose memory is as it was initialized: its bounds tell little apart."""
    model = make_model(False, token_shift=True)
    model.attach_memory(MemoryConfig(mc=1, block_size=4), router_trained=True)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def test_a_long_history_of_random_ids_generates() -> None:
    ids = np.random.default_rng(4).integers(0, VOCAB, 16_384)
    session = mc.Session(random_memory(0), make_tokenizer(), budget=64)
    session.append(ids)
    assert len(list(session.generate(2, stop=()))) == 2
    session.refocus()
    found = LensScorer(session.model, session.tree, session.options.recent_tokens).found
    assert found is not None
    assert len(found.block) == TOP_K
    assert len(found.others) >= 16


def nothing(_: torch.Tensor) -> Found:
    return Found(np.empty(0, np.int64), np.empty(0), np.empty(0), 0, True)


def test_nothing_found_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_memory(0)
    session = mc.Session(model, make_tokenizer(), budget=64)
    session.append(np.random.default_rng(0).integers(0, VOCAB, 600))
    scorer = LensScorer(model, session.tree, 8, find=nothing)
    assert scorer.probability.shape == (0,)
    alone = LensScorer(model, session.tree, 8, route=False)
    assert np.array_equal(scorer(session.context), alone(session.context))
    assert not scorer.route(session.context).any()


def test_a_query_that_is_no_number_is_said() -> None:
    model = random_memory(0)
    session = mc.Session(model, make_tokenizer(), budget=64)
    session.append(np.random.default_rng(0).integers(0, VOCAB, 600))
    model.memory.router.gate.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"routing query is not a finite number.*earlier checkpoint"):
        session.refocus()
