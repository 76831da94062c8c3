"""Plans of a step: drawn alike by a thread and by hand, moved in one transfer, and what padding and conversations are kept out of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_memory_objective import TASKS, VOCAB, WORDS, T, loss_of, means, new_batch, new_model, objective_of

from megacontext.data.stream import CHAT, TASK, TEXT, Batch
from megacontext.train.memory_plan import MemoryPlan, preferred_blocks, route_tensors
from megacontext.train.recall_mix import RecallMix
from megacontext.train.setup import plans_ahead
from megacontext.train.step_plan import StepPlan, _tensors, in_one_transfer
from megacontext.train.views import ViewSettings

CPU = torch.device("cpu")
VIEWS = ViewSettings.of(TASKS, T)


def mixed(share: float = 0.5) -> Batch:
    return RecallMix(share, 3, WORDS, T + 1, 8, 16.0).mixed(new_batch(4))


def plan_of(batch: Batch, **settings: int) -> StepPlan:
    return objective_of(new_model(replace(TASKS, **settings))).plan(batch)


def memory_of(plan: StepPlan) -> MemoryPlan:
    assert plan.memory is not None
    return plan.memory


def test_a_plan_is_moved_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(mixed(), mc_max_counterfactuals=2)
    memory = memory_of(plan)
    assert None not in (plan.weights, memory.variants, memory.lens, memory.edits, memory.questions)
    moves = []
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *given, **named: moves.append(given) or move(*given, **named))
    moved = in_one_transfer(plan, CPU)
    monkeypatch.undo()
    assert len(moves) == 1
    before, after = list(_tensors(plan)), list(_tensors(moved))
    assert len(before) == len(after) > 30
    for one, other in zip(before, after, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert np.array_equal(moved.rows, plan.rows)
    assert moved.targets_counted == plan.targets_counted == 4 * T


def test_the_loss_of_a_moved_plan_is_the_same() -> None:
    objective = objective_of(new_model(TASKS))
    from megacontext.train.throughput import Stopwatch

    losses = []
    for change in (lambda plan: plan, lambda plan: in_one_transfer(plan, CPU)):
        objective.begin(0)
        losses.append(objective.loss(change(objective.plan(mixed())), 0.01, Stopwatch(CPU)))
    assert torch.equal(*losses)


def test_plans_drawn_ahead_are_those_drawn_by_hand() -> None:
    batches = [
        Batch(batch.ids, batch.positions + 4 * step, batch.rows) for step, batch in enumerate([new_batch(4)] * 5)
    ]
    objective = objective_of(new_model(TASKS))
    for batch, plan in zip(batches, plans_ahead(objective, iter(batches)), strict=True):
        due = objective.plan(batch)
        assert all(torch.equal(one, other) for one, other in zip(_tensors(due), _tensors(plan), strict=True))


def padded() -> Batch:
    """Two full rows of text, one that ends in the middle, and a conversation with padding."""
    batch = new_batch(4)
    end = np.array([T, T, T // 2, T - 3])
    weights = torch.from_numpy((np.arange(T) < end[:, None]).astype(np.float32))
    return Batch(batch.ids, batch.positions, batch.rows, weights, np.array([TEXT, TEXT, TEXT, CHAT]), end)


def test_only_rows_with_newest_tokens_judge_contexts() -> None:
    """Padding has no newest tokens: such rows teach gists, not LensNet, and count in no distance of tails."""
    plan = plan_of(padded())
    memory = memory_of(plan)
    assert plan.targets_counted == 2 * T + T // 2 + T - 3
    assert memory.full is not None
    assert memory.full.tolist() == [0, 1]
    assert memory.lens is not None
    assert memory.lens.rows.tolist() == [0, 1]
    assert memory.variants is not None
    predicted = memory.variants.raw[memory.variants.weights > 0]
    assert set((predicted // T).tolist()) == {0, 1, 2, 3}
    assert predicted[(predicted // T) == 2].max() < 2 * T + T // 2
    objective, full = objective_of(new_model(TASKS)), objective_of(new_model(TASKS), 2)
    assert torch.isfinite(loss_of(objective, padded()))
    whole = new_batch(4)
    loss_of(full, Batch(whole.ids[:2], whole.positions[:2], whole.rows[:2]))
    assert means(objective)["gist_penalty"] == pytest.approx(means(full)["gist_penalty"], rel=1e-5)
    for name in ("adv_delta_mean", "lens_loss", "attention_corr"):
        assert means(objective)[name] == pytest.approx(means(full)[name], rel=1e-5), name


def test_padding_changes_no_loss() -> None:
    found = []
    for filler in (0, VOCAB - 1):
        batch = padded()
        for row, end in enumerate(batch.end):
            batch.ids[row, end + 1 :] = filler
        objective = objective_of(new_model(TASKS))
        loss_of(objective, batch)
        found.append(means(objective))
    for name in ("token_loss", "lens_loss", "adv_delta_mean"):
        assert found[0][name] == found[1][name], name


def test_the_newest_blocks_are_those_before_the_padding() -> None:
    room = VIEWS.room(VIEWS.entries(0.6))
    preferred = preferred_blocks(VIEWS, padded(), 0.6)
    assert preferred.sum(1).tolist() == [room, room, min(room, T // 16), room]
    assert preferred[2, : T // 16].any()
    assert not preferred[2, T // 16 :].any()


def test_negative_windows_are_before_the_padding_and_never_in_conversations() -> None:
    batch = padded()
    for row in range(4):
        batch.ids[row] = 10 * row + torch.arange(T + 1) % 10
        batch.ids[row, batch.end[row] :] = 399
    negatives = route_tensors(VIEWS, 3, batch).negatives
    assert set((negatives[:, 0] // 10).tolist()) == {0, 1, 2}
    assert not (negatives == 399).any()


def test_answers_are_distilled_in_text_alone() -> None:
    memory = memory_of(plan_of(padded()))
    assert memory.variants is not None
    row = memory.variants.raw // T
    assert memory.variants.distilled[row < 3].eq(1).all()
    assert memory.variants.distilled[row == 3].eq(0).all()
    tasks = mixed(1.0)
    assert set(tasks.kind) == {TASK}
    whole = memory_of(plan_of(tasks))
    assert whole.variants is not None
    assert whole.lens is None
    assert not whole.variants.distilled.any()
