"""What a refocus looks at: the entries of a working context as inputs of the model, and their scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from megacontext import arguments
from megacontext.context.allocator import AllocatorConfig, ScoreFunction
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.inference.search import Found, search
from megacontext.memory_config import FocusConfig
from megacontext.model.gpt import GPT
from megacontext.model.rotary import Rotary
from megacontext.model.router import QUERY_TOKENS

F64 = npt.NDArray[np.float64]


def entry_inputs(
    model: GPT, tree: Tree, context: WorkingContext, start: int = 0, end: int | None = None
) -> tuple[torch.Tensor, Rotary]:
    """Inputs [1, L - start, D] and rotary of the entries of a context from number `start` on.

    `end`: the token count that far positions are measured from; the tokens of the context unless given.
    """
    lod, index = context.lod[start:], context.index[start:]
    raw = lod == 0
    ids, previous = np.zeros(len(lod), np.int64), np.full(len(lod), -1, np.int64)
    for first, last in _runs(index[raw]):
        at = np.flatnonzero(raw)[np.searchsorted(index[raw], np.arange(first, last))]
        low = max(first - 1, 0)
        span = tree.ids(low, last).numpy()
        ids[at] = span[first - low :]
        previous[at] = span[: len(span) - 1] if first > 0 else np.concatenate([[-1], span[:-1]])
    width = model.config.n_embd
    content = torch.zeros(len(lod), width)
    for level in np.unique(lod[~raw]).tolist():
        at = np.flatnonzero(lod == level)
        content[torch.from_numpy(at)] = tree.records(level, index[at])[:, :width].float()
    device = model.device
    given = [torch.from_numpy(array)[None].to(device) for array in (ids, previous, lod.copy())]
    x = model.embed_entries(given[0], given[1], content[None].to(device), given[2])
    slots = torch.arange(start, start + len(lod), device=device)[None]
    places = [torch.from_numpy(a[start:].copy())[None].to(device) for a in (context.positions, context.sigmas)]
    measured_from = torch.tensor([context.tokens if end is None else end], device=device)
    return x, model.entry_rotary(places[0], places[1], slots, measured_from)


class LensScorer:
    """Scores of a context for the query that the newest tokens are: a `ScoreFunction` of the allocator.

    The search runs once; LensNet once for every context it is asked about. Entries over a found block are raised by
    the probability that something is asked and the block is the one that answers, and everything else is lowered in
    proportion: detail that nobody asks for makes room for detail that somebody does. `lens=False` leaves LensNet out,
    `route=False` the search; a memory whose router was not trained does not search. Where nothing is found, LensNet
    decides alone. Raises NonFiniteError when the routing query is NaN.
    """

    def __init__(
        self,
        model: GPT,
        tree: Tree,
        tail: int,
        *,
        lens: bool = True,
        route: bool = True,
        find: Callable[[torch.Tensor], Found] | None = None,
        focus: FocusConfig | None = None,
    ) -> None:
        assert model.memory is not None
        self.focus = focus or model.focus
        self.model, self.tree, self.memory, self.lens = model, tree, model.memory, lens
        self.found: Found | None = None
        self.scored: list[int] = []  # entries of each context that LensNet looked at
        self.asked = 0.0  # how sure the router is that the newest tokens ask for something, 0 to 1
        self.probability = np.empty(0)
        before = max(0, tree.tokens - tail) // tree.block_size * tree.block_size
        if route and self.memory.routes and before and tree.tokens:
            newest = tree.ids(max(0, tree.tokens - QUERY_TOKENS), tree.tokens)[None].to(model.device)
            with torch.no_grad():
                queries, asked = self.memory.query(newest)
                arguments.finite("the routing query", queries, asked)
                query = queries[0]
                self.found = (
                    find(query)
                    if find
                    else search(tree, self.memory, query, self.focus.search_blocks, self.focus.search_visits, before)
                )
                self.asked = float(asked.sigmoid())
                self.probability = self.asked * self._probability(self.found)

    @torch.no_grad()
    def __call__(self, context: WorkingContext) -> F64:
        """Scores [L] in [-1, 1] of a context's entries. Raises NonFiniteError when LensNet gives NaN."""
        score = np.zeros(len(context))
        if self.lens:
            x, rotary = entry_inputs(self.model, self.tree, context)
            lod = torch.from_numpy(context.lod.copy())[None].to(x.device)
            scores = self.memory.scores(x, lod, rotary)[0]
            self.scored.append(len(context))
            arguments.finite("a score of LensNet", scores)
            score = balanced(scores.cpu().double().numpy(), context)
        if self.found is None or not len(self.found.block):
            return score
        route = self.route(context)
        total: F64 = np.clip(route + (1 - route) * score - self.focus.scarcity * (route.max() - route), -1.0, 1.0)
        return total

    def route(self, context: WorkingContext) -> F64:
        """Probability [L] that an entry covers, or is part of, what is asked for."""
        assert self.found is not None
        r = context.block_size
        route = np.zeros(len(context))
        token = self.found.block * r
        entry = np.searchsorted(context.starts, token, side="right") - 1
        np.add.at(route, entry, self.probability)
        for at, probability in zip(
            entry[context.lod[entry] == 0], self.probability[context.lod[entry] == 0], strict=True
        ):
            route[at : at + r] = probability  # a raw block is asked for as a whole
        return np.minimum(route, 1.0)

    def _probability(self, found: Found) -> F64:
        """Softmax of the matches over all blocks that were read, given that something is asked. Among those that match
        alike only age counts: the newest is the likeliest. Empty when nothing was found."""
        assert self.memory.router is not None
        if not len(found.block):
            return np.empty(0)
        matches = torch.from_numpy(np.concatenate([found.match, found.others]))
        logits = self.memory.router.logits(matches.to(self.model.device))
        arguments.finite("the router's scale of matches", logits)
        alike = np.flatnonzero(found.match >= self.focus.restated_match * found.match.max(initial=0.0))
        order = np.empty(len(alike))
        order[np.argsort(found.block[alike])] = np.arange(len(alike))
        logits[torch.from_numpy(alike)] = logits.max() + self.focus.restated_bonus * torch.from_numpy(order).to(logits)
        probability: F64 = logits.double().softmax(0)[: len(found.match)].cpu().numpy()
        return probability


