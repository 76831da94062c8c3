"""Best-first descent by routing keys finds what a scan finds, and reads less."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.tree import Tree
from megacontext.inference.search import scan, search
from megacontext.model.gpt import GPT

VOCAB = 200


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(sequence_len=128, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    model.attach_memory(MemoryConfig(block_size=8, routing_width=24))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def history(tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, tokens)


@pytest.mark.parametrize("tokens", [8, 63, 64, 600, 4100])
@pytest.mark.parametrize("seed", range(3))
def test_uncapped_search_is_a_scan(model: GPT, tokens: int, seed: int) -> None:
    assert model.memory is not None
    tree = Tree(model.memory)
    tree.append(history(tokens, seed))
    query = model.memory.query(torch.from_numpy(history(9, seed + 100))[None])[0][0].detach()
    for before in (tokens, tokens - 8, tokens // 2):
        found = search(tree, model.memory, query, 5, 10**9, before)
        wanted = scan(tree, model.memory, query, 5, before)
        assert found.exact
        np.testing.assert_allclose(found.match, wanted.match, atol=1e-6)
        assert set(found.block.tolist()) <= set(range(before // 8))
        np.testing.assert_allclose(np.sort(found.others)[::-1], np.sort(found.others)[::-1])


def test_a_parent_bounds_its_children(model: GPT) -> None:
    assert model.memory is not None
    tree = Tree(model.memory)
    tree.append(history(4096, 5))
    query = model.memory.query(torch.from_numpy(history(9, 6))[None])[0][0].detach()
    match = [
        model.memory.match(query, model.memory.keys(tree.record_range(level, 0, tree.count(level))))
        for level in range(1, tree.levels + 1)
    ]
    for children, parents in itertools.pairwise(match):
        assert (children[: len(parents) * 8].view(-1, 8).amax(1) <= parents + 1e-6).all()


def test_a_cap_bounds_the_work_and_says_so(model: GPT) -> None:
    assert model.memory is not None
    tree = Tree(model.memory)
    tree.append(history(4096, 7))
    query = model.memory.query(torch.from_numpy(history(9, 8))[None])[0][0].detach()
    found = search(tree, model.memory, query, 5, 3, 4096)
    assert found.visits <= 3
    assert not found.exact
    assert len(set(found.block.tolist())) == len(found.block)
    assert (np.diff(found.match) <= 0).all()


def test_nothing_to_find_before_the_first_block(model: GPT) -> None:
    assert model.memory is not None
    tree = Tree(model.memory)
    tree.append(history(40, 9))
    query = model.memory.query(torch.from_numpy(history(9, 10))[None])[0][0].detach()
    found = search(tree, model.memory, query, 5, 100, 7)
    assert len(found.block) == 0
    assert found.exact
