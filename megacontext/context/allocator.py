"""Who decides which entries get more or less detail: a knapsack of equal weights, since every edit costs r - 1 entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megacontext import arguments
from megacontext.context.edits import Edits, apply, collapsible
from megacontext.context.focus_report import FocusReport, summarize
from megacontext.context.invariants import check_edit, check_no_reversal, check_working_context
from megacontext.context.working_context import F64, I64, WorkingContext, check_budget_fits, smallest_budget
from megacontext.errors import UserError
from megacontext.memory_config import FocusConfig

Bool = npt.NDArray[np.bool_]
ScoreFunction = Callable[[WorkingContext], Any]  # [L] numbers in [-1, 1]: an array or a CPU tensor
_EXPAND, _COLLAPSE = 1, -1
_ROUNDING = 1e-9  # of the mean of scores that are all at a threshold
_EXTEND_ENTRIES = 4096  # raw entries that a long append adds before it makes room: bounds memory


@dataclass(frozen=True, kw_only=True)
class AllocatorConfig:
    """What a focus allocator works within. `budget` and `recent_tokens` in entries; `max_lod` None: as many levels as the
    history fills; `focus`: its thresholds, edits and cooldown. Raises UserError for values that cannot be."""

    budget: int
    recent_tokens: int
    max_lod: int | None = None
    seed: int = 0
    focus: FocusConfig = field(default_factory=FocusConfig)

    def __post_init__(self) -> None:
        arguments.plain_fields(self)  # every value has its type
        for name in ("recent_tokens", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        if self.recent_tokens >= self.budget:
            raise UserError(
                f"a raw tail of {self.recent_tokens} tokens leaves no room in a budget of {self.budget} entries; "
                "raise the budget or shorten the tail."
            )


class FocusAllocator:
    """Turns scores into edits within a budget, and remembers what it did, so that nothing flickers.

    The higher the score, the more detail is wanted. A refocus always ends (at most `iterations` rounds of
    `max_replacements` edits), depends on the seed, the scores and its own past alone, and makes legal edits only.
    """

    def __init__(self, config: AllocatorConfig) -> None:
        self.config = config
        self.refocuses = 0
        self._made = np.empty((0, 3), np.int64)  # node key, direction, number of the refocus: of the last few
        self._known: WorkingContext | None = None
        self._born = np.empty(0, np.int64)  # refocus in which each entry of _known appeared
        self._forced = self._reversals = 0  # since the last refocus

    def extend(self, context: WorkingContext, count: int) -> WorkingContext:
        """The context with `count` new raw tokens, within the budget: what is old makes room. Raises UserError if it can't.

        No cooldown holds back what this collapses: it may never have been seen, and the next refocus may want it.
        """
        size, done = max(self.config.budget, _EXTEND_ENTRIES), 0
        while done < count:
            context = self.make_room(context.append(min(size, count - done)), remember=False)
            done += size
        return context

    def make_room(
        self, context: WorkingContext, headroom: int = 0, scores: F64 | None = None, remember: bool = True
    ) -> WorkingContext:
        """Collapse groups until `headroom` entries below the budget are free.

        First those whose mean of `scores` [L] is lowest, if there are scores; then those whose parent is small for its
        distance from the end, so that detail fades with age. A group that a refocus expanded a moment ago goes last.
        What is collapsed comes under the cooldown if it is to `remember` it. Raises UserError when the raw tail and the
        coarsest nodes are over the budget.
        """
        target, tail, levels = self.config.budget - headroom, self.config.recent_tokens, self.config.max_lod
        while len(context) > target:
            groups = collapsible(context, tail, levels)
            if not groups.size:
                check_budget_fits(
                    smallest_budget(context.tokens, context.block_size, tail, levels), context.tokens, target, tail
                )
                raise AssertionError("a context over its budget has no group to collapse, but is not the coarsest")
            recent = self._is_recent(_parents(context, groups), _EXPAND)
            if not recent.all():
                groups, recent = groups[~recent], recent[~recent]
            need = -(-(len(context) - target) // (context.block_size - 1))
            span = context.spans[groups] * context.block_size
            age = (context.tokens - context.starts[groups] - span) / span
            first = np.zeros(len(groups)) if scores is None else _group_means(context, groups, scores)
            order = np.lexsort((groups, -age, first))
            chosen = order[: min(need, -(-len(order) // 2))]  # the rest competes with the new parents' groups
            edits = Edits(collapse=np.sort(groups[chosen]))
            self._forced += len(edits)
            self._reversals += int(recent[chosen].sum())
            context = self._edit(context, edits, forced=True, remember=remember)
            scores = None  # they were of the entries before
        return context

    def refocus(
        self, context: WorkingContext, score: ScoreFunction, headroom: int = 0
    ) -> tuple[WorkingContext, FocusReport]:
        """Score, choose and apply; `headroom` entries stay free for tokens to come. Returns the new context and a report.

        `score` is called once per iteration with the context as it is then, and once before if room has to be made; it
        must not depend on anything else that changes. Raises UserError for scores that are not finite numbers in
        [-1, 1], one per entry.
        """
        before, first_scores = context, None
        born = self._births(context)
        if len(context) > self.config.budget - headroom:
            context = self.make_room(context, headroom, _checked_scores(score(context), len(context)))
        expands = collapses = 0
        for iteration in range(self.config.focus.mc_infer_allocator_iterations):
            scores = _checked_scores(score(context), len(context))
            first_scores = scores if first_scores is None else first_scores
            edits = self._choose(context, scores, iteration, headroom)
            if not len(edits):
                break
            context = self._edit(context, edits)
            expands, collapses = expands + len(edits.expand), collapses + len(edits.collapse)
        self._check(context)
        report = FocusReport(
            refocus=self.refocuses,
            entries=len(context),
            budget=self.config.budget,
            expands=expands,
            collapses=collapses,
            forced_collapses=self._forced,
            forced_reversals=self._reversals,
            **summarize(before, context, born, self.refocuses, first_scores),
        )
        self._born = self._births(context)
        self._known, self._forced, self._reversals = context, 0, 0
        self.refocuses += 1
        return context, report

    def state(self) -> dict[str, Any]:
        """What a session stores to go on as if it had never stopped; plain lists and numbers."""
        return {
            "refocuses": self.refocuses,
            "made": self._made.tolist(),
            "born": self._born.tolist(),
            "known": [] if self._known is None else [list(entry) for entry in self._known.entries],
            "forced": self._forced,
            "reversals": self._reversals,
        }

    def restore(self, state: dict[str, Any], block_size: int) -> None:
        """Take up the state of another allocator of the same settings."""
        self.refocuses, self._forced, self._reversals = state["refocuses"], state["forced"], state["reversals"]
        self._made = np.array(state["made"], np.int64).reshape(-1, 3)
        self._born = np.array(state["born"], np.int64)
        known = [(lod, index) for lod, index in state["known"]]
        self._known = WorkingContext.from_entries(known, block_size) if known else None

    def _choose(self, context: WorkingContext, scores: F64, iteration: int, headroom: int) -> Edits:
        """One round of the knapsack: the best entries above the threshold are expanded, into free room first; then each
        pays with the worst group, if it scores above the group's mean by both thresholds.

        So whether something pays is a question of the difference, wherever the scores of the context lie as a whole.
        Edits that are left then collapse the raw groups nobody wants, room or not: raw text distracts where a gist does
        not, and a reader that was to find one fact among a few finds it more often than among many.
        """
        config, r = self.config, context.block_size
        rng = np.random.default_rng([config.seed, self.refocuses, iteration])
        wants = (context.lod > 0) & (scores > config.focus.allocator_expand_threshold)
        finer = np.flatnonzero(wants & ~self._is_recent(_keys(context.lod, context.index), _COLLAPSE))
        finer = finer[
            self._pick(scores[finer], -finer, config.focus.mc_infer_allocator_max_replacements, rng)
        ]  # of equals the newest
        free = max(0, config.budget - headroom - len(context)) // (r - 1)
        groups = collapsible(context, config.recent_tokens, config.max_lod)
        groups = groups[~self._is_recent(_parents(context, groups), _EXPAND)]
        means = _group_means(context, groups, scores)
        coarser = self._pick(-means, groups, len(groups), rng)  # of equals the oldest
        expand, collapse = finer[:free].tolist(), list[int]()
        for entry in finer[free:].tolist():
            if len(expand) + len(collapse) + 2 > config.focus.mc_infer_allocator_max_replacements:
                break
            if any(first <= entry < first + r for first in collapse):
                continue
            paying = next(
                (at for at in coarser.tolist() if self._may_pay(int(groups[at]), expand, collapse, entry, r)), None
            )
            if (
                paying is None
                or scores[entry] - means[paying]
                <= config.focus.allocator_expand_threshold + config.focus.allocator_collapse_threshold
            ):
                continue
            expand.append(entry)
            collapse.append(int(groups[paying]))
        unwanted = (context.lod[groups] == 0) & (means < -config.focus.allocator_collapse_threshold - _ROUNDING)
        spare = [int(groups[at]) for at in coarser.tolist() if unwanted[at] and int(groups[at]) not in collapse]
        collapse += spare[: max(0, config.focus.mc_infer_allocator_max_replacements - len(expand) - len(collapse))]
        return Edits(np.sort(np.array(expand, np.int64)), np.sort(np.array(collapse, np.int64)))

    @staticmethod
    def _may_pay(group: int, expand: list[int], collapse: list[int], entry: int, r: int) -> bool:
        """Whether a group, given by its first entry, is still whole and not what is to be expanded."""
        return group not in collapse and not any(group <= at < group + r for at in (*expand, entry))

    def _pick(self, values: F64, tie: I64, count: int, rng: np.random.Generator) -> I64:
        """Numbers of `count` items, the highest values first; drawn from the best few when the allocator is stochastic."""
        order = np.lexsort((tie, -values))
        if self.config.focus.allocator_type == "greedy":
            return order[:count]
        pool, picked = order.tolist(), []
        for _ in range(min(count, len(pool))):
            best = pool[: self.config.focus.allocator_sample_top_k]
            weights = np.exp((values[best] - values[best[0]]) / self.config.focus.allocator_sample_temperature)
            picked.append(pool.pop(int(rng.choice(len(best), p=weights / weights.sum()))))
        return np.array(picked, np.int64)

    def _edit(
        self, context: WorkingContext, edits: Edits, forced: bool = False, remember: bool = True
    ) -> WorkingContext:
        """Apply edits, prove them, and remember them for the cooldown."""
        after = apply(context, edits, self.config.recent_tokens, self.config.max_lod)
        check_edit(context, after, edits)
        expanded = _keys(context.lod[edits.expand], context.index[edits.expand])
        collapsed = _parents(context, edits.collapse)
        past, now = self._made, self.refocuses
        if not forced:  # the budget is hard: making room may go against the cooldown when nothing else is left
            check_no_reversal(
                past[past[:, 1] == _COLLAPSE][:, [0, 2]], expanded, now, self.config.focus.allocator_cooldown
            )
            check_no_reversal(
                past[past[:, 1] == _EXPAND][:, [0, 2]], collapsed, now, self.config.focus.allocator_cooldown
            )
        if not remember:
            return after
        new = [
            np.stack([keys, np.full(len(keys), direction), np.full(len(keys), now)], 1)
            for keys, direction in ((expanded, _EXPAND), (collapsed, _COLLAPSE))
        ]
        self._made = np.concatenate([past[now - past[:, 2] <= self.config.focus.allocator_cooldown], *new])
        return after

    def _is_recent(self, keys: I64, direction: int) -> Bool:
        """Which nodes were edited in a direction within the cooldown."""
        made = self._made
        recent = (made[:, 1] == direction) & (self.refocuses - made[:, 2] <= self.config.focus.allocator_cooldown)
        return np.isin(keys, made[recent, 0])

    def _births(self, context: WorkingContext) -> I64:
        """Refocus in which each entry appeared: as known for those that stayed, this one for the others."""
        born = np.full(len(context), self.refocuses)
        if self._known is not None and len(self._known):
            known = _keys(self._known.lod, self._known.index)
            order = np.argsort(known, kind="stable")
            keys = _keys(context.lod, context.index)
            at = order[np.minimum(np.searchsorted(known[order], keys), len(known) - 1)]
            born = np.where(known[at] == keys, self._born[at], born)
        return born

    def _check(self, context: WorkingContext) -> None:
        check_working_context(
            context,
            budget=self.config.budget,
            tail=self.config.recent_tokens,
            tokens=context.tokens,
            max_lod=self.config.max_lod,
        )


def _keys(lod: I64, index: I64) -> I64:
    """One number per node: nodes lie below 2^52 tokens, so 56 bits hold an index."""
    return (lod << 56) | index


def _parents(context: WorkingContext, groups: I64) -> I64:
    """Keys of the parents of sibling groups, given by their first entries."""
    return _keys(context.lod[groups] + 1, context.index[groups] // context.block_size)


def _group_means(context: WorkingContext, groups: I64, scores: F64) -> F64:
    """One number per sibling group: the mean of its members' scores."""
    means: F64 = scores[groups[:, None] + np.arange(context.block_size)].mean(1)
    return means


def _checked_scores(given: Any, entries: int) -> F64:
    scores = np.asarray(given, dtype=np.float64)
    if scores.shape != (entries,):
        raise UserError(f"{list(scores.shape)} scores for {entries} entries; give one per entry.")
    wrong = np.flatnonzero(~(np.abs(scores) <= 1))  # NaN is not <= 1
    if wrong.size:
        raise UserError(f"the score of entry {int(wrong[0])} is {scores[wrong[0]]}; scores are numbers in [-1, 1].")
    return scores
