"""Where the rows of a stage come from: token shards in a keyed order, recall tasks mixed in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megacontext.data.recall_words import WordList
from megacontext.data.shards import ShardSet
from megacontext.data.stream import Batch, BatchPlan, MmapStream, RowOrder
from megacontext.data.tokenizer import Tokenizer
from megacontext.train.recall_mix import RecallMix

if TYPE_CHECKING:
    from megacontext.train.task import TrainTask


class Rows(Protocol):
    """A source of training rows. The rows of a step depend on the seed and the step alone, not on who reads them.

    `digest`: identity of the rows; a run continues on the same rows only. `every_target_counts`: no target of any row
    has a weight of 0.
    """

    @property
    def digest(self) -> str: ...

    @property
    def every_target_counts(self) -> bool: ...

    def read(
        self, plan: BatchPlan, rank: int, first_step: int, end_step: int, source: Iterator[Batch] | None = None
    ) -> Iterator[Batch]:
        """Micro-batches of a rank for steps [first_step, end_step). `source`: the same rows as stored, by another way."""


@dataclass(frozen=True)
class ShardRows:
    """Rows of token shards in `RowOrder`; `mix` puts recall tasks in the place of some."""

    shards: ShardSet
    seed: int
    mix: RecallMix | None = None

    @classmethod
    def open(cls, task: TrainTask, tokenizer: Tokenizer, verify: bool) -> ShardRows:
        """The training rows of a task. Raises DataError when the shards do not fit it, UserError when recall tasks do not."""
        shards = open_shards(task, task.train_tokens_dir, tokenizer, verify)
        memory, mix = task.memory, None
        if memory is not None and memory.mc_recall_share:
            words = WordList.from_tokenizer(tokenizer)
            mix = RecallMix(memory.mc_recall_share, task.seed, words, task.gpt.sequence_len + 1, memory.block_size,
                            memory.mc_recall_answer_weight)  # fmt: skip
        return cls(shards, task.seed, mix)

    @property
    def digest(self) -> str:
        """The checksums of all shards in order, hashed."""
        checksums = [(shard.rows, shard.crc32) for shard in self.shards.manifest.shards]
        return hashlib.sha256(repr(checksums).encode()).hexdigest()

    @property
    def every_target_counts(self) -> bool:
        return "mask" not in self.shards.manifest.columns

    def read(
        self, plan: BatchPlan, rank: int, first_step: int, end_step: int, source: Iterator[Batch] | None = None
    ) -> Iterator[Batch]:
        order = RowOrder(self.shards.num_rows, self.seed)
        stored = source or iter(MmapStream(self.shards, order, plan, rank, first_step, end_step))
        return stored if self.mix is None else self.mix.over(stored)


def open_shards(task: TrainTask, directory: str, tokenizer: Tokenizer, verify: bool) -> ShardSet:
    """The token shards of a folder. Raises DataError when they do not fit the task, or, with `verify`, are damaged."""
    shards = ShardSet.open(directory)
    shards.check_fits(vocab_size=task.gpt.vocab_size, tokenizer_digest=tokenizer.digest, seq_len=task.gpt.sequence_len)
    if verify:
        shards.verify()
    return shards
