"""The order is a permutation per epoch with random access; plans tile it; the stream follows it and cleans up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.data.shards import Manifest, ShardSet, write_shard
from megacontext.data.stream import BatchPlan, MmapStream, RowOrder, make_batch
from megacontext.errors import DataError, UserError

seeds = st.integers(-(2**70), 2**70)


@settings(deadline=None)
@given(num_rows=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(num_rows: int, seed: int, epoch: int) -> None:
    rows = RowOrder(num_rows, seed).rows(epoch * num_rows, num_rows)
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@settings(deadline=None)
@given(num_rows=st.integers(1, 500), seed=seeds, start=st.integers(0, 5000), count=st.integers(0, 1200))
def test_random_access_equals_sequential(num_rows: int, seed: int, start: int, count: int) -> None:
    order = RowOrder(num_rows, seed)
    together = order.rows(start, count)
    one_by_one = [order.rows(start + i, 1)[0] for i in range(0, count, 97)]
    assert together[::97].tolist() == one_by_one
    assert np.array_equal(RowOrder(num_rows, seed).rows(0, start + count)[start:], together)


def test_the_order_never_changes() -> None:
    """Golden values: a run must continue the same order after an upgrade, on any machine."""
    assert RowOrder(10, 1337).rows(0, 20).tolist() == GOLDEN_10
    assert RowOrder(123_457, 42).rows(10**12, 6).tolist() == GOLDEN_BIG


GOLDEN_10 = [3, 4, 0, 8, 7, 2, 1, 6, 5, 9, 6, 3, 9, 8, 5, 7, 1, 0, 4, 2]
GOLDEN_BIG = [73204, 14435, 71127, 63285, 76499, 102718]


def test_positions_of_any_shape() -> None:
    order = RowOrder(50, 3)
    positions = np.arange(120).reshape(3, 4, 10)
    assert np.array_equal(order.at(positions), order.rows(0, 120).reshape(3, 4, 10))


def test_seeds_and_epochs_differ() -> None:
    n = 1000
    base = RowOrder(n, 1).rows(0, n)
    for other in (RowOrder(n, 2).rows(0, n), RowOrder(n, 1).rows(n, n), RowOrder(n, -1).rows(0, n)):
        assert (base == other).mean() < 0.02  # about one in n agrees by chance


@pytest.mark.parametrize("num_rows", [1000, 1024, 4097])
def test_the_shuffle_is_a_good_one(num_rows: int) -> None:
    epochs = 200
    rows = RowOrder(num_rows, 7).rows(0, num_rows * epochs).reshape(epochs, num_rows)
    places = np.arange(num_rows)
    correlation = [abs(np.corrcoef(places, epoch)[0, 1]) for epoch in rows]
    assert np.mean(correlation) < 1.5 / np.sqrt(num_rows)
    steps = np.diff(rows, axis=1)
    assert (steps == 1).mean() < 3 / num_rows  # neighbours stay neighbours no more often than by chance
    # Where a row falls: each tenth of the epoch gets it equally often (chi-square, 9 degrees of freedom, mean 9).
    where = np.argsort(rows, axis=1) * 10 // num_rows  # [epochs, row] -> tenth
    counts = np.stack([(where == tenth).sum(0) for tenth in range(10)])  # [10, num_rows]
    chi2 = ((counts - epochs / 10) ** 2 / (epochs / 10)).sum(0)
    assert 8.0 < chi2.mean() < 10.0


def test_an_order_needs_rows() -> None:
    with pytest.raises(UserError, match="at least one row"):
        RowOrder(0, 1)


@given(
    device_batch=st.integers(1, 5),
    accum=st.integers(1, 4),
    world=st.integers(1, 4),
    steps=st.integers(1, 4),
    first=st.integers(0, 9),
)
def test_a_plan_tiles_the_positions(device_batch: int, accum: int, world: int, steps: int, first: int) -> None:
    plan = BatchPlan(device_batch * accum * world, device_batch, world)
    assert plan.accum_steps == accum
    seen = [
        plan.positions(step, micro, rank)
        for step in range(first, first + steps)
        for micro in range(accum)
        for rank in range(world)
    ]
    start = first * plan.rows_per_step
    assert np.concatenate(seen).tolist() == list(range(start, start + steps * plan.rows_per_step))
    for rank in range(world):
        mine = [plan.positions(s, a, rank) for s in range(first, first + steps) for a in range(accum)]
        assert np.array_equal(plan.rank_positions(first * accum, (first + steps) * accum, rank), np.stack(mine))


def test_a_step_has_the_same_rows_at_any_world_size() -> None:
    for world, device_batch in ((1, 12), (2, 6), (3, 2), (6, 1)):
        plan = BatchPlan(12, device_batch, world)
        step = [plan.positions(3, a, r) for a in range(plan.accum_steps) for r in range(world)]
        assert np.concatenate(step).tolist() == list(range(36, 48))


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"20 rows per step.*3 workers.*device batch of 4.*12 or 24 rows"):
        BatchPlan(20, 4, 3)
    with pytest.raises(UserError, match="device batch of 5"):
        BatchPlan(20, 8, 2)
    with pytest.raises(UserError, match="world_size is 0"):
        BatchPlan(20, 4, 0)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    infos = []
    for index in range(3):
        ids = np.arange(7 * 5).reshape(7, 5) + 100 * index
        columns = {"ids": ids.astype(np.uint16), "mask": (ids % 2).astype(np.uint8)}
        infos.append(write_shard(str(tmp_path / f"{index}.arrow"), columns))
    Manifest(1, "train", 5, "uint16", 400, "x", ("ids", "mask"), tuple(infos), 1, 1, 1, {}).write(str(tmp_path))
    return ShardSet.open(str(tmp_path))


def test_the_stream_gives_the_planned_rows(shards: ShardSet) -> None:
    order = RowOrder(shards.num_rows, 3)
    everything = shards.read(np.arange(shards.num_rows))
    for world, device_batch in ((1, 2), (2, 2), (4, 1)):
        plan = BatchPlan(8, device_batch, world)
        for rank in range(world):
            batches = list(MmapStream(shards, order, plan, rank, 2, 9))
            assert len(batches) == 7 * plan.accum_steps
            for number, batch in enumerate(batches):
                step, micro = divmod(number, plan.accum_steps)
                positions = plan.positions(2 + step, micro, rank)
                assert np.array_equal(batch.positions, positions)
                assert np.array_equal(batch.rows, [order.rows(int(k), 1)[0] for k in positions])
                assert batch.ids.dtype == torch.int64
                assert batch.weights is not None
                assert np.array_equal(batch.ids.numpy(), everything["ids"][batch.rows])
                assert np.array_equal(batch.weights.numpy(), everything["mask"][batch.rows][:, 1:])


def test_inputs_and_targets(shards: ShardSet) -> None:
    columns = {"ids": np.array([[5, 6, 7]], np.uint16), "mask": np.array([[1, 0, 1]], np.uint8)}
    none = np.zeros(1, np.int64)
    batch = make_batch(columns, none, none)
    assert batch.inputs.tolist() == [[5, 6]]
    assert batch.targets.tolist() == [[-1, 7]]
    assert make_batch({"ids": columns["ids"]}, none, none).targets.tolist() == [[6, 7]]


def stream_threads() -> int:
    return sum(thread.name == "mmap-stream" for thread in threading.enumerate())


def test_leaving_early_stops_the_thread(shards: ShardSet) -> None:
    stream = iter(MmapStream(shards, RowOrder(21, 3), BatchPlan(2, 2, 1), 0, 0, 10**9))
    next(stream)
    assert stream_threads() == 1
    stream.close()  # type: ignore[attr-defined]
    assert stream_threads() == 0
    for _ in MmapStream(shards, RowOrder(21, 3), BatchPlan(2, 2, 1), 0, 0, 10**9):
        break
    assert stream_threads() == 0


def test_errors_reach_the_consumer(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = shards.read, iter(range(100))

    def fails_later(rows: np.ndarray) -> dict[str, np.ndarray]:
        if next(calls) == 1:
            raise DataError("shard x is damaged")
        return read(rows)

    monkeypatch.setattr(shards, "read", fails_later)

    def consume() -> Iterator[int]:
        for batch in MmapStream(shards, RowOrder(21, 3), BatchPlan(2, 2, 1), 0, 0, 100):
            yield len(batch.rows)

    batches = consume()
    assert next(batches) == 2
    with pytest.raises(DataError, match="shard x is damaged"):
        list(batches)
    assert stream_threads() == 0


def test_a_rank_outside_the_plan(shards: ShardSet) -> None:
    with pytest.raises(UserError, match="rank 2 is not one of the plan's 2 workers"):
        MmapStream(shards, RowOrder(21, 3), BatchPlan(4, 2, 2), 2, 0, 1)
