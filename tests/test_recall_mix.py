"""Which rows are recall tasks is a function of seed and position; the rest of a batch is untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megacontext.data.recall_words import WordList
from megacontext.data.stream import TASK, Batch
from megacontext.errors import UserError
from megacontext.train.recall_mix import RecallMix

T, VOCAB = 256, 600
WORDS = WordList.from_ids(np.arange(50, 550), bos=0)


def batch_at(positions: np.ndarray, masked: bool = False) -> Batch:
    rows = [np.random.default_rng(int(position)).integers(0, VOCAB, T + 1) for position in positions]
    weights = torch.zeros(len(rows), T) if masked else None
    return Batch(torch.from_numpy(np.stack(rows)), positions, positions + 1000, weights)


def mix(share: float = 0.4, seed: int = 3) -> RecallMix:
    return RecallMix(share, seed, WORDS, T + 1, 16)


def test_rows_do_not_depend_on_the_batch_they_are_in() -> None:
    whole = mix().mixed(batch_at(np.arange(40, 56)))
    assert whole.questions is not None
    parts = [mix().mixed(batch_at(np.arange(at, at + 4))) for at in range(40, 56, 4)]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    tasks = mix().is_task(whole.positions)
    assert 0 < tasks.sum() < 16
    assert torch.equal(whole.ids[~torch.from_numpy(tasks)], batch_at(np.arange(40, 56)).ids[~torch.from_numpy(tasks)])
    assert np.array_equal(whole.kind == TASK, tasks)
    assert ((whole.questions.position >= 0).any(1) == tasks).all()
    assert np.array_equal(whole.rows, np.arange(1040, 1056))


def test_share_seed_and_position_decide() -> None:
    positions = np.arange(20_000)
    share = mix(0.25).is_task(positions).mean()
    assert share == pytest.approx(0.25, abs=0.01)
    assert mix(1.0).is_task(positions).all()
    assert (mix(0.25).is_task(positions) <= mix(0.5).is_task(positions)).all()
    assert not np.array_equal(mix(seed=3).is_task(positions), mix(seed=4).is_task(positions))
    one, other = (mix(1.0, seed).mixed(batch_at(np.arange(2))).ids for seed in (3, 4))
    assert not torch.equal(one, other)


def test_questions_point_at_their_facts() -> None:
    made = mix(1.0).mixed(batch_at(np.arange(30)))
    assert made.questions is not None
    for row in range(30):
        for position, block in zip(made.questions.position[row], made.questions.evidence[row], strict=True):
            if position < 0:
                continue
            ask, *key = made.ids[row, position - 2 : position + 1].tolist()
            assert ask == WORDS.ask
            inside = made.ids[row, block * 16 : (block + 1) * 16].tolist()
            assert [WORDS.tell, *key] in [inside[at : at + 3] for at in range(14)], "the block states what is asked for"
            assert (block + 1) * 16 <= position - 2


def test_all_targets_of_a_task_count_and_batches_without_tasks_pass_as_they_are() -> None:
    made = mix(1.0).mixed(batch_at(np.arange(3), masked=True))
    assert made.weights is not None
    assert made.weights.eq(1).all()
    batch = batch_at(np.arange(3))
    assert mix(0.0).mixed(batch) is batch


def test_the_stream_is_closed_with_its_source() -> None:
    closed = []

    def source():  # type: ignore[no-untyped-def]
        try:
            yield from (batch_at(np.arange(2)) for _ in range(5))
        finally:
            closed.append(True)

    stream = mix().over(source())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert closed == [True]


def test_rows_too_short_for_a_task_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="a row of 33 tokens"):
        RecallMix(0.5, 0, WORDS, 33, 16)
