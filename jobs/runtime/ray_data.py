"""Token rows through Ray Data, in exactly the order of `megacontext.data.stream`.

Each rank has a dataset of its own, `train_<rank>`, whose blocks are a few hundred of that rank's micro-batches in
order. A dataset that is split among ranks would need Ray's splitter to hand block i to rank i mod n, which it does
today and does not promise ("does not provide any ordering guarantees"); with one dataset a rank nothing has to be
promised but the order of blocks. Every block still carries its positions, and `RayStream` compares each with the
position that is due, so a surprise ends the run with a DataError instead of training on the wrong rows.

The datasets are callables, which Ray Train calls anew for every worker group: a restarted group starts at the step of
its checkpoint. A dataset holds at most a few blocks ahead of training, and its reads need a tenth of a CPU.

    datasets = rank_datasets(train_dir, seed, plan, start_step=newest_step, end_step=end)
    TorchTrainer(loop, datasets=datasets, dataset_config=RankDataConfig(), ...)
    for batch in RayStream.of_worker(plan, rank, start_step, end_step): ...     # inside the loop
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ExecutionOptions, ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback  # no public name for the type that
from ray.data.block import BlockMetadata  # DataContext.custom_execution_callback_classes asks for
from ray.data.datasource import ReadTask
from ray.train import DataConfig

from megacontext.data.shards import ShardSet, to_arrow
from megacontext.data.stream import Batch, BatchPlan, RowOrder, make_batch
from megacontext.errors import DataError, UserError

BLOCK_BYTES = 8 << 20
BLOCKS_IN_STORE = 8  # bound on what one rank's dataset may keep in the object store ahead of training
READ_CPUS = 0.1  # reading is a gather from the page cache; training may reserve nearly every CPU of a small machine
READS_AT_ONCE = 2
PACE_S = 0.3


@dataclass(frozen=True)
class RankRows:
    """Which rows one rank reads, as plain data that crosses to a read task."""

    directory: str
    num_rows: int
    seed: int
    plan: BatchPlan
    rank: int

    def block(self, first: int, last: int) -> pa.Table:
        """Micro-batches [first, last) of this rank as one table: the columns of the shards, position, row."""
        positions = self.plan.rank_positions(first, last, self.rank).reshape(-1)
        rows = RowOrder(self.num_rows, self.seed).at(positions)
        columns = {name: to_arrow(values) for name, values in _shards(self.directory, self.num_rows).read(rows).items()}
        return pa.table({**columns, "position": positions, "row": rows})


@lru_cache(maxsize=4)
def _shards(directory: str, num_rows: int) -> ShardSet:
    """The shards of a folder, kept open by a Ray worker process from task to task."""
    shards = ShardSet.open(directory)
    if shards.num_rows != num_rows:
        raise DataError(
            f"token folder {directory!r} has {shards.num_rows} rows here, {num_rows} where the run began: it was "
            "rewritten, or this node sees another folder. Restore it, or start another --run."
        )
    return shards


class RankSource(Datasource):
    """A Ray datasource of one rank's micro-batches [first, last), `per_block` of them a block and a read task."""

    def __init__(self, rows: RankRows, first: int, last: int, per_block: int, row_bytes: int) -> None:
        super().__init__()
        self._rows, self._row_bytes = rows, row_bytes
        self.spans = [(start, min(start + per_block, last)) for start in range(first, last, per_block)]

    def get_name(self) -> str:
        return f"TokenRows{self._rows.rank}"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(last - first for first, last in self.spans) * self._rows.plan.device_batch * self._row_bytes

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task a block, whatever parallelism Ray would like."""
        tasks = []
        for first, last in self.spans:
            count = (last - first) * self._rows.plan.device_batch
            size = count * self._row_bytes
            meta = BlockMetadata(num_rows=count, size_bytes=size, input_files=None, exec_stats=None)
            tasks.append(ReadTask(partial(_read_block, self._rows, first, last), meta))
        return tasks


def _read_block(rows: RankRows, first: int, last: int) -> Iterable[pa.Table]:
    return [rows.block(first, last)]


def build_dataset(
    shard_dir: str,
    seed: int,
    plan: BatchPlan,
    rank: int,
    start_step: int,
    end_step: int,
    block_bytes: int = BLOCK_BYTES,
) -> ray.data.Dataset:
    """One rank's rows of steps [start_step, end_step) as a lazy dataset. Nothing is read until it is iterated.

    Raises DataError when the shards cannot be opened, UserError when there are no steps.
    """
    if end_step <= start_step:
        raise UserError(f"no steps to stream: the run is at step {start_step} of {end_step}. Raise --num_iterations.")
    shards = ShardSet.open(shard_dir)
    row_bytes = shards.row_bytes + 16  # position and row are int64
    per_block = max(1, block_bytes // (row_bytes * plan.device_batch))
    rows = RankRows(shard_dir, shards.num_rows, seed, plan, rank)
    source = RankSource(rows, start_step * plan.accum_steps, end_step * plan.accum_steps, per_block, row_bytes)
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=len(source.spans),
        concurrency=min(READS_AT_ONCE, len(source.spans)),
        num_cpus=READ_CPUS,
    )
    context = dataset.context
    context.enable_progress_bars = False  # the training log shows progress
    context.execution_options = execution_options(block_bytes)
    context.target_max_block_size = 4 * block_bytes  # a block is never split, and budgets are made for small ones
    if Pacing not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Pacing]
    return dataset


def rank_datasets(
    shard_dir: str,
    seed: int,
    plan: BatchPlan,
    start_step: Callable[[], int],
    end_step: int,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Callable[[], ray.data.Dataset]]:
    """`datasets=` of a TorchTrainer: one callable a rank.

    `start_step` is called in Ray Train's controller whenever a worker group starts, and must say the step at which
    that group will begin: that of the newest intact checkpoint.
    """

    def build(rank: int) -> ray.data.Dataset:
        return build_dataset(shard_dir, seed, plan, rank, min(start_step(), end_step - 1), end_step, block_bytes)

    return {dataset_name(rank): partial(build, rank) for rank in range(plan.world_size)}


def dataset_name(rank: int) -> str:
    """Name of a rank's dataset."""
    return f"train_{rank}"


