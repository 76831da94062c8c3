"""What a refocus sees: entries as inputs, the found block raised above the rest, and the whole way down to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from allocators import allocator_config

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.allocator import FocusAllocator
from megacontext.context.gist_function import MeanGist
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.inference.focus import LensScorer, balanced, entry_inputs
from megacontext.inference.search import Found
from megacontext.model.gpt import GPT
from megacontext.model.norm import rms_norm

VOCAB, BLOCK, TAIL = 300, 8, 24


def make(memory: bool = True, token_shift: bool = False) -> GPT:
    shape = GPTConfig(
        sequence_len=128, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, token_shift=token_shift
    )
    model = GPT(shape)
    if memory:
        model.attach_memory(MemoryConfig(block_size=BLOCK, routing_width=64, routing_slots=8), router_trained=True)
    model.init_weights(torch.Generator().manual_seed(0))
    if model.memory is not None:
        assert model.memory.router is not None
        model.memory.router.log_scale.data.fill_(4.0)
        model.memory.router.recency.data[:-1] = -20.0  # only the newest window asks,
        model.memory.router.recency.data[-1] = 20.0  # and it does
    return model.eval()


def tree_of(model: GPT, ids: np.ndarray) -> Tree:
    tree = (
        Tree(model.memory)
        if model.memory is not None
        else Tree(MeanGist(rms_norm(model.transformer["wte"].weight.detach()), BLOCK, 32))
    )
    tree.append(ids)
    return tree


def needle(tokens: int, block: int, seed: int = 0) -> np.ndarray:
    """A history whose last words are also in a block of long ago."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, tokens)
    ids[-4:] = ids[block * BLOCK + 2 : block * BLOCK + 6]
    return ids


@pytest.mark.parametrize("token_shift", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_inputs_of_entries_equal_those_made_one_by_one(memory: bool, token_shift: bool) -> None:
    model = make(memory, token_shift)
    ids = needle(200, 3)
    tree = tree_of(model, ids)
    context = WorkingContext.initial(200, BLOCK, 90, TAIL)
    with torch.no_grad():
        x, rotary = entry_inputs(model, tree, context)
        late, late_rotary = entry_inputs(model, tree, context, start=17)
        whole = model.embed(torch.from_numpy(ids)[None])[0]
        for at, (lod, index) in enumerate(context.entries):
            if lod == 0:
                want = whole[index]
            else:
                gist = tree.records(lod, [index])[:, :32]
                want = rms_norm(gist)[0] if model.memory is None else model.memory.tagged(gist, torch.tensor([lod]))[0]
            torch.testing.assert_close(x[0, at], want)
    assert torch.equal(late, x[:, 17:])
    assert torch.equal(late_rotary[0], rotary[0][:, 17:])


@pytest.mark.parametrize(("block", "drift"), [(0, 0.0), (31, 0.0), (200, 0.9), (511, -0.9)])
def test_a_refocus_expands_the_block_that_is_asked_for(
    block: int, drift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where LensNet thinks too well or too badly of everything, as it may of histories unlike those of training."""
    model = make()
    assert model.memory is not None
    scores = model.memory.scores
    monkeypatch.setattr(model.memory, "scores", lambda *given: (scores(*given) + drift).clamp(-1, 1))
    ids = needle(5000, block)
    tree = tree_of(model, ids)
    budget = 128
    allocator = FocusAllocator(allocator_config(budget=budget, recent_tokens=TAIL, max_replacements=8, iterations=8))
    context = WorkingContext.initial(5000, BLOCK, budget, TAIL)
    scorer = LensScorer(model, tree, TAIL)
    assert scorer.found is not None
    assert scorer.found.block[0] == block
    context, report = allocator.refocus(context, scorer)
    shown = set(context.entries)
    assert all((0, block * BLOCK + offset) in shown for offset in range(BLOCK))
    assert len(context) <= budget
    assert report.expands >= 1


def test_balanced_scores_compare_the_same_and_are_even_over_blocks_and_gists() -> None:
    context = WorkingContext.by_age(5000, BLOCK, 128, TAIL)
    score = np.random.default_rng(0).uniform(0.2, 0.9, len(context))
    even = balanced(score, context)
    assert np.allclose(np.diff(even), np.diff(score))
    old = context.starts < 5000 - BLOCK
    gists = even[old & (context.lod > 0)]
    blocks = even[old & (context.lod == 0)].reshape(-1, BLOCK).mean(1)
    assert np.concatenate([gists, blocks]).mean() == pytest.approx(0, abs=1e-12)
    only_tail = WorkingContext.by_age(BLOCK, BLOCK, 128, TAIL)
    assert np.array_equal(balanced(score[:BLOCK], only_tail), score[:BLOCK])


def test_what_is_not_asked_for_makes_room() -> None:
    model = make()
    ids = needle(5000, 40)
    tree = tree_of(model, ids)
    context = WorkingContext.initial(5000, BLOCK, 128, TAIL)
    scores = LensScorer(model, tree, TAIL)(context)
    entry = context.at_token(40 * BLOCK)
    assert scores[entry] > 0.5
    assert (np.delete(scores, entry)[: entry + 5] < 0).all()


def test_of_blocks_that_match_alike_the_newest_is_the_likeliest() -> None:
    model = make()
    ids = needle(5000, 40)
    for block in (300, 111):
        ids[block * BLOCK : (block + 1) * BLOCK] = ids[40 * BLOCK : 41 * BLOCK]
    scorer = LensScorer(model, tree_of(model, ids), TAIL)
    assert scorer.found is not None
    likely = dict(zip(scorer.found.block.tolist(), scorer.probability.tolist(), strict=True))
    assert likely[300] == pytest.approx(10 * likely[111]) == pytest.approx(100 * likely[40])
    assert sum(likely.values()) <= 1 + 1e-9


def test_a_slightly_better_match_does_not_outweigh_a_newer_one() -> None:
    model = make()
    block, match, others = np.array([111, 40, 300, 500]), np.array([8.0, 7.95, 7.9, 5.0]), np.array([1.0])
    scorer = LensScorer(
        model, tree_of(model, needle(5000, 40)), TAIL, find=lambda _: Found(block, match, others, 1, True)
    )
    likely = dict(zip(block.tolist(), scorer.probability.tolist(), strict=True))
    assert likely[300] == pytest.approx(10 * likely[111]) == pytest.approx(100 * likely[40])
    assert likely[500] < likely[40]


def test_parts_can_be_left_out() -> None:
    model = make()
    tree = tree_of(model, needle(600, 4))
    context = WorkingContext.initial(600, BLOCK, 100, TAIL)
    assert LensScorer(model, tree, TAIL, route=False).found is None
    assert not LensScorer(model, tree, TAIL, route=False)(context).any()  # a new LensNet says nothing
    assert LensScorer(model, tree, TAIL, lens=False)(context).any()


def test_the_question_does_not_find_itself() -> None:
    model = make()
    tree = tree_of(model, needle(600, 4))
    found = LensScorer(model, tree, TAIL).found
    assert found is not None
    assert (found.block * BLOCK + BLOCK <= 600 - TAIL).all()
