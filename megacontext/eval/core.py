"""The CORE metric: scores the questions of `core_tasks.py` with a model.

Options of a question share most of their tokens (examples and query). They are packed into one sequence: the shared
prefix once, then each option as a branch that attends to the prefix and itself, at the positions it would have alone
(the tree attention of SpecInfer, Miao et al. 2023). Sequences of similar length are batched across items, padded on
the right, and the vocabulary is multiplied only where a token is judged. `pack=False` scores every row on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megacontext.errors import DataError
from megacontext.eval.core_tasks import (
    NAMED,
    CoreBundle,
    CoreTask,
    Question,
    build_question,
    check_items,
    common_length,
    load_items,
)
from megacontext.inference.engine import rotary_at

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer
    from megacontext.model.gpt import GPT

BATCH_TOKENS = 8192
MASK_ENTRIES = 1 << 25  # most attention mask entries of a batch: 32 MiB
LOGIT_ENTRIES = 1 << 25  # most logits in memory at a time: 128 MiB


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of one task, centred so that guessing is 0 and perfect is 1, and the verdict of each item."""

    label: str
    accuracy: float
    baseline: float
    correct: tuple[bool, ...]

    @property
    def centered(self) -> float:
        return (self.accuracy - self.baseline) / (1.0 - self.baseline)


@dataclass(frozen=True)
class CoreResult:
    """All tasks that could be scored, and the labels of those that have no file."""

    tasks: tuple[TaskResult, ...]
    missing: tuple[str, ...]

    @property
    def core(self) -> float:
        """Mean centred accuracy over the scored tasks; there is at least one."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def coverage(self) -> str:
        """How many of the listed tasks the mean is over."""
        return f"{len(self.tasks)} of {len(self.tasks) + len(self.missing)} tasks"


@dataclass(frozen=True)
class Packed:
    """One packed sequence: ids, their positions, the branch of each (0: shared prefix), and what is judged.

    judged[k] = (question, row, slot, target): the hidden state at `slot` predicts id `target` of that row.
    """

    ids: list[int]
    positions: list[int]
    branches: list[int]
    judged: list[tuple[int, int, int, int]]

    @property
    def plain(self) -> bool:
        """Whether causal attention is all that is needed."""
        return self.branches[-1] <= 1


def evaluate_core(
    model: GPT,
    tokenizer: Tokenizer,
    bundle: CoreBundle,
    max_per_task: int = -1,
    max_seq_len: int | None = None,
    pack: bool = True,
    say: Callable[[str], None] = print,
) -> CoreResult:
    """Score every task of the bundle that has a file, at most max_per_task items each (-1: all).

    max_seq_len crops prompts from the left; None keeps them whole, as nanochat does for its own models. When
    torch.distributed runs, ranks share the items, all get the result and rank 0 speaks. All task files are read before
    the first is scored, so bad input costs no model time. An item with an option of which nothing is judged has the
    verdict that nanochat gives it, and its line is named. Raises DataError as `load_items` and `build_question` do, and
    when no task of the bundle has a file.
    """
    if not bundle.available:
        raise DataError(
            f"none of the {len(bundle.tasks)} tasks of the bundle has a file; CORE would be a mean of nothing."
        )
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    speak = say if rank == 0 else lambda line: None
    for label in bundle.missing:
        speak(f"CORE {label}: skipped, its file is not in the bundle")
    loaded = [(task, load_items(task, max_per_task)) for task in bundle.available]
    for task, items in loaded:
        check_items(task, tokenizer, items)
    results = []
    for task, items in loaded:
        share = _my_share(len(items))
        questions = [build_question(task, tokenizer, items, index, max_seq_len) for index in share]
        lines = [items[i].line for i, q in zip(share, questions, strict=True) if any(a >= b for a, b in q.spans)]
        if lines:  # whichever rank has them
            say(_unjudged(task, sorted(lines)))
        verdicts = _gather(score_questions(model, questions, pack), len(items), model)
        results.append(TaskResult(task.label, sum(verdicts) / len(verdicts), task.baseline, tuple(verdicts)))
        speak(_line(task, results[-1]))
    result = CoreResult(tuple(results), bundle.missing)
    speak(f"CORE {result.core:.4f} over {result.coverage}")
    return result


def _line(task: CoreTask, result: TaskResult) -> str:
    return (
        f"CORE {task.label}: accuracy {result.accuracy:.4f}, centred {result.centered:+.4f} "
        f"({len(result.correct)} items, {task.num_fewshot}-shot {task.task_type})"
    )


def _unjudged(task: CoreTask, lines: Sequence[int]) -> str:
    more = f" and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return (
        f"CORE {task.label}: {task.path}, line {', '.join(map(str, lines[:NAMED]))}{more}: an option equals all others, or "
        "begins them. Nothing of such an option is judged; it is chosen if it is the first option, as in nanochat."
    )


def _my_share(items: int) -> range:
    if dist.is_available() and dist.is_initialized():
        return range(dist.get_rank(), items, dist.get_world_size())
    return range(items)


def _gather(mine: list[bool], items: int, model: GPT) -> list[bool]:
    """Verdicts of all items from those of this rank's share."""
    if len(mine) == items:
        return mine
    verdicts = torch.zeros(items, dtype=torch.int32, device=model.device)
    verdicts[list(_my_share(items))] = torch.tensor(mine, dtype=torch.int32, device=verdicts.device)
    dist.all_reduce(verdicts)
    return [bool(v) for v in verdicts.tolist()]


