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

from megacontext.data.ahead import mapped
from megacontext.data.recall import RecallRows, recall_rows
from megacontext.data.recall_words import WordList
from megacontext.data.stream import TASK, Batch, Questions
from megacontext.train.views import RowRandom

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

QUESTIONS = 48  # of a row, or as many as half of it holds
_MIX = -3  # the number under which `RowRandom` says whether a row is a task


@dataclass(frozen=True)
class RecallMix:
    """Puts tasks in the place of a `share` of the rows, T + 1 = `row_tokens` ids each, with facts in blocks of `block_size`.

    `answer_weight`: loss weight of an answer's token; other tokens of a task have 1. Raises UserError when a row is too
    short for a task, or the vocabulary has too few words.
    """

    share: float
    seed: int
    words: WordList
    row_tokens: int
    block_size: int
    answer_weight: float = 1.0

    def __post_init__(self) -> None:
        self._row(0, np.zeros(self.row_tokens, np.int64))

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches with tasks mixed in."""
        return mapped(self.mixed, batches)

    def mixed(self, batch: Batch) -> Batch:
        """One batch with tasks mixed in; the batch itself when none of its rows is one."""
        tasks = np.flatnonzero(self.is_task(batch.positions))
        if not len(tasks):
            return batch
        rows = [self._row(int(batch.positions[at]), batch.ids[at].numpy()) for at in tasks]
        ids, kind, at = batch.ids.clone(), batch.kind.copy(), torch.from_numpy(tasks)
        ids[at] = torch.from_numpy(np.concatenate([row.ids for row in rows]))
        kind[tasks] = TASK
        count = len(ids)
        questions = Questions(
            _spread(count, tasks, [row.question_position for row in rows]),
            _spread(count, tasks, [row.evidence_block for row in rows]),
            _spread(count, tasks, [row.earlier_block for row in rows]),
        )
        weights = batch.weights
        if weights is not None or self.answer_weight != 1:
            weights = torch.ones(batch.inputs.shape) if weights is None else weights.clone()
            weights[at] = 1
            row, number = np.nonzero(questions.position >= 0)
            weights[row, questions.position[row, number]] = self.answer_weight
        end = batch.end.copy()
        end[tasks] = batch.inputs.shape[1]
        return Batch(ids, batch.positions, batch.rows, weights, kind, end, questions)

    def is_task(self, positions: I64) -> Bool:
        """[B]: which rows are tasks, by their global positions [B]."""
        drawn = RowRandom(self.seed, positions, np.full(len(positions), _MIX)).random((len(positions), 1))
        return np.asarray(drawn[:, 0] < self.share)

    def _row(self, position: int, text: I64) -> RecallRows:
        """The task at a global position: one row."""
        return recall_rows(
            np.random.default_rng([self.seed % (1 << 64), position]), self.words, 1, self.row_tokens,
            block_size=self.block_size, haystack=text,
            questions=QUESTIONS, again=True,
        )  # fmt: skip


def _spread(count: int, tasks: I64, of_tasks: list[I64]) -> I64:
    """Numbers of the tasks as numbers of all rows of a batch, -1 in the rows that are no tasks."""
    numbers = np.concatenate(of_tasks)
    of_all = np.full((count, *numbers.shape[1:]), -1, np.int64)
    of_all[tasks] = numbers
    return of_all