def score_function(
    model: GPT, tree: Tree, context: WorkingContext, options: AllocatorConfig, headroom: int
) -> tuple[ScoreFunction, LensScorer | None]:
    """What a refocus of a context scores entries by, and the scorer behind it if there is one.

    By the model's memory; by zeros, which leave age to decide, without a memory or while there is nothing to choose.
    """
    choice = bool(context.lod.any()) or len(context) > options.budget - headroom
    if model.memory is None or not choice:
        return lambda one: np.zeros(len(one)), None
    scorer = LensScorer(model, tree, options.recent_tokens, focus=options.focus)
    return scorer, scorer


def balanced(score: F64, context: WorkingContext) -> F64:
    """Scores [L] less their mean over the nodes before the newest block, each raw block counting as one.

    Scores compare: in training their mean is held at zero, as much to collapse as to expand. Of contexts unlike those of
    training LensNet may think better or worse as a whole, and all detail would be kept, or none.
    """
    r = context.block_size
    old = context.starts < (context.tokens - 1) // r * r
    if not old.any():
        return score
    weight = np.where(context.lod == 0, 1.0 / r, 1.0) * old
    centred: F64 = np.clip(score - (weight * score).sum() / weight.sum(), -1.0, 1.0)
    return centred


def _runs(index: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers as [first, last)."""
    if not len(index):
        return []
    cuts = np.flatnonzero(np.diff(index) != 1) + 1
    firsts, lasts = index[np.concatenate([[0], cuts])], index[np.concatenate([cuts - 1, [len(index) - 1]])]
    return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]