@torch.no_grad()
def score_questions(model: GPT, questions: Sequence[Question], pack: bool = True) -> list[bool]:
    """Whether the model is right, per question: lowest mean loss on the gold row, or every judged id the likeliest.

    An option with nothing to judge (its ids begin all the others') has mean NaN, which wins only in the first place:
    what nanochat's comparison does.
    """
    losses: dict[tuple[int, int], list[float]] = {}
    exact = [True] * len(questions)
    for q, question in enumerate(questions):
        losses.update({(q, row): [] for row in range(len(question.rows))})
    for batch in _batches([seq for q, question in enumerate(questions) for seq in pack_question(q, question, pack)]):
        loss, hit = _judge(model, batch)
        judged = [entry for seq in batch for entry in seq.judged]
        for (q, row, _, _), value, same in zip(judged, loss, hit, strict=True):
            losses[q, row].append(value)
            exact[q] = exact[q] and same
    return [
        exact[q]
        if question.gold is None
        else _choose([losses[q, r] for r in range(len(question.rows))]) == question.gold
        for q, question in enumerate(questions)
    ]


def _choose(losses: list[list[float]]) -> int:
    means = [sum(row) / len(row) if row else math.nan for row in losses]
    best = 0
    for row in range(1, len(means)):
        if means[row] < means[best]:  # False where either is NaN
            best = row
    return best


def pack_question(q: int, question: Question, pack: bool = True) -> list[Packed]:
    """The sequences to run for question number q: one for all rows where they share enough, else one a row.

    The last id of a row is never an input: nothing after it is judged.
    """
    inputs = [row[:-1] for row in question.rows]
    shared = common_length(inputs) if pack and len(inputs) > 1 else 0
    if shared * (len(inputs) - 1) < 0.2 * sum(map(len, inputs)):  # a mask costs more than so small a saving
        return [_sequence(q, question, [row], 0) for row in range(len(inputs))]
    return [_sequence(q, question, list(range(len(inputs))), shared)]


def _sequence(q: int, question: Question, rows: list[int], shared: int) -> Packed:
    ids = question.rows[rows[0]][:shared]
    positions, branches = list(range(shared)), [0] * shared
    judged = []
    for branch, row in enumerate(rows, start=1):
        row_ids = question.rows[row]
        offset = len(ids) - shared
        ids = ids + row_ids[shared:-1]
        positions += range(shared, len(row_ids) - 1)
        branches += [branch] * (len(row_ids) - 1 - shared)
        for target in range(*question.spans[row]):
            slot = target - 1 if target <= shared else target - 1 + offset
            judged.append((q, row, slot, row_ids[target]))
    return Packed(ids, positions, branches, judged)


def _batches(sequences: list[Packed]) -> Iterator[list[Packed]]:
    """Batches of one kind (plain or masked) and similar length, within the limits on tokens and mask entries."""
    batch: list[Packed] = []
    for seq in sorted(sequences, key=lambda s: (s.plain, -len(s.ids))):
        longest = len(batch[0].ids) if batch else 0  # the first of a batch is its longest
        rows = len(batch) + 1
        mask_entries = 0 if seq.plain else rows * longest * longest
        if batch and (seq.plain != batch[0].plain or rows * longest > BATCH_TOKENS or mask_entries > MASK_ENTRIES):
            yield batch
            batch = []
        batch.append(seq)
    if batch:
        yield batch


def _judge(model: GPT, batch: list[Packed]) -> tuple[list[float], list[bool]]:
    """Loss in nats and whether the id is the likeliest, for everything judged in a batch, in its order."""
    longest = len(batch[0].ids)
    ids, positions, branches = (
        _pad(rows, longest) for rows in zip(*((s.ids, s.positions, s.branches) for s in batch), strict=True)
    )
    ids, positions, branches = ids.to(model.device), positions.to(model.device), branches.to(model.device)
    mask = None
    if not batch[0].plain:
        mask = (branches[:, None, :] == 0) | (
            branches[:, None, :] == branches[:, :, None]
        )  # [B, L, L] own branch or shared
        mask = mask.tril()[:, None]  # [B, 1, L, L]
    hidden = model.trunk(model.embed(ids), rotary_at(model, positions, longest), mask=mask)  # [B, L, D]
    slots = [row * longest + slot for row, seq in enumerate(batch) for _, _, slot, _ in seq.judged]
    at = torch.tensor(slots, dtype=torch.int64)  # of no slot at all as well: where no option differs, none is judged
    targets = torch.tensor([t for seq in batch for *_, t in seq.judged], dtype=torch.int64, device=model.device)
    flat = hidden.flatten(0, 1)[at.to(model.device)]  # [N, D]
    losses: list[float] = []
    hits: list[bool] = []
    step = max(1, LOGIT_ENTRIES // model.config.vocab_size)
    for start in range(0, len(flat), step):
        logits, part = model.head(flat[start : start + step]), targets[start : start + step]
        losses += F.cross_entropy(logits, part, reduction="none").tolist()
        hits += (logits.argmax(dim=-1) == part).tolist()
    return losses, hits


def _pad(rows: Sequence[list[int]], length: int) -> torch.Tensor:
    """Rows of ids as int64 [B, length], zeros on the right: no row looks to its right, so any id will do."""
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
