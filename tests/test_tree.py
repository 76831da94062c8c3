"""The gist tree: T1 to T3, levels that grow, windows of leaf context, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacontext.bench import tree as bench_tree
from megacontext.context.gist_function import GistFunction, MeanGist, build_levels, levels_of, mean_of_children
from megacontext.context.invariants import check_counts, check_prefix
from megacontext.context.tree import Tree, all_records
from megacontext.errors import DataError, UserError

VOCAB, WIDTH = 50, 3
TABLE = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))


def mean_gist(block_size: int = 4) -> MeanGist:
    return MeanGist(TABLE, block_size, WIDTH)


class WindowGist:
    """Whole numbers, so that every order of summation is exact: leaf j is the sum of ids up to block j of its window."""

    record_width, digest = 2, "window"

    def __init__(self, block_size: int, leaf_context_blocks: int) -> None:
        self.block_size, self.leaf_context_blocks = block_size, leaf_context_blocks
        self.calls: list[tuple[int, ...]] = []

    def leaf(self, ids: Tensor) -> Tensor:
        self.calls.append(tuple(ids.shape))
        sums = ids.sum(-1).cumsum(-1).float()
        return torch.stack([sums, ids[..., -1].float()], -1)

    def inner(self, records: Tensor, level: int) -> Tensor:
        self.calls.append((level, *records.shape))
        return records.sum(-2) + level


def slow_records(ids: list[int], gist: GistFunction, max_lod: int | None = None) -> list[Tensor]:
    """The oracle: node by node, from the definition."""
    r, c = gist.block_size, gist.leaf_context_blocks
    levels: list[list[Tensor]] = []
    below = []
    for block in range(len(ids) // r):
        start = block // c * c
        window = torch.tensor(ids[start * r : (block + 1) * r]).view(1, -1, r)
        below.append(gist.leaf(window)[0, -1])
    while below and (max_lod is None or len(levels) < max_lod):
        levels.append(below)
        groups = [below[i * r : (i + 1) * r] for i in range(len(below) // r)]
        below = [gist.inner(torch.stack(group)[None], len(levels) + 1)[0] for group in groups]
    return [torch.stack(level) for level in levels]


def assert_equal_trees(tree: Tree, ids: list[int], gist: GistFunction, max_lod: int | None = None) -> None:
    assert tree.tokens == len(ids)
    assert tree.ids(0, len(ids)).tolist() == ids
    expected = slow_records(ids, gist, max_lod)
    found = all_records(tree)
    assert len(found) == len(expected) == tree.levels
    for level, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        assert torch.equal(a, b), level
        assert tree.count(level) == len(ids) // gist.block_size**level == len(b)


def stream(tokens: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, VOCAB, tokens).tolist()
    return found


streams = st.builds(stream, st.integers(0, 300), st.integers(0, 999))  # lists drawn one by one are mostly short
chunkings = st.lists(st.integers(0, 40), max_size=40)


def feed(tree: Tree, ids: list[int], chunks: list[int]) -> None:
    at = 0
    for size in chunks:
        tree.append(ids[at : at + size])
        at += size
    tree.append(ids[at:])


@settings(max_examples=60, deadline=None)
@given(streams, chunkings, st.sampled_from([2, 3, 4]), st.sampled_from([None, 0, 1, 2]))
def test_t2_the_tree_does_not_depend_on_chunking(
    ids: list[int], chunks: list[int], block_size: int, max_lod: int | None
) -> None:
    gist = mean_gist(block_size)
    tree = Tree(gist, vocab_size=VOCAB, max_lod=max_lod, batch_tokens=block_size * 7)
    feed(tree, ids, chunks)
    assert_equal_trees(tree, ids, gist, max_lod)
    check_counts(tree)


@settings(max_examples=60, deadline=None)
@given(streams, chunkings, st.sampled_from([2, 3]), st.integers(1, 5))
def test_t2_holds_with_windows_of_leaf_context(ids: list[int], chunks: list[int], block_size: int, window: int) -> None:
    gist = WindowGist(block_size, window)
    tree = Tree(gist, batch_tokens=1)
    feed(tree, ids, chunks)
    assert_equal_trees(tree, ids, WindowGist(block_size, window))
    assert tree.gist_runs.get(1, 0) == len(ids) // block_size


@pytest.mark.parametrize("window", [1, 2, 3])
def test_t2_holds_for_every_split_in_two(window: int) -> None:
    ids = stream(40, 0)
    expected = slow_records(ids, WindowGist(2, window))
    for split in range(41):
        tree = Tree(WindowGist(2, window))
        tree.append(ids[:split])
        tree.append(ids[split:])
        assert all(torch.equal(a, b) for a, b in zip(all_records(tree), expected, strict=True))


@settings(max_examples=30, deadline=None)
@given(streams, st.integers(1, 4))
def test_levels_of_a_batch_equal_the_tree(ids: list[int], window: int) -> None:
    gist = WindowGist(3, window)
    batch = torch.tensor([ids, ids[::-1]], dtype=torch.int64)
    for row, stream in enumerate((ids, ids[::-1])):
        levels = build_levels(batch, gist)
        expected = slow_records(stream, gist)
        assert [level[row].tolist() for level in levels] == [level.tolist() for level in expected]


def test_levels_of_a_batch_carry_gradient() -> None:
    table = TABLE.clone().requires_grad_()
    gist = MeanGist(table, 4, WIDTH)
    build_levels(torch.arange(32).view(1, 32), gist)[1].sum().backward()
    assert table.grad is not None
    assert torch.allclose(table.grad[:32], torch.full((32, WIDTH), 1 / 16))


def test_t3_a_gist_is_made_once() -> None:
    calls = []

    class Counting(MeanGist):
        def leaf(self, ids: Tensor) -> Tensor:
            calls.append(ids.shape[0] * ids.shape[1])
            return super().leaf(ids)

        def inner(self, records: Tensor, level: int) -> Tensor:
            calls.append(len(records))
            return super().inner(records, level)

    tree = Tree(Counting(lambda ids: TABLE[ids], 32, WIDTH))
    ids = np.random.default_rng(0).integers(0, VOCAB, 32_768)
    for part in np.split(ids, [1, 5000, 5001, 20_000]):
        tree.append(part)
    assert sum(calls) == sum(tree.gist_runs.values()) == 1057
    assert tree.levels == 3
    check_counts(tree)


def test_one_call_per_level_and_append() -> None:
    gist = WindowGist(2, 3)
    tree = Tree(gist)
    tree.append(range(1, 31))  # 15 blocks: five whole windows
    assert gist.calls == [(5, 3, 2), (2, 7, 2, 2), (3, 3, 2, 2), (4, 1, 2, 2)]
    gist.calls.clear()
    tree.append([1, 2])  # block 15 begins a window of its own
    assert gist.calls == [(1, 1, 2), *((level, 1, 2, 2) for level in (2, 3, 4, 5))]


def test_memory_of_a_huge_append_is_bounded() -> None:
    gist = WindowGist(2, 2)
    Tree(gist, batch_tokens=64).append(np.ones(1000, np.int64))
    assert max(n * m * r for n, m, r in (call for call in gist.calls if len(call) == 3)) <= 64


def test_partial_blocks_have_no_gist() -> None:
    tree = Tree(mean_gist(4))
    tree.append([1, 2, 3])  # shorter than a block
    assert (tree.tokens, tree.levels, tree.count(1)) == (3, 0, 0)
    with pytest.raises(UserError, match="not in the tree"):
        tree.records(1, [0])
    tree.append([4])
    assert tree.levels == 1


def test_levels_grow_without_limit() -> None:
    assert [levels_of(t, 32) for t in (31, 32, 1023, 1024, 32**3, 32**6)] == [0, 1, 1, 2, 3, 6]
    assert levels_of(32**6, 32, 2) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_dtypes_do_not_depend_on_chunking(dtype: str) -> None:
    ids = list(range(VOCAB)) * 2
    one, many = Tree(mean_gist(), dtype=dtype), Tree(mean_gist(), dtype=dtype)
    one.append(ids)
    feed(many, ids, [1] * 90)
    assert all(torch.equal(a, b) for a, b in zip(all_records(one), all_records(many), strict=True))
    assert one.records(2, [3, 0]).dtype == getattr(torch, dtype)


def test_t1_committed_ids_never_change() -> None:
    tree = Tree(mean_gist())
    tree.append(range(30))
    before = tree.ids(0, 30).numpy()
    tree.append(range(20))
    check_prefix(before, tree)


def test_reading_nodes_in_any_order() -> None:
    tree = Tree(mean_gist(2))
    tree.append(np.arange(40) % VOCAB)
    every = tree.record_range(1, 0, 20)
    assert torch.equal(tree.records(1, [7, 0, 19, 7]), every[[7, 0, 19, 7]])
    assert tree.records(1, []).shape == (0, WIDTH)
    assert torch.equal(tree.records(2, torch.tensor([3])), every[6:8].mean(0, keepdim=True))


def test_mean_is_the_mean() -> None:
    ids = torch.randint(0, VOCAB, (5, 1, 32), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(MeanGist(TABLE, 32, WIDTH).leaf(ids), TABLE[ids].mean(-2), atol=1e-6)
    assert torch.allclose(MeanGist(lambda ids: TABLE[ids], 32, WIDTH).leaf(ids), TABLE[ids].mean(-2), atol=1e-6)
    for rows in (1, 2, 3, 5, 7, 32):
        x = torch.randn(4, rows, 6, generator=torch.Generator().manual_seed(rows))
        assert torch.allclose(mean_of_children(x), x.mean(-2), atol=1e-6)


def test_bad_input_is_refused_and_nothing_is_lost() -> None:
    with pytest.raises(UserError, match="block_size is 1"):
        mean_gist(1)
    tree = Tree(mean_gist(), vocab_size=VOCAB)
    tree.append(range(10))
    for bad in ([3, VOCAB], [-1], np.array([1, 2, 70])):
        with pytest.raises(DataError, match="outside the vocabulary of 50"):
            tree.append(bad)
    with pytest.raises(DataError, match="one dimension"):
        tree.append(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="whole numbers"):
        tree.append(np.array([0.5]))
    with pytest.raises(UserError, match="not in a history of 10"):
        tree.ids(5, 11)
    with pytest.raises(UserError, match="level 0 holds ids"):
        tree.record_range(0, 0, 1)
    with pytest.raises(UserError, match="dtype"):
        Tree(mean_gist(), dtype="int8")
    with pytest.raises(UserError, match="max_lod"):
        Tree(mean_gist(), max_lod=-1)
    assert tree.tokens == 10
    tree.close()
    tree.close()
    with pytest.raises(UserError, match="closed"):
        tree.append([1])


def test_a_gist_that_is_not_finite_is_not_stored() -> None:
    table = TABLE.clone()
    table[7] = float("nan")
    tree = Tree(MeanGist(lambda ids: table[ids], 4, WIDTH))
    tree.append([0] * 4)
    with pytest.raises(DataError, match=r"node \(1, 1\)"):
        tree.append([1, 7, 2, 3])
    assert tree.tokens == 4
    tree.append([1, 2, 3, 4])
    assert tree.count(1) == 2


def test_the_benchmark_agrees_with_its_slow_loops(tmp_path: Path) -> None:
    sizes = ["--tokens", "20000", "--build_tokens", "9000", "--repeats", "1", "--width", "8", "--dir", str(tmp_path)]
    result = bench_tree.main(sizes)
    assert (
        result["tokens_after_crash"] == 20_000 + 2000 + 2000
    )  # the history, single tokens, what the dead writer added
    assert result["disk_mib"] > 0
