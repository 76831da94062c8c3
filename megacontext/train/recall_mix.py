"""Generated recall tasks among the training rows: without them a model hardly learns to look things up.

Which rows are tasks, and which tasks, is a function of the seed and of a row's global position, so that a resumed run
and any number of workers train on the same ones. The text between the facts is that of the row a task takes the place of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megacontext.data.recall import recall_rows
from megacontext.data.recall_words import WordList
from megacontext.data.stream import Batch
from megacontext.train.views import RowRandom

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

QUESTIONS = 48  # of a row, or as many as half of it holds
_MIX = -3  # the number under which `RowRandom` says whether a row is a task


@dataclass
class RecallBatch(Batch):
    """A batch that holds tasks. Of each row's Q questions, -1 where it has fewer (text has none): `question_position`
    int64 [B, Q], the token at which the answer is predicted, and `evidence_block` [B, Q], the block that states it,
    after those of `earlier_block` [B, Q, 2] that said something else."""

    question_position: I64
    evidence_block: I64
    earlier_block: I64


@dataclass(frozen=True)
class RecallMix:
    """Puts tasks in the place of a `share` of the rows, T + 1 = `row_tokens` ids each, with facts in blocks of `block_size`.

    Raises UserError when a row is too short for them, or the vocabulary has too few words.
    """

    share: float
    seed: int
    words: WordList
    row_tokens: int
    block_size: int

    def __post_init__(self) -> None:
        self._row(0, np.zeros(self.row_tokens, np.int64))

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches with tasks mixed in."""
        try:
            for batch in batches:
                yield self.mixed(batch)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def mixed(self, batch: Batch) -> Batch:
        """One batch with tasks mixed in; the batch itself when none of its rows is one."""
        tasks = np.flatnonzero(self.is_task(batch.positions))
        if not len(tasks):
            return batch
        ids = batch.ids.clone()
        mask = None if batch.mask is None else batch.mask.clone()
        rows = [self._row(int(batch.positions[at]), batch.ids[at].numpy()) for at in tasks]
        made, *answers = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        ids[torch.from_numpy(tasks)] = torch.from_numpy(made)
        if mask is not None:
            mask[torch.from_numpy(tasks)] = 1
        of_all = [np.full((len(ids), *part.shape[1:]), -1, np.int64) for part in answers]
        for part, of_tasks in zip(of_all, answers, strict=True):
            part[tasks] = of_tasks
        return RecallBatch(ids, mask, batch.positions, batch.rows, *of_all)

    def is_task(self, positions: I64) -> Bool:
        """[B]: which rows are tasks, by their global positions [B]."""
        drawn = RowRandom(self.seed, positions, np.full(len(positions), _MIX)).random((len(positions), 1))
        return np.asarray(drawn[:, 0] < self.share)

    def _row(self, position: int, text: I64) -> tuple[I64, I64, I64, I64]:
        """Ids [1, T + 1], question positions and evidence blocks [1, Q], earlier blocks [1, Q, 2] of the task at a
        global position."""
        made = recall_rows(
            np.random.default_rng([self.seed % (1 << 64), position]), self.words, 1, self.row_tokens,
            block_size=self.block_size, haystack=text,
            questions=QUESTIONS, again=True,
        )  # fmt: skip
        return made.ids, made.question_position, made.evidence_block, made.earlier_block