class Pacing(ExecutionCallback):
    """A sleep in each turn of Ray Data's scheduling loop, short at first so that the first block comes soon.

    The loop waits for running tasks and for nothing else: when it is ahead of training (Ray 2.60) it turns without a
    pause, takes a whole CPU core, and holds the interpreter lock of the process that trains. Measured with a slow
    reader: 99 % of a core without this, 2 % with a sleep of 50 ms, less with longer ones.
    """

    def __init__(self) -> None:
        self._turns = 0

    def on_execution_step(self, executor: Any) -> None:
        self._turns += 1
        time.sleep(min(PACE_S, 0.01 * self._turns))


class RankDataConfig(DataConfig):
    """`dataset_config=` of a TorchTrainer: every dataset whole, in order, within a memory bound.

    Each rank executes its own dataset in its own process, so a run needs no coordinating actor.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__(
            datasets_to_split=[], execution_options=execution_options(block_bytes), enable_shard_locality=False
        )


def execution_options(block_bytes: int = BLOCK_BYTES) -> ExecutionOptions:
    """Blocks in order, and at most a few of them ahead of the reader."""
    limits = ExecutionResources(object_store_memory=BLOCKS_IN_STORE * block_bytes)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)


class RayStream(Iterator[Batch]):
    """Micro-batches of one rank out of its Ray dataset, each checked to be the one that is due.

    Raises DataError when a block is not the expected one or the stream ends before `end_step`.
    """

    def __init__(
        self, iterator: ray.data.DataIterator, plan: BatchPlan, rank: int, start_step: int, end_step: int
    ) -> None:
        self._plan, self._rank = plan, rank
        self._due, self._last = start_step * plan.accum_steps, end_step * plan.accum_steps
        self._batches = self._iterate(iterator)

    @classmethod
    def of_worker(cls, plan: BatchPlan, rank: int, start_step: int, end_step: int) -> RayStream:
        """The stream of this Ray Train worker."""
        return cls(ray.train.get_dataset_shard(dataset_name(rank)), plan, rank, start_step, end_step)

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Stop reading ahead; safe at any time."""
        self._batches.close()

    def _iterate(self, iterator: ray.data.DataIterator) -> Iterator[Batch]:
        if self._due >= self._last:
            return
        blocks = iter(iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        try:
            for table in blocks:
                yield from self._unpack(table)
            if self._due < self._last:
                raise DataError(
                    f"Ray Data's stream of rank {self._rank} ended at micro-batch {self._due} of {self._last}; "
                    "resume the run, or use --stream mmap."
                )
        finally:
            close = getattr(blocks, "close", None)
            if close is not None:
                close()

    def _unpack(self, table: pa.Table) -> Iterator[Batch]:
        size = self._plan.device_batch
        columns = {name: _flat(table, name) for name in table.column_names}
        positions, rows = columns.pop("position"), columns.pop("row")
        count = len(positions) // size
        want = self._plan.rank_positions(self._due, self._due + count, self._rank).reshape(-1)
        if len(positions) % size or not np.array_equal(positions, want) or self._due + count > self._last:
            raise DataError(
                f"Ray Data gave rank {self._rank} {len(positions)} rows from position {positions[:1]}, but position "
                f"{self._plan.rank_positions(self._due, self._due + 1, self._rank)[0, 0]} is due (micro-batch {self._due} of "
                f"{self._last}, {size} rows each). Resume the run, or use --stream mmap."
            )
        for start in range(0, len(positions), size):
            part = slice(start, start + size)
            self._due += 1
            yield make_batch({name: values[part] for name, values in columns.items()}, positions[part], rows[part])


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """A column as numpy: [n] for numbers, [n, width] for fixed-size lists; without a copy for a single chunk."""
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not pa.types.is_fixed_size_list(array.type):
        return array.to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
