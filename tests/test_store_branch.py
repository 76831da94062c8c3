"""A branch of a tree equals the tree that had everything appended, and leaves its base alone."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.context.gist_function import MeanGist
from megacontext.context.store_branch import BranchStore
from megacontext.context.tree import Tree, all_records

R = 4


def make(ids: np.ndarray) -> Tree:
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    tree = Tree(MeanGist(table, R, 6))
    tree.append(ids)
    return tree


@settings(max_examples=40, deadline=None)
@given(old=st.integers(0, 90), new=st.lists(st.integers(0, 40), max_size=3), seed=st.integers(0, 100))
def test_a_branch_is_the_longer_tree(old: int, new: list[int], seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 50, old + sum(new))
    base = make(ids[:old])
    before = [records.clone() for records in all_records(base)]
    branch = Tree(base.gist, BranchStore(base.store))
    at = old
    for count in new:
        branch.append(ids[at : at + count])
        at += count
    whole = make(ids)
    assert branch.tokens == whole.tokens
    assert branch.levels == whole.levels
    assert torch.equal(branch.ids(0, at), whole.ids(0, at))
    assert torch.equal(branch.ids(at // 2, at), whole.ids(at // 2, at))
    for level in range(1, whole.levels + 1):
        count = whole.count(level)
        index = np.random.default_rng(seed).permutation(count)
        assert torch.equal(branch.records(level, index), whole.records(level, index))
        for start in range(count):
            assert torch.equal(branch.record_range(level, start, count), whole.record_range(level, start, count))
    branch.close()
    assert base.tokens == old
    assert all(torch.equal(a, b) for a, b in zip(before, all_records(base), strict=True))
    other = Tree(base.gist, BranchStore(base.store))
    assert other.append(ids[:3]) == old + min(3, len(ids))
