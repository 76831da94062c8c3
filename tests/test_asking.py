"""Whether anything is asked: windows that ask nothing, learning to tell them from questions, and what a refocus makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.gist_function import build_levels
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.data.recall_words import WordList
from megacontext.data.stream import Batch
from megacontext.inference.focus import LensScorer
from megacontext.model.gpt import GPT
from megacontext.train.lens_loss import RunningScales
from megacontext.train.memory_objective import MemoryObjective
from megacontext.train.memory_plan import NEGATIVE_WINDOWS, route_tensors
from megacontext.train.recall_mix import RecallMix
from megacontext.train.views import ViewSettings

T, VOCAB, ROWS = 128, 400, 6
MEMORY = MemoryConfig(mc=1, block_size=8, routing_slots=2, routing_width=16, allocator_recent_tokens=12,
                      mc_recall_share=0.5, mc_num_random_variants=1)  # fmt: skip
WORDS = WordList.from_ids(np.arange(10, 390), bos=0)
CPU = torch.device("cpu")


def new_model() -> GPT:
    model = GPT(GPTConfig(sequence_len=T, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    model.attach_memory(MEMORY)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def mixed(first: int, rows: int = ROWS, share: float = 0.5) -> Batch:
    """Rows of text without the tasks' grammar, numbers `first` and after, some of them tasks."""
    positions = np.arange(first, first + rows)
    ids = torch.stack([torch.from_numpy(np.random.default_rng(int(at)).integers(100, 390, T + 1)) for at in positions])
    return RecallMix(share, 3, WORDS, T + 1, 8).mixed(Batch(ids, positions, positions))


def test_negative_windows_are_of_their_row_and_ask_nothing() -> None:
    batch = mixed(0)
    assert batch.questions is not None
    tasks = (batch.questions.position >= 0).any(1)
    assert 0 < tasks.sum() < ROWS
    quiet = route_tensors(ViewSettings.of(MEMORY, T), 7, batch)
    assert quiet.negative_weights.sum() == pytest.approx(len(quiet.negatives) / NEGATIVE_WINDOWS)
    assert len(quiet.negatives) % NEGATIVE_WINDOWS == 0
    of_rows = batch.ids.unfold(1, 32, 1)
    owners = []
    for window in quiet.negatives:
        row, start = (of_rows == window).all(2).nonzero()[0].tolist()
        owners.append(row)
        if tasks[row]:
            asked = batch.questions.position[row]
            assert start + 31 < asked[asked >= 0].min() - 2, "the window ends before the first question"
    assert set(np.flatnonzero(~tasks).tolist()) <= set(owners)
    assert set(owners) & set(np.flatnonzero(tasks).tolist())


def test_negative_windows_do_not_depend_on_the_other_rows() -> None:
    views = ViewSettings.of(MEMORY, T)
    together = route_tensors(views, 7, mixed(0)).negatives
    parts = [route_tensors(views, 7, mixed(first, 2)).negatives for first in (0, 2, 4)]
    assert torch.equal(together, torch.cat(parts))
    assert not torch.equal(together, route_tensors(views, 8, mixed(0)).negatives)


def test_a_micro_batch_of_text_has_negative_windows_alone() -> None:
    tensors = route_tensors(ViewSettings.of(MEMORY, T), 7, mixed(0, share=0.0))
    assert len(tensors.windows) == len(tensors.allowed) == len(tensors.weights) == 0
    assert len(tensors.negatives) == ROWS * NEGATIVE_WINDOWS


def test_text_weighs_as_much_as_there_are_rows() -> None:
    """A router that is as likely to hear a question as not is ln 2 from the truth in every row of text."""
    model = new_model()
    assert model.memory is not None
    assert model.memory.router is not None
    model.memory.router.recency.data[:] = -math.log(32)  # with a gate of zero: the logsumexp is 0
    for world, rows in ((1, ROWS), (2, 2 * ROWS)):
        objective = MemoryObjective(model, 5, rows, world, lambda step: 0.5, RunningScales())
        batch = mixed(0, share=0.0)
        loss = objective._route(
            build_levels(batch.inputs, model.memory, 1)[0], route_tensors(objective.settings, 5, batch)
        )
        assert loss.item() == pytest.approx(math.log(2))


def test_the_router_learns_whether_something_is_asked() -> None:
    model = new_model()
    memory = model.memory
    assert memory is not None
    assert memory.router is not None
    objective = MemoryObjective(model, 5, ROWS, 1, lambda step: 0.5, RunningScales())
    optimizer = torch.optim.Adam(memory.router.parameters(), lr=0.01)
    for step in range(80):
        objective.begin(step)
        batch = mixed(ROWS * step)
        leaves = build_levels(batch.inputs, memory, 1)[0]
        loss = objective._route(leaves, route_tensors(objective.settings, 5, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = route_tensors(objective.settings, 5, mixed(100_000))
    asked = memory.query(unseen.windows)[1].sigmoid().mean()
    quiet = memory.query(unseen.negatives)[1].sigmoid().mean()
    assert asked > 0.9
    assert quiet < 0.1


@pytest.mark.parametrize(("level", "routed"), [(30.0, True), (-30.0, False)])
def test_a_refocus_looks_for_an_answer_only_where_something_is_asked(level: float, routed: bool) -> None:
    model = new_model().eval()
    assert model.memory is not None
    assert model.memory.router is not None
    model.memory.router.recency.data[-1] = level
    model.memory.router.recency.data[:-1] = -40.0
    ids = np.random.default_rng(0).integers(100, 390, 600)
    ids[-4:] = ids[42:46]
    tree = Tree(model.memory)
    tree.append(ids)
    context = WorkingContext.initial(600, 8, 120, 16)
    scorer = LensScorer(model, tree, 16)
    alone = LensScorer(model, tree, 16, route=False)(context)
    assert scorer.asked == pytest.approx(float(routed), abs=1e-6)
    assert np.allclose(scorer(context), alone, atol=1e-6) != routed
