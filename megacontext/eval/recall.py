"""Accuracy of recall by method and distance: does a model say what its history states, at one budget?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megacontext.data.recall import RecallItem
from megacontext.data.recall_words import FACT_TOKENS
from megacontext.eval.continuation import score_continuation
from megacontext.eval.methods import History, Prompt, layout
from megacontext.model.gpt import GPT

DISTANCE_BUCKETS = 4


@dataclass(frozen=True)
class Answer:
    """One question answered with one method.

    `correct`: every token of the answer is the likeliest; `nll` in nats, summed over them. `evidence_raw`: all facts
    that it takes were raw entries. `ms` and `flops`: choosing the entries and reading them, per token of the answer;
    `build_ms`: making the gists of the whole history, per token of it.
    """

    method: str
    item: int
    distance: int
    correct: bool
    nll: float
    evidence_raw: bool
    entries: int
    ms: float
    flops: float
    build_ms: float


@dataclass(frozen=True)
class Rate:
    """A share of `total` with its Wilson interval of 95 %."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.hits / self.total if self.total else math.nan


def evaluate_recall(
    model: GPT,
    items: Iterable[RecallItem],
    methods: Sequence[str],
    *,
    budget: int,
    tail: int,
    block_size: int = 32,
    seed: int = 0,
    on_item: Callable[[int, Sequence[Answer]], object] | None = None,
) -> list[Answer]:
    """Ask every question of every item with every method, at most `budget` entries each, the last `tail` tokens raw.

    `block_size` is used by a model without a memory. `on_item` is called with the number of each finished item and its
    answers. Raises UserError as `layout` does.
    """
    answers: list[Answer] = []
    for number, item in enumerate(items):
        history = History(model, item.ids, block_size)
        prompts = [Prompt(history, question.ids, question.evidence) for question in item.questions]
        expected = np.stack([question.answer for question in item.questions])
        asked: list[Answer] = []
        for method in methods:
            room = budget - expected.shape[1] + 1  # all of an answer but its last token is read as well
            shown = [layout(method, prompt, room, tail, seed + number) for prompt in prompts]
            scores = score_continuation(model, shown, expected)
            for at, question in enumerate(item.questions):
                facts = [start + offset for start in question.evidence for offset in range(FACT_TOKENS)]
                asked.append(
                    Answer(
                        method=method,
                        item=number,
                        distance=question.distance,
                        correct=bool(scores.likeliest[at].all()),
                        nll=float(scores.nll[at].sum()),
                        evidence_raw=shown[at].shows(facts),
                        entries=len(shown[at]),
                        ms=1e3 * (shown[at].seconds + scores.seconds / len(shown)) / expected.shape[1],
                        flops=float(shown[at].flops + scores.flops[at]) / expected.shape[1],
                        build_ms=1e3 * history.build_seconds[prompts[at].gists] / len(item.ids),
                    )
                )
        answers += asked
        if on_item is not None:
            on_item(number, asked)
    return answers


def summarize(answers: Sequence[Answer], history_tokens: int) -> dict[str, Any]:
    """Rows of the table and curves of the plot, as plain data.

    `methods`: by name accuracy with interval, the same in each of the distance buckets, and means (medians of times).
    `lens_recall`: share of questions whose evidence ours shows raw. `lens_regret`: accuracy of the oracle minus ours.
    Both are there when the methods are.
    """
    edges = distance_edges(history_tokens)
    rows: dict[str, Any] = {}
    for method in dict.fromkeys(answer.method for answer in answers):
        mine = [answer for answer in answers if answer.method == method]
        buckets = [
            (low, high, [answer for answer in mine if low < answer.distance <= high]) for low, high in pairwise(edges)
        ]
        rows[method] = {
            **_accuracy(mine),
            "by_distance": [
                {"above_tokens": low, "up_to_tokens": high, **_accuracy(part)} for low, high, part in buckets
            ],
            "evidence_raw": wilson([a.evidence_raw for a in mine]).value,
            "answer_nll": float(np.mean([a.nll for a in mine])),
            "entries": float(np.mean([a.entries for a in mine])),
            "ms_per_token": float(np.median([a.ms for a in mine])),
            "flops_per_token": float(np.mean([a.flops for a in mine])),
        }
    summary: dict[str, Any] = {"methods": rows}
    if "ours" in rows:
        shown = wilson([a.evidence_raw for a in answers if a.method == "ours"])
        summary["lens_recall"] = shown.value
        summary["lens_recall_low"], summary["lens_recall_high"] = shown.low, shown.high
        if "oracle" in rows:
            summary["lens_regret"] = rows["oracle"]["accuracy"] - rows["ours"]["accuracy"]
    if answers:
        summary["build_ms_per_token"] = float(np.median([a.build_ms for a in answers]))
    return summary


def distance_edges(history_tokens: int, buckets: int = DISTANCE_BUCKETS) -> list[int]:
    """Bounds of distance buckets, each half as wide as the next: 0, N/8, N/4, N/2, N."""
    halves = [history_tokens >> (buckets - 1 - n) for n in range(buckets)]
    return [0, *(half for half, before in zip(halves, [0, *halves], strict=False) if half > before)]


def wilson(hits: Sequence[bool], z: float = 1.959964) -> Rate:
    """Share of hits with its score interval (Wilson 1927), which holds for few trials and for shares of 0 and 1."""
    total, good = len(hits), sum(map(bool, hits))
    if not total:
        return Rate(0, 0, 0.0, 1.0)
    share, spread = good / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * share * (1 - share) + spread**2 / 4) / (1 + spread)
    return Rate(good, total, max(0.0, centre - half), min(1.0, centre + half))


def _accuracy(answers: Sequence[Answer]) -> dict[str, Any]:
    rate = wilson([answer.correct for answer in answers])
    value = None if not rate.total else rate.value
    return {"items": rate.total, "correct": rate.hits, "accuracy": value, "low": rate.low, "high": rate.high}
