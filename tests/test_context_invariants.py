"""Ten thousand random edits and appends without a violation, and each check raises when its law is broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from allocators import allocator_config

from megacontext.context.allocator import FocusAllocator
from megacontext.context.edits import Edits, apply, collapsible
from megacontext.context.gist_function import MeanGist
from megacontext.context.invariants import (
    check_budget,
    check_counts,
    check_edit,
    check_exists,
    check_no_reversal,
    check_prefix,
    check_tail,
    check_working_context,
)
from megacontext.context.tree import Tree
from megacontext.context.working_context import InvariantError, WorkingContext

R, TAIL, BUDGET = 4, 8, 96


def test_ten_thousand_random_edits_and_appends() -> None:
    """Tree, context and allocator together; every law is proved after every operation."""
    rng = np.random.default_rng(0)
    gist = MeanGist(lambda ids: ids[..., None].float(), R, 1)
    tree, context = Tree(gist, vocab_size=100), WorkingContext.all_raw(0, R)
    allocator = FocusAllocator(allocator_config(budget=BUDGET, recent_tokens=TAIL))
    ids = np.empty(0, np.int64)
    operations = {"append": 0, "expand": 0, "collapse": 0}
    while sum(operations.values()) < 10_000:
        expandable, groups = np.flatnonzero(context.lod), collapsible(context, TAIL)
        choice = rng.choice(["append", "expand", "collapse"], p=[0.2, 0.4, 0.4])
        before = context
        if choice == "append":
            new = rng.integers(0, 100, int(rng.integers(1, 12)))
            tree.append(new)
            context = allocator.extend(context, len(new))
            check_prefix(ids, tree)
            check_counts(tree)
            ids = np.concatenate([ids, new])
        elif choice == "expand" and expandable.size and len(context) + R - 1 <= BUDGET:
            edits = Edits(expand=rng.choice(expandable, 1))
        elif choice == "collapse" and groups.size:
            edits = Edits(collapse=rng.choice(groups, 1))
        else:
            continue
        if choice != "append":
            context = apply(context, edits, TAIL)
            check_edit(before, context, edits)
        check_working_context(context, budget=BUDGET, tail=TAIL, tokens=tree.tokens)
        operations[choice] += 1
    assert min(operations.values()) > 1000
    check_prefix(ids, tree)
    for level in range(1, tree.levels + 1):  # a mean gist is the mean of what its node covers
        span = R**level
        expected = torch.from_numpy(ids[: len(ids) // span * span].reshape(-1, span).mean(1, keepdims=True)).float()
        assert torch.allclose(tree.record_range(level, 0, tree.count(level)), expected, atol=1e-4)


def context_of(*entries: tuple[int, int]) -> WorkingContext:
    return WorkingContext.from_entries(entries, R)


def test_broken_laws_of_the_context_raise_and_name_the_entry() -> None:
    context = context_of((1, 0), (1, 1), (0, 8))
    with pytest.raises(InvariantError, match="W1: 3 entries in a budget of 2"):
        check_budget(context, 2)
    with pytest.raises(InvariantError, match=r"W3: entry 1 \(lod 1, index 1\)"):
        check_tail(context, 2)
    check_tail(context, 1)
    with pytest.raises(InvariantError, match=r"W4: entry 1 \(lod 1, index 1\)"):
        check_exists(context, 7)
    with pytest.raises(InvariantError, match=r"W4: entry 0 .* 0 levels"):
        check_exists(context, 9, max_lod=0)
    with pytest.raises(InvariantError, match="cover 9 of 10"):
        check_working_context(context, budget=9, tail=0, tokens=10)


def test_an_edit_that_touches_another_entry_is_caught() -> None:
    before = context_of((1, 0), (1, 1), (0, 8))
    edits = Edits(expand=np.array([0]))
    after = apply(before, edits)
    check_edit(before, after, edits)
    both = WorkingContext.all_raw(9, R)
    with pytest.raises(InvariantError, match=r"W5: entry 1 \(lod 1, index 1\) changed"):
        check_edit(before, both, edits)
    with pytest.raises(InvariantError, match="W5"):
        check_edit(before, before, edits)


def test_a_reversal_within_the_cooldown_is_caught() -> None:
    made = np.array([[7, 1], [9, 3]])
    check_no_reversal(made, np.array([7]), refocus=4, cooldown=2)
    with pytest.raises(InvariantError, match="A3: node 0x9"):
        check_no_reversal(made, np.array([7, 9]), refocus=4, cooldown=2)


def test_broken_laws_of_the_tree_raise() -> None:
    tree = Tree(MeanGist(lambda ids: ids[..., None].float(), R, 1))
    tree.append(range(20))
    with pytest.raises(InvariantError, match="T1"):
        check_prefix(np.arange(1, 21), tree)
    with pytest.raises(InvariantError, match="T1"):
        check_prefix(np.arange(21), tree)
    tree.store.add_records(1, torch.zeros(1, 1))
    with pytest.raises(InvariantError, match="T3: 6 records at level 1 of 20 tokens, not 5"):
        check_counts(tree)
