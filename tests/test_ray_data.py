"""Ray Data gives exactly the batches of the memory map, from any step. With Ray Train's workers: test_launch.py."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S

from megacontext.data.shards import Manifest, ShardSet, write_shard
from megacontext.data.stream import Batch, BatchPlan, MmapStream, RowOrder
from megacontext.errors import DataError, UserError

pytestmark = pytest.mark.ray
ROW_TOKENS, SEED = 17, 11
BLOCK_BYTES = 2000  # a few micro-batches, so that small data has many blocks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 333 rows in all, with a mask."""
    folder = str(tmp_path_factory.mktemp("tokens"))
    generator = np.random.default_rng(0)
    infos = []
    for index, rows in enumerate((100, 33, 200)):
        columns = {
            "ids": generator.integers(0, 60000, (rows, ROW_TOKENS)).astype(np.uint16),
            "mask": generator.integers(0, 2, (rows, ROW_TOKENS)).astype(np.uint8),
        }
        infos.append(write_shard(f"{folder}/{index}.arrow", columns))
    Manifest(1, "train", ROW_TOKENS, "uint16", 60000, "x", ("ids", "mask"), tuple(infos), 1, 1, 1, {}).write(folder)
    return folder


def oracle(directory: str, plan: BatchPlan, rank: int, start: int, end: int) -> MmapStream:
    shards = ShardSet.open(directory)
    return MmapStream(shards, RowOrder(shards.num_rows, SEED), plan, rank, start, end)


def ray_stream(directory: str, plan: BatchPlan, rank: int, start: int, end: int, block_bytes: int = BLOCK_BYTES) -> Any:
    from jobs.runtime.ray_data import RayStream, build_dataset

    dataset = build_dataset(directory, SEED, plan, rank, start, end, block_bytes)
    return RayStream(dataset.iterator(), plan, rank, start, end)


def assert_same(ours: Batch, want: Batch) -> None:
    assert np.array_equal(ours.positions, want.positions)
    assert np.array_equal(ours.rows, want.rows)
    assert ours.ids.dtype == want.ids.dtype
    assert ours.ids.equal(want.ids)
    assert ours.weights is not None
    assert want.weights is not None
    assert ours.weights.equal(want.weights)
    assert np.array_equal(ours.kind, want.kind)
    assert np.array_equal(ours.end, want.end)


@pytest.mark.parametrize(
    ("rows_per_step", "device_batch", "world", "start", "end", "pause_s"),
    [(6, 3, 1, 0, 40, 0.0), (8, 2, 2, 7, 50, 0.0), (12, 1, 3, 3, 14, 0.01), (4, 4, 1, 99, 100, 0.0)],
)
def test_the_same_batches_as_the_memory_map(
    ray_cluster: Any,
    directory: str,
    rows_per_step: int,
    device_batch: int,
    world: int,
    start: int,
    end: int,
    pause_s: float,
) -> None:
    """Also over the end of an epoch, with a part of a block at the end, and with a consumer slower than the reads."""
    plan = BatchPlan(rows_per_step, device_batch, world)
    for rank in range(world):
        count = 0
        ours, want = ray_stream(directory, plan, rank, start, end), oracle(directory, plan, rank, start, end)
        for mine, theirs in zip(ours, want, strict=True):
            assert_same(mine, theirs)
            count += 1
            time.sleep(pause_s)
        assert count == (end - start) * plan.accum_steps


def test_a_stream_that_begins_elsewhere_is_refused(ray_cluster: Any, directory: str) -> None:
    from jobs.runtime.ray_data import RayStream, build_dataset

    plan = BatchPlan(4, 2, 2)
    dataset = build_dataset(directory, SEED, plan, 0, 5, 9, BLOCK_BYTES)
    with pytest.raises(DataError, match=r"rank 0.*position 24 is due.*--stream mmap"):
        next(RayStream(dataset.iterator(), plan, 0, 6, 9))  # another step
    with pytest.raises(DataError, match=r"rank 1.*position 22 is due"):
        next(RayStream(dataset.iterator(), plan, 1, 5, 9))  # another rank


def test_a_stream_that_ends_early_is_refused(ray_cluster: Any, directory: str) -> None:
    from jobs.runtime.ray_data import RayStream, build_dataset

    plan = BatchPlan(4, 2, 2)
    dataset = build_dataset(directory, SEED, plan, 0, 0, 3, BLOCK_BYTES)
    stream = RayStream(dataset.iterator(), plan, 0, 0, 4)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(DataError, match="ended at micro-batch 3 of 4"):
        next(stream)


def test_leaving_early_stops_the_execution(ray_cluster: Any, directory: str) -> None:
    def executors() -> int:
        ours = set(threading.enumerate()) - before  # on a busy machine those of earlier tests may still be ending
        return sum("StreamingExecutor" in thread.name for thread in ours)

    before = set(threading.enumerate())
    stream = ray_stream(directory, BatchPlan(2, 2, 1), 0, 0, 5000)
    next(stream)
    assert executors() == 1
    stream.close()
    deadline = time.monotonic() + PATIENCE_S
    while executors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert executors() == 0


def test_a_waiting_stream_leaves_the_cpu_alone(ray_cluster: Any, directory: str) -> None:
    """Ray's scheduling loop spins when its reader is slow; `Pacing` must hold it back to a few per cent of a core."""
    stream = ray_stream(directory, BatchPlan(2, 2, 1), 0, 0, 20_000)
    next(stream)
    time.sleep(1.0)
    before = time.process_time()
    time.sleep(3.0)
    spent = time.process_time() - before
    stream.close()
    assert spent < 1.0


def test_reads_ahead_only_so_far(
    ray_cluster: Any, directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that stops must not fill the object store."""
    from jobs.runtime import ray_data

    class CountedRows(ray_data.RankRows):
        def block(self, first: int, last: int) -> Any:
            (tmp_path / f"{first}").touch()
            return super().block(first, last)

    monkeypatch.setattr(ray_data, "RankRows", CountedRows)
    stream = ray_stream(directory, BatchPlan(2, 2, 1), 0, 0, 20_000)
    blocks = len(range(0, 20_000, BLOCK_BYTES // ((17 * 3 + 16) * 2)))
    next(stream)
    made, quiet_since = 0, time.monotonic()
    while time.monotonic() < quiet_since + 3.0 and made < blocks / 10:
        if (now := len(list(tmp_path.iterdir()))) != made:
            made, quiet_since = now, time.monotonic()
        time.sleep(0.1)
    stream.close()
    assert made <= 4 * ray_data.BLOCKS_IN_STORE < blocks / 10


def test_settings_stay_with_the_dataset(ray_cluster: Any, directory: str) -> None:
    """Other datasets of the same process keep Ray's defaults."""
    import ray.data

    from jobs.runtime.ray_data import Pacing, build_dataset

    build_dataset(directory, SEED, BatchPlan(2, 2, 1), 0, 0, 5)
    context = ray.data.DataContext.get_current()
    assert Pacing not in context.custom_execution_callback_classes
    assert not context.execution_options.preserve_order


def test_missing_shards_and_no_steps(ray_cluster: Any, directory: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare_data"):
        ray_stream(str(tmp_path), BatchPlan(2, 2, 1), 0, 0, 5)
    with pytest.raises(UserError, match="step 5 of 5"):
        ray_stream(directory, BatchPlan(2, 2, 1), 0, 5, 5)
