"""Measured edits: batched losses equal single forward passes, utilities are differences of them, KL equals its sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_memory import BLOCK, HORIZON, TAIL, make_model, make_windows

from megacontext.context.edits import Edits, apply, collapse_node
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.eval import counterfactual
from megacontext.eval.methods import expand_blocks
from megacontext.inference.focus import entry_inputs
from megacontext.model.gpt import GPT


def losses_one_by_one(model: GPT, tree: Tree, context: WorkingContext, following: np.ndarray) -> np.ndarray:
    """The continuation as raw tokens of a longer tree, one forward pass, plain log-softmax."""
    longer = Tree(model.memory)
    ids = np.concatenate([tree.ids(0, tree.tokens).numpy(), following])
    longer.append(ids)
    whole = context.append(len(following))
    x, _ = entry_inputs(model, longer, whole)
    slots = torch.arange(len(whole))[None]
    end = torch.tensor([tree.tokens])
    rotary = model.entry_rotary(
        torch.from_numpy(whole.positions)[None], torch.from_numpy(whole.sigmas)[None], slots, end
    )
    with torch.no_grad():
        log = model.head(model.trunk(x, rotary)).double().log_softmax(-1)[0]
    return np.array([-log[whole.at_token(t - 1), ids[t]].item() for t in range(tree.tokens - TAIL + 1, len(ids))])


@pytest.mark.parametrize("positional_type", ["slot", "gaussian", "gaussian_alibi"])
def test_losses_of_a_batch_equal_single_passes(positional_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counterfactual, "_BATCH_ENTRIES", 130)  # several batches, contexts of several lengths
    model = make_model(positional_type)
    windows = make_windows()
    tree = Tree(model.memory)
    tree.append(windows.history(0))
    contexts = [WorkingContext.by_age(80, BLOCK, budget, TAIL) for budget in (24, 40, 60, 80)]
    contexts.append(WorkingContext.initial(80, BLOCK, 40, TAIL))
    following = windows.continuation(0)
    batched = counterfactual.tiling_losses(model, tree, contexts, following, TAIL)
    for context, losses in zip(contexts, batched, strict=True):
        assert losses == pytest.approx(losses_one_by_one(model, tree, context, following), abs=2e-5)


def test_utilities_are_loss_before_minus_loss_after() -> None:
    model, windows = make_model(), make_windows()
    tree = Tree(model.memory)
    tree.append(windows.history(1))
    context = WorkingContext.by_age(80, BLOCK, 40, TAIL)
    found = counterfactual.entry_utilities(model, tree, context, windows.continuation(1), TAIL)
    assert found.item.tolist() == np.flatnonzero(context.lod).tolist()
    before = losses_one_by_one(model, tree, context, windows.continuation(1))
    after = losses_one_by_one(model, tree, apply(context, Edits(expand=found.item[3:4])), windows.continuation(1))
    assert found.tail[3] == pytest.approx((before - after)[: TAIL - 1].mean(), abs=2e-5)
    assert found.ahead[3] == pytest.approx((before - after)[TAIL - 1 :].mean(), abs=2e-5)


def test_block_utilities_leave_out_what_does_not_fit() -> None:
    model, windows = make_model(), make_windows()
    tree = Tree(model.memory)
    tree.append(windows.history(0))
    context = WorkingContext.initial(80, BLOCK, 40, TAIL)
    following = windows.continuation(0)
    found = counterfactual.block_utilities(model, tree, context, np.array([1, 7, 15]), following, TAIL, 40)
    assert found.item.tolist() == [1, 7, 15]
    before = losses_one_by_one(model, tree, context, following)
    after = losses_one_by_one(model, tree, expand_blocks(context, [7], 40), following)
    assert found.ahead[1] == pytest.approx((before - after)[TAIL - 1 :].mean(), abs=2e-5)
    none = counterfactual.block_utilities(model, tree, context, np.array([1]), following, TAIL, len(context) + 2)
    assert none.item.tolist() == []


def test_substitution_kl_against_the_definition() -> None:
    model, windows = make_model(), make_windows()
    tree = Tree(model.memory)
    tree.append(windows.history(0)[:40])
    following = windows.continuation(0)
    found = counterfactual.substitution_kl(model, tree, [(1, 3), (2, 1)], following)
    raw = WorkingContext.all_raw(40, BLOCK)
    one = apply(raw, collapse_node(raw, 1, 3))
    two = raw
    for node in range(4, 8):
        two = apply(two, collapse_node(two, 1, node))
    two = apply(two, collapse_node(two, 2, 1))

    def log_probabilities(context: WorkingContext) -> torch.Tensor:
        longer = Tree(model.memory)
        longer.append(np.concatenate([tree.ids(0, 40).numpy(), following]))
        x, rotary = entry_inputs(model, longer, context.append(HORIZON))
        with torch.no_grad():
            return model.head(model.trunk(x, rotary)).double().log_softmax(-1)[0, len(context) - 1 : -1]

    reference = log_probabilities(raw)
    for kl, context in zip(found, (one, two), strict=True):
        log = log_probabilities(context)
        expected = sum((reference[t].exp() * (reference[t] - log[t])).sum().item() for t in range(HORIZON)) / HORIZON
        assert kl == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert (found > 0).all()
    with pytest.raises(UserError, match="not entries"):
        counterfactual.substitution_kl(model, tree, [(2, 2)], following)
