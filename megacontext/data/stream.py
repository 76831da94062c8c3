"""Which row is trained on when, and a reader that follows that order.

The order is arithmetic: global position k names a row through a keyed permutation of each epoch, and a plan says which
positions a rank takes in which micro-batch. So a run resumes at any step, at any world size, from one integer, and
nothing is shuffled in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from megacontext.data.ahead import ahead
from megacontext.data.shards import ShardSet
from megacontext.errors import UserError

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
_ROUNDS = 6
_CHUNK_BATCHES = 16  # micro-batches read at once: the order and the gather cost little more for many than for one
_CHUNK_BYTES = 4 << 20
_MASK64 = (1 << 64) - 1


def _mix(x: U64) -> U64:
    """A 64-bit finalizer (SplitMix64 of Steele, Lea and Flood, 2014): every input bit flips half the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RowOrder:
    """An endless order over rows: position k is a row of epoch k // num_rows, each row once an epoch.

    Each epoch is its own balanced Feistel permutation (Luby and Rackoff, 1988) of the next power of four, walked along
    its cycle until it lands inside [0, num_rows) (Black and Rogaway, 2002): at most four steps on average. It is a
    pure function of (num_rows, seed, position) in integer arithmetic, the same on every machine and version.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise UserError(f"an order needs at least one row, not {num_rows}.")
        self.num_rows = num_rows
        self.seed = seed
        self._half_bits = np.uint64(max(1, ((num_rows - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._seed = _mix(np.array([seed & _MASK64], dtype=np.uint64))

    def rows(self, start: int, count: int) -> I64:
        """Rows at positions [start, start + count): int64 [count]."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: I64) -> I64:
        """Rows at any positions, in O(len(positions)) memory: int64 of the same shape."""
        epochs, offsets = np.divmod(positions.astype(np.int64).reshape(-1), self.num_rows)
        with np.errstate(over="ignore"):  # wrapping around 2^64 is the arithmetic that is meant
            keys = _mix(self._seed + epochs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
            x = self._permute(offsets.astype(np.uint64), keys)
            outside = np.flatnonzero(x >= self.num_rows)
            while outside.size:
                x[outside] = self._permute(x[outside], keys[outside])
                outside = outside[x[outside] >= self.num_rows]
        return x.astype(np.int64).reshape(positions.shape)

    def _permute(self, x: U64, keys: U64) -> U64:
        left, right = x >> self._half_bits, x & self._half_mask
        for round_number in range(_ROUNDS):
            tweak = np.uint64((round_number + 1) << 56)
            left, right = right, left ^ (_mix(keys ^ right ^ tweak) & self._half_mask)
        return (left << self._half_bits) | right


@dataclass(frozen=True)
class BatchPlan:
    """How a step's rows are laid out over micro-batches and ranks.

    Row j of micro-batch a of rank r at step s has the global position
    `s·rows_per_step + a·world_size·device_batch + r·device_batch + j`: the rows of a step do not depend on the number
    of workers, only who reads them does.

    Raises UserError when rows_per_step is not a multiple of world_size·device_batch.
    """

    rows_per_step: int
    device_batch: int
    world_size: int

    def __post_init__(self) -> None:
        for name in ("rows_per_step", "device_batch", "world_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        together = self.world_size * self.device_batch
        if self.rows_per_step % together:
            raise UserError(
                f"{self.rows_per_step} rows per step cannot be shared by {self.world_size} workers with a device batch of "
                f"{self.device_batch}: they take {together} rows at a time. Use {_nearest(self.rows_per_step, together)} "
                f"rows per step, or a device batch of {self._fitting_batch()}."
            )

    @property
    def accum_steps(self) -> int:
        """Micro-batches of a rank per optimizer step."""
        return self.rows_per_step // (self.world_size * self.device_batch)

    def positions(self, step: int, micro: int, rank: int) -> I64:
        """Global positions of one micro-batch: int64 [device_batch]."""
        start = step * self.rows_per_step + (micro * self.world_size + rank) * self.device_batch
        return np.arange(start, start + self.device_batch, dtype=np.int64)

    def rank_positions(self, first: int, last: int, rank: int) -> I64:
        """Positions of micro-batches [first, last) of one rank, counted over all steps: int64 [last - first, device_batch]."""
        starts = (np.arange(first, last, dtype=np.int64) * self.world_size + rank) * self.device_batch
        return starts[:, None] + np.arange(self.device_batch, dtype=np.int64)

    def _fitting_batch(self) -> int:
        share = self.rows_per_step // self.world_size
        if self.rows_per_step % self.world_size:
            return 1  # no device batch fits this world size; the nearest rows per step are the remedy
        return max(size for size in range(1, min(self.device_batch, share) + 1) if share % size == 0)


def _nearest(value: int, unit: int) -> str:
    """The multiples of `unit` just below and above a value."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


TEXT, TASK, CHAT = 0, 1, 2  # kinds of rows: documents, generated recall tasks, conversations


@dataclass(frozen=True)
class Questions:
    """Questions of B rows whose answers are known: at most Q a row, -1 where a row has fewer.

    `position` int64 [B, Q]: the token at which the answer is predicted. `evidence` [B, Q]: the block that states the
    answer. `earlier` [B, Q, 2]: blocks before it that stated another value of the same key.
    """

    position: I64
    evidence: I64
    earlier: I64


@dataclass
class Batch:
    """One micro-batch of one rank: B rows of T+1 ids, int64 [B, T+1].

    `positions` [B]: global positions of the rows in the order of training. `rows` [B]: their numbers in the shards.
    `weights` float32 [B, T]: factor of each target in the loss, 0 where a target does not count; None: all are 1.
    `kind` [B]: TEXT, TASK or CHAT. `end` [B]: inputs before the padding, T for a full row. All of [B] are int64.
    """

    ids: torch.Tensor
    positions: I64
    rows: I64
    weights: torch.Tensor | None = None
    kind: I64 = field(default_factory=lambda: np.empty(0, np.int64))
    end: I64 = field(default_factory=lambda: np.empty(0, np.int64))
    questions: Questions | None = None

    def __post_init__(self) -> None:
        rows, width = self.ids.shape
        self.kind = self.kind if len(self.kind) else np.full(rows, TEXT)
        self.end = self.end if len(self.end) else np.full(rows, width - 1)

    @property
    def inputs(self) -> torch.Tensor:
        """[B, T] int64."""
        return self.ids[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """[B, T] int64; -1 where the weight is 0."""
        return self.ids[:, 1:] if self.weights is None else torch.where(self.weights != 0, self.ids[:, 1:], -1)


class MmapStream:
    """Micro-batches of one rank for steps [start_step, end_step), read from the memory map in a thread ahead of use.

    Iterate once or more; leaving the loop early stops the thread. An error while reading is raised where the batch
    would have come. It is the oracle of every other stream, and the reader of runs without Ray.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: RowOrder,
        plan: BatchPlan,
        rank: int,
        start_step: int,
        end_step: int,
        prefetch: int = 4,
    ) -> None:
        if not 0 <= rank < plan.world_size:
            raise UserError(f"rank {rank} is not one of the plan's {plan.world_size} workers; launch with that many.")
        self._shards, self._order, self._plan, self._rank = shards, order, plan, rank
        self._first, self._last = start_step * plan.accum_steps, end_step * plan.accum_steps
        self._prefetch = max(1, prefetch)
        self._chunk = max(1, min(_CHUNK_BATCHES, _CHUNK_BYTES // (shards.row_bytes * plan.device_batch)))

    def __iter__(self) -> Iterator[Batch]:
        return ahead(self._read(), self._prefetch, "mmap-stream")

    def _read(self) -> Iterator[Batch]:
        for first in range(self._first, self._last, self._chunk):
            yield from self._batches(first, min(first + self._chunk, self._last))

    def _batches(self, first: int, last: int) -> list[Batch]:
        """Micro-batches [first, last) of this rank, counted from step 0, by one gather."""
        positions = self._plan.rank_positions(first, last, self._rank)  # [last - first, device_batch]
        rows = self._order.at(positions)
        columns = self._shards.read(rows.reshape(-1))
        size = self._plan.device_batch
        return [
            make_batch({name: a[i * size : (i + 1) * size] for name, a in columns.items()}, positions[i], rows[i])
            for i in range(last - first)
        ]


def make_batch(columns: dict[str, npt.NDArray[np.generic]], positions: I64, rows: I64) -> Batch:
    """A batch from the columns of shards (`shards.COLUMNS`) for rows at `positions` [B]."""
    mask, none = columns.get("mask"), np.empty(0, np.int64)
    return Batch(
        ids=torch.from_numpy(columns["ids"].astype(np.int64)),
        positions=positions,
        rows=rows,
        weights=None if mask is None else torch.from_numpy(mask[:, 1:].astype(np.float32)),
        kind=columns.get("kind", none).astype(np.int64),
        end=columns.get("end", none).astype(np.int64),
    )
