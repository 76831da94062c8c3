"""Recall tasks on token ids: facts planted in a history, questions about them, and what answers them.

A fact is five tokens, `TELL key key value END`, inside one block of the tree; a question is `ASK key key`, and its
answer the value. A key is a pair of key words, so a few hundred words name tens of thousands of things. The value
stands right behind the key: one more word between them, and small models need many times the steps. The tasks follow
the synthetic ones of RULER (arXiv:2404.06654), MQAR (arXiv:2312.04927) and phone books (arXiv:2402.01032):

    niah       one fact in text                        mqar       many facts in far text, several asked
    mk_niah    a fact in every other block             update     as mk_niah, and the key is given three values: the last counts
    phonebook  full blocks of facts, every other one   vt         as mk_niah, and the value is two links away: c is b, b is a, a is 7

Every second key belongs to evaluation and is never in a training row. B rows, F facts, Q questions, r block size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megacontext.data.recall_words import FACT_TOKENS as FACT
from megacontext.data.recall_words import QUESTION_TOKENS, WordList
from megacontext.errors import UserError

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

TASKS = ("niah", "mk_niah", "mqar", "phonebook", "update", "vt")
PAIRS = 64  # facts of mqar
_LINK = FACT + 1  # `TELL key key key key END`
_TURN = QUESTION_TOKENS + 1  # a question with its answer
_ASKED = {"mqar": 8}  # questions of an evaluation item; one of the other tasks
_VALUES = 3  # assignments of an update, and links of a chain
_NEVER = np.iinfo(np.int64).max
_FACTS_ASKED = 8  # facts at most that a training row is about, besides those asked for in its middle
_BLOCKS_TO_INTERLEAVE = 6  # shorter rows have questions at their end alone


@dataclass(frozen=True)
class RecallQuestion:
    """`ids` [3] and `answer` [1]; `evidence`: first tokens of the facts it takes, oldest first; `distance`: tokens from
    the oldest of them to the end of the history."""

    ids: I64
    answer: I64
    evidence: tuple[int, ...]
    distance: int


@dataclass(frozen=True)
class RecallItem:
    """A history of ids [N] and questions that may each be asked at its end."""

    ids: I64
    questions: tuple[RecallQuestion, ...]


@dataclass(frozen=True)
class RecallRows:
    """Training rows. `ids` int64 [B, T + 1]; `answers` bool [B, T + 1]: tokens that a question determines.

    For each of Q questions, -1 where a row has fewer: `question_position` [B, Q], its last token, where the answer is
    predicted, and `evidence_block` [B, Q], the block that states it (of vt the first link: what the question names).
    `earlier_block` [B, Q, 2]: blocks that said something else about the same key before, -1 where there are fewer.
    """

    ids: I64
    answers: Bool
    question_position: I64
    evidence_block: I64
    earlier_block: I64


@dataclass(frozen=True)
class _Facts:
    """Facts of B rows, oldest first, [B, F] each; blocks are counted among those that may hold facts."""

    block: I64
    offset: I64  # tokens from the start of the block
    key: I64
    value: I64  # number of the value word; of a link, of the key it points at
    link: Bool
    answer: I64  # what a question about the key is answered with
    until: I64  # block of the next fact about the same key
    rank: I64  # 0: what the task is about, asked first; 1: only asked when there is not enough of it
    support: I64  # [B, F, 2] facts behind a link, -1 where there are none


@dataclass(frozen=True)
class _Plan:
    """What a task has to place: `blocks` that may hold facts, `stride` between those that do, facts asked for at most."""

    task: str
    words: WordList
    blocks: int
    block_size: int
    asked: int
    pairs: int
    stride: int
    held_out: bool

    @property
    def width(self) -> int:
        """Tokens of the longest fact."""
        return _LINK if self.task == "vt" else FACT

    def problem(self, what: str, asked: int) -> str:
        """Why the facts have no room in `what`, or `asked` of them cannot be asked for; empty if they can."""
        if self.block_size < self.width:
            return f"a fact of {self.task} takes {self.width} tokens, which a block of {self.block_size} cannot hold."
        each = {"niah": 1, "mqar": 1, "update": _VALUES * self.stride, "vt": _VALUES * self.stride}
        least = max(each.get(self.task, self.stride) * asked, self.pairs if self.task == "mqar" else 1)
        if self.blocks < least:
            return (
                f"{what} has {max(self.blocks, 0)} blocks of {self.block_size} tokens for facts; {self.task} needs "
                f"{least}. Make it longer, or ask for fewer facts."
            )
        filled = self.blocks // self.stride * (self.block_size // FACT if self.task == "phonebook" else 1)
        facts = {"niah": self.asked, "mqar": self.pairs}.get(self.task, filled)
        if facts > self.words.num_keys:
            return (
                f"{self.task} in {what} needs {facts} keys, and the vocabulary gives {self.words.num_keys}. "
                "Make it shorter, or use a larger vocabulary."
            )
        return ""

    def facts(self, rng: np.random.Generator, rows: int) -> _Facts:
        """Where the facts of `rows` rows stand, and what they say."""
        block, offset = self._places(rng, rows)
        value = rng.integers(0, len(self.words.values), block.shape)
        facts = _Facts(
            block=block,
            offset=offset,
            key=rng.permuted(_distinct(rng, rows, block.shape[1], self.words.num_keys), axis=1),
            value=value,
            link=np.zeros(block.shape, bool),
            answer=value.copy(),
            until=np.full(block.shape, _NEVER),
            rank=np.zeros(block.shape, np.int64),
            support=np.full((*block.shape, _VALUES - 1), -1),
        )
        if self.task in ("update", "vt"):
            self._relate(facts, rng)
        return facts

    def _places(self, rng: np.random.Generator, rows: int) -> tuple[I64, I64]:
        """Blocks and offsets [B, F] of the facts, oldest first."""
        if self.task in ("niah", "mqar"):
            count = self.pairs if self.task == "mqar" else min(self.asked, self.blocks)
            block = _distinct(rng, rows, count, self.blocks)
        else:
            block = rng.integers(0, self.stride, (rows, 1)) + self.stride * np.arange(self.blocks // self.stride)
        if self.task != "phonebook":
            return block, rng.integers(0, self.block_size - self.width + 1, block.shape)
        records = self.block_size // FACT
        begin = rng.integers(0, self.block_size - records * FACT + 1, block.shape)
        offset = begin[:, :, None] + FACT * np.arange(records)
        return np.repeat(block, records, axis=1), offset.reshape(rows, -1)

    def _relate(self, facts: _Facts, rng: np.random.Generator) -> None:
        """Make updates or chains of some facts, in place: three of them each, as many as may be asked about."""
        rows, count = facts.block.shape
        groups = min(self.asked, count // _VALUES)
        places = np.argsort(rng.random((rows, count)), axis=1)[:, : groups * _VALUES]
        first, second, last = np.moveaxis(np.sort(places.reshape(rows, groups, _VALUES), axis=2), 2, 0)
        row = np.arange(rows)[:, None]
        facts.rank[:] = 1
        facts.rank[row, last] = 0
        if self.task == "update":
            values = len(self.words.values)
            for earlier, later in ((first, second), (second, last)):
                shift = rng.integers(1, values, earlier.shape)  # never the value that counts
                facts.value[row, earlier] = facts.answer[row, earlier] = (facts.value[row, last] + shift) % values
                facts.key[row, earlier] = facts.key[row, last]
                facts.until[row, earlier] = facts.block[row, later]
            return
        facts.answer[row, second] = facts.answer[row, last] = facts.value[row, first]
        facts.value[row, second], facts.value[row, last] = facts.key[row, first], facts.key[row, second]
        facts.link[row, second] = facts.link[row, last] = True
        facts.support[row, second, 0] = facts.support[row, last, 0] = first
        facts.support[row, last, 1] = second

    def write(self, ids: I64, facts: _Facts, start: I64) -> None:
        """Put the facts into ids [B, N], at their first tokens `start` [B, F]."""
        for chosen, make, width in ((~facts.link, self.words.fact, FACT), (facts.link, self.words.link, _LINK)):
            row, fact = np.nonzero(chosen)
            at = start[row, fact][:, None] + np.arange(width)
            ids[row[:, None], at] = make(facts.key[row, fact], facts.value[row, fact], held_out=self.held_out)


def recall_items(
    task: str,
    words: WordList,
    history_tokens: int,
    items: int,
    seed: int,
    *,
    block_size: int = 32,
    recent_tokens: int = 0,
    haystack: npt.NDArray[np.integer] | None = None,
    pairs: int = PAIRS,
    questions: int = 0,
) -> Iterator[RecallItem]:
    """Evaluation items, made one at a time; item i of a seed does not depend on how many there are.

    No fact lies in the last `recent_tokens`. `haystack`: ids of the text between facts, read on from a random place and
    from its start again where it ends; words that no fact uses without it. `questions` per item: 0 is the task's own.
    Raises UserError for an unknown task, and when history, vocabulary or block cannot hold the facts.
    """
    if task not in TASKS:
        raise UserError(f"recall task {task!r} is unknown; choose one of {', '.join(TASKS)}.")
    asked = questions or _ASKED.get(task, 1)
    blocks = (history_tokens - recent_tokens) // block_size - 1  # the first block keeps the beginning of the text
    plan = _Plan(task, words, blocks, block_size, asked, pairs, stride=2, held_out=True)
    if problem := plan.problem(f"a history of {history_tokens} tokens", asked):
        raise UserError(problem)
    return (_item(plan, [seed, TASKS.index(task), n], history_tokens, haystack) for n in range(items))


def _item(plan: _Plan, seed: list[int], tokens: int, haystack: npt.NDArray[np.integer] | None) -> RecallItem:
    rng = np.random.default_rng(seed)
    facts = plan.facts(rng, 1)
    ids = _filler(rng, plan.words, haystack, 1, tokens)
    start = (facts.block + 1) * plan.block_size + facts.offset
    plan.write(ids, facts, start)
    chosen, valid = _choose(facts, rng, np.array([_NEVER]), plan.asked, np.empty((1, 0), np.int64))
    return RecallItem(ids[0], tuple(_question(plan.words, facts, start, int(n), tokens) for n in chosen[valid]))


def recall_rows(
    rng: np.random.Generator,
    words: WordList,
    rows: int,
    row_tokens: int,
    *,
    block_size: int = 32,
    haystack: npt.NDArray[np.integer] | None = None,
    mix: Mapping[str, float] | None = None,
    questions: int = 8,
    interleaved: int = 4,
    pairs: int = PAIRS,
    again: bool = False,
) -> RecallRows:
    """Training rows of `row_tokens` = T + 1 ids: facts in blocks, `interleaved` questions somewhere in the middle about
    what came before, `questions` at the end; the last id of a row is an answer.

    `mix`: weight of each task; without it all alike that the row has room for. Of `pairs`, as many as there are blocks.
    Short rows have fewer questions. With `again` a fact may be asked for several times until there are as many as the
    half of a row holds: dense supervision, by which looking up is learned in a tenth of the steps. Raises as
    `recall_items` does.
    """
    weights = dict.fromkeys(TASKS, 1.0) if mix is None else dict(mix)
    if not set(weights) <= set(TASKS) or min(weights.values(), default=-1) < 0 or not sum(weights.values()) > 0:
        raise UserError(f"the mix of recall tasks is {weights}; give weights above 0 to some of {', '.join(TASKS)}.")
    at_end, middle = question_counts(row_tokens, block_size, questions, interleaved, again)
    usable = (row_tokens - at_end * _TURN) // block_size - 1
    blocks = usable - -(-middle * _TURN // block_size)
    plans = []
    for task in weights:
        stride = 1 if task in ("update", "vt") else 2  # these have three facts to a question
        plans.append(
            _Plan(
                task,
                words,
                blocks,
                block_size,
                middle + min(at_end, _FACTS_ASKED),
                min(pairs, blocks),
                stride,
                held_out=False,
            )
        )
    problems = [plan.problem(f"a row of {row_tokens} tokens", 1) for plan in plans]
    if all(problems) or (mix is not None and any(problems)):
        raise UserError(next(filter(None, problems)))
    out = RecallRows(
        _filler(rng, words, haystack, rows, row_tokens),
        np.zeros((rows, row_tokens), bool),
        np.full((rows, middle + at_end), -1, np.int64),
        np.full((rows, middle + at_end), -1, np.int64),
        np.full((rows, middle + at_end, _VALUES - 1), -1, np.int64),
    )
    shares = np.array([0.0 if problem else weights[plan.task] for plan, problem in zip(plans, problems, strict=True)])
    number = rng.choice(len(plans), rows, p=shares / shares.sum())
    for at, plan in enumerate(plans):
        chosen = np.flatnonzero(number == at)
        if len(chosen):
            _fill_rows(out, chosen, plan, rng, middle, at_end, again)
    return out


def question_counts(
    row_tokens: int, block_size: int, questions: int, interleaved: int = 4, again: bool = False
) -> tuple[int, int]:
    """Questions at the end and in the middle of a training row, at most; as `recall_rows` is asked for them."""
    at_end = max(1, min(questions, row_tokens // ((2 if again else 4) * _TURN)))
    usable = (row_tokens - at_end * _TURN) // block_size - 1
    return at_end, interleaved if usable >= _BLOCKS_TO_INTERLEAVE else 0


def _fill_rows(
    out: RecallRows, chosen: I64, plan: _Plan, rng: np.random.Generator, middle: int, at_end: int, again: bool
) -> None:
    """Write the facts and questions of one task into the chosen rows."""
    rows, r, row_tokens = len(chosen), plan.block_size, out.ids.shape[1]
    facts, never = plan.facts(rng, rows), np.full(rows, _NEVER)
    split = rng.integers(plan.blocks // 3, plan.blocks, rows) + 1 if middle else never  # facts before the middle
    moved = np.where(facts.block >= split[:, None], -(-middle * _TURN // r), 0)
    start = (facts.block + 1 + moved) * r + facts.offset
    ids = out.ids[chosen]
    plan.write(ids, facts, start)
    early, early_valid = _choose(facts, rng, split, middle, np.empty((rows, 0), np.int64))
    early_valid[:, len(np.unique(facts.key[0])) // 2 :] = False  # leave something to ask at the end
    told = np.where(early_valid, np.take_along_axis(facts.key, early, 1), -1)
    late, late_valid = _choose(facts, rng, never, at_end, told)
    if again:
        late, late_valid = _repeated(late, late_valid, rng)
    asked = np.concatenate([early, late[:, ::-1]], 1)  # where there are too few, the first are missing
    valid = np.concatenate([early_valid, late_valid[:, ::-1]], 1)
    in_middle = (np.minimum(split, plan.blocks)[:, None] + 1) * r + _TURN * np.arange(middle)
    in_end = np.broadcast_to(row_tokens + _TURN * np.arange(-at_end, 0), (rows, at_end))
    at = np.concatenate([in_middle, in_end], 1)  # [B, Q] first tokens of questions
    row, fact, place = np.nonzero(valid)[0], asked[valid], at[valid]
    answer = plan.words.values[facts.answer[row, fact]]
    ids[row[:, None], place[:, None] + np.arange(QUESTION_TOKENS)] = plan.words.question(
        facts.key[row, fact], held_out=plan.held_out
    )
    ids[row, place + QUESTION_TOKENS] = answer
    out.ids[chosen] = ids
    out.answers[chosen[row], place + QUESTION_TOKENS] = True
    out.question_position[chosen] = np.where(valid, at + QUESTION_TOKENS - 1, -1)
    block = np.take_along_axis(start, asked, 1) // r
    out.evidence_block[chosen] = np.where(valid, block, -1)
    same = facts.key[:, None, :] == np.take_along_axis(facts.key, asked, 1)[:, :, None]
    before = np.where(same & (start[:, None, :] // r < block[:, :, None]), start[:, None, :] // r, -1)
    out.earlier_block[chosen] = np.where(valid[:, :, None], np.sort(before, 2)[:, :, 1 - _VALUES :], -1)


def _distinct(rng: np.random.Generator, rows: int, count: int, limit: int) -> I64:
    """Ascending distinct numbers [B, count] below `limit`."""
    return np.sort(rng.integers(0, limit - count + 1, (rows, count)), axis=1) + np.arange(count)


def _choose(facts: _Facts, rng: np.random.Generator, before: I64, count: int, told: I64) -> tuple[I64, Bool]:
    """Facts [B, count] to ask about where only blocks below `before` [B] have been read, and which of them are there.

    Each is the last word about its key by then; keys `told` [B, n] have been asked about already.
    """
    limit = before[:, None]
    may = (facts.block < limit) & (facts.until >= limit)
    for key in range(told.shape[1]):
        may &= facts.key != told[:, key : key + 1]
    wish = np.where(may, facts.rank + rng.random(facts.key.shape), np.inf)
    wish = np.pad(wish, ((0, 0), (0, max(0, count - wish.shape[1]))), constant_values=np.inf)
    order = np.argsort(wish, axis=1)[:, :count]
    valid = np.isfinite(np.take_along_axis(wish, order, 1))
    return np.where(valid, order, 0), valid


def _repeated(chosen: I64, valid: Bool, rng: np.random.Generator) -> tuple[I64, Bool]:
    """Facts [B, count] in a new order, with those that are there in the places of those that are not."""
    there = valid.sum(1, keepdims=True)
    pick = np.where(valid, np.arange(valid.shape[1]), rng.integers(0, np.maximum(there, 1), valid.shape))
    pick = rng.permuted(pick, axis=1)  # what is there stands first in a row of `chosen`
    return np.take_along_axis(chosen, pick, 1), np.broadcast_to(there > 0, valid.shape).copy()


def _question(words: WordList, facts: _Facts, start: I64, fact: int, tokens: int) -> RecallQuestion:
    needed = [*(number for number in facts.support[0, fact].tolist() if number >= 0), fact]
    evidence = tuple(int(start[0, number]) for number in needed)
    return RecallQuestion(
        ids=words.question(facts.key[0, fact : fact + 1], held_out=True)[0],
        answer=words.values[facts.answer[0, fact : fact + 1]],
        evidence=evidence,
        distance=tokens - min(evidence),
    )


def _filler(
    rng: np.random.Generator, words: WordList, haystack: npt.NDArray[np.integer] | None, rows: int, tokens: int
) -> I64:
    """Text [B, N] without facts; words of the tasks' own grammar are taken out of it, so that no text looks like one."""
    if haystack is None:
        ids = words.filler[rng.integers(0, len(words.filler), (rows, tokens))]
    else:
        if not len(haystack):
            raise UserError("the haystack is empty; give some text to hide facts in.")
        at = rng.integers(0, len(haystack), (rows, 1)) + np.arange(tokens)
        ids = np.asarray(haystack)[at % len(haystack)].astype(np.int64)
        ids[np.isin(ids, words.grammar)] = words.filler[0]
    ids[:, 0] = words.bos
    return ids
