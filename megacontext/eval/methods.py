"""Ways to show a long history to a model in at most W entries: ours, an oracle, and every baseline of the comparison.

A method turns a prompt (a history, and the question at its end) into a layout: which nodes are entries. What they cost
to choose is counted beside what they cost to read. `eval/continuation.py` scores what follows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from megacontext.config import MemoryConfig
from megacontext.context.edits import apply, expand_node
from megacontext.context.gist_function import GistFunction
from megacontext.context.store_branch import BranchStore
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.eval.bm25 import best_blocks, bm25_scores
from megacontext.inference.search import scan
from megacontext.inference.session_focus import SessionFocus
from megacontext.inference.session_host import EmbeddingMeans
from megacontext.inference.session_options import SessionOptions, resolve_options
from megacontext.model.flops import lens_flops, routing_key_flops
from megacontext.model.gpt import GPT
from megacontext.model.norm import rms_norm
from megacontext.model.router import QUERY_TOKENS

I64 = npt.NDArray[np.int64]

SINKS = 4  # first tokens that are kept (StreamingLLM, arXiv:2309.17453)
FULL_TOKENS = 1 << 14  # longest prompt that is attended to as a whole
_LEARNED, _MEAN = "learned", "mean"
_BUILD_TOKENS = 1 << 14  # tokens of one call of the gist function: bounds memory at any length of history


class NormedMean(EmbeddingMeans):
    """A gist function that learned nothing: means of normed token embeddings, normed again at every level."""

    digest = "normed mean"

    def leaf(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, m, r] int64 -> [n, m, D]."""
        return rms_norm(super().leaf(ids))

    def inner(self, records: torch.Tensor, level: int) -> torch.Tensor:
        """[n, r, D] -> [n, D]."""
        return rms_norm(super().inner(records, level))


class History:
    """The ids [N] of a history and its trees, each made when it is first used. `build_seconds`: what that took, by
    kind of gist.

    `block_size` is used by a model without a memory. Raises UserError for a history shorter than a block.
    """

    def __init__(self, model: GPT, ids: npt.NDArray[np.integer], block_size: int = 32) -> None:
        self.model, self.ids = model, np.asarray(ids, np.int64)
        self.block_size = block_size if model.memory is None else model.memory.block_size
        self.build_seconds: dict[str, float] = {}
        self._trees: dict[str, Tree] = {}
        self._focus: dict[SessionOptions, SessionFocus] = {}
        if len(self.ids) < self.block_size:
            raise UserError(
                f"a history of {len(self.ids)} tokens is shorter than a block of {self.block_size}; make it longer."
            )

    def tree(self, gists: str) -> Tree:
        """The tree of learned or mean gists over the history alone."""
        if gists not in self._trees:
            began = time.perf_counter()
            memory = self.model.memory
            assert gists == _MEAN or memory is not None
            gist: GistFunction = NormedMean(self.model, self.block_size) if memory is None or gists == _MEAN else memory
            tree = Tree(gist, vocab_size=self.model.config.vocab_size, batch_tokens=_BUILD_TOKENS)
            tree.append(self.ids)
            self.build_seconds[gists] = time.perf_counter() - began
            self._trees[gists] = tree
        return self._trees[gists]

    def focus(self, options: SessionOptions) -> SessionFocus:
        """The focus of a session that has taken in the history, not yet refocused; a copy of its own for each caller."""
        if options not in self._focus:
            self._focus[options] = SessionFocus.new(options)
            self._focus[options].follow(len(self.ids))
        return copy.deepcopy(self._focus[options])


class Prompt:
    """A history with `question` ids [q] after it, any number of which share the history's trees.

    `evidence`: tokens of the history that an oracle would look at. `headroom`: entries that a refocus leaves free for
    the tokens to come; None: as many as a session.
    """

    def __init__(
        self,
        history: History,
        question: npt.NDArray[np.integer] | Sequence[int] = (),
        evidence: Sequence[int] = (),
        headroom: int | None = None,
    ) -> None:
        self.history, self.evidence, self.headroom = history, tuple(evidence), headroom
        self.question = np.asarray(question, np.int64)
        self._trees: dict[str, Tree] = {}

    @property
    def model(self) -> GPT:
        return self.history.model

    @property
    def block_size(self) -> int:
        return self.history.block_size

    @property
    def tokens(self) -> int:
        """Tokens of history and question."""
        return len(self.history.ids) + len(self.question)

    @property
    def gists(self) -> str:
        """The best gists that there are."""
        return _MEAN if self.model.memory is None else _LEARNED

    @cached_property
    def query(self) -> I64:
        """What a search by words goes by: the question, or the newest tokens where there is none."""
        return self.question if len(self.question) else self.history.ids[-QUERY_TOKENS:]

    def tree(self, gists: str) -> Tree:
        """The tree over history and question."""
        if gists not in self._trees:
            base = self.history.tree(gists)
            if len(self.question):
                base = Tree(base.gist, BranchStore(base.store))
                base.append(self.question)
            self._trees[gists] = base
        return self._trees[gists]


@dataclass(frozen=True)
class Layout:
    """Entries that a model is shown: `context`, ordered and disjoint, with gaps where a method drops text.

    `gists`: learned or mean, of the tree they come from. `seconds` and `flops` were spent on choosing them.
    """

    context: WorkingContext
    tree: Tree
    gists: str
    seconds: float
    flops: float

    def __len__(self) -> int:
        return len(self.context)

    def shows(self, tokens: Sequence[int]) -> bool:
        """Whether all these tokens are raw entries."""
        raw = self.context.index[self.context.lod == 0]
        return bool(np.isin(np.asarray(tokens, np.int64), raw).all())


@dataclass(frozen=True)
class _Choice:
    context: WorkingContext
    gists: str
    flops: float = 0.0


def offered(model: GPT, tokens: int = 0) -> tuple[str, ...]:
    """Names of the methods that a model can use on prompts of so many tokens."""
    return tuple(name for name in METHODS if not _missing(name, model, tokens))


def choose_methods(model: GPT, names: Sequence[str], tokens: int = 0) -> tuple[str, ...]:
    """The named methods; without names all that the model can use on prompts of `tokens` tokens.

    Raises UserError for a name that is unknown, or a method that cannot be used.
    """
    for name in names:
        if name not in METHODS:
            raise UserError(f"method {name!r} is unknown; choose from {','.join(METHODS)}.")
        if missing := _missing(name, model, tokens):
            raise UserError(f"method {name!r} needs {missing}; here are {','.join(offered(model, tokens))}.")
    return tuple(names) or offered(model, tokens)


def layout(method: str, prompt: Prompt, budget: int, tail: int, seed: int = 0) -> Layout:
    """What a method shows of a prompt in at most `budget` entries; where it keeps a recent part, the last `tail` tokens.

    Raises UserError for a method that the model has no use for, and when tail and coarsest nodes are over the budget.
    """
    choose_methods(prompt.model, [method], prompt.tokens)
    if not 0 < tail < budget:
        raise UserError(f"a raw tail of {tail} tokens in a budget of {budget} entries; use 1 to {budget - 1}.")
    prompt.tree(prompt.gists)  # not part of what choosing costs, nor is what a session does before the question comes
    if method == "ours":
        prompt.history.focus(_session_options(prompt, budget, tail))
    began = time.perf_counter()
    choice = METHODS[method](prompt, budget, tail, np.random.default_rng(seed))
    seconds = time.perf_counter() - began
    assert len(choice.context) <= budget or method == "full", (
        f"{method} shows {len(choice.context)} entries of {budget}"
    )
    return Layout(choice.context, prompt.tree(choice.gists), choice.gists, seconds, choice.flops)


def expand_blocks(context: WorkingContext, blocks: Sequence[int] | I64, budget: int) -> WorkingContext:
    """The context with blocks shown raw, in the order given, as far as the budget goes: each opens every node above it."""
    r = context.block_size
    for block in blocks:
        token = int(block) * r
        levels = int(context.lod[context.at_token(token)])
        if len(context) + r - 1 > budget:
            break
        if len(context) + levels * (r - 1) <= budget:
            for _ in range(levels):
                context = apply(context, expand_node(context, token))
    return context


def _window(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    return _raw(prompt, np.arange(max(0, prompt.tokens - budget), prompt.tokens))


def _sinks(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """The first tokens and the newest."""
    kept = min(SINKS, budget - tail)
    newest = np.arange(max(kept, prompt.tokens - (budget - kept)), prompt.tokens)
    return _raw(prompt, np.concatenate([np.arange(kept), newest]))


def _mean_age(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """Detail fades with age, and gists are means: needs no training."""
    return _Choice(WorkingContext.by_age(prompt.tokens, prompt.block_size, budget, tail), _MEAN)


def _gist_age(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """Learned gists without a lens."""
    return replace(_mean_age(prompt, budget, tail, rng), gists=_LEARNED)


def _random(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """Blocks drawn at random are shown raw."""
    return _expanded(prompt, rng.permutation(_old_blocks(prompt, tail))[:budget], budget, tail)


def _bm25(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """The blocks that share rare words with the query, and the newest tokens, all raw, no gists."""
    r, blocks = prompt.block_size, _old_blocks(prompt, tail)
    scores = bm25_scores(prompt.history.ids[: blocks * r], prompt.query, r)
    best = np.sort(best_blocks(scores)[: (budget - tail) // r])
    index = (best[:, None] * r + np.arange(r)).reshape(-1)
    newest = np.arange(max(0, prompt.tokens - tail), prompt.tokens)
    older = np.setdiff1d(np.arange(max(0, prompt.tokens - budget - len(index)), prompt.tokens - tail), index)
    room = budget - tail - len(index)
    return _raw(prompt, np.sort(np.concatenate([index, older[max(0, len(older) - room) :], newest])))


def _flat(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """The routing keys of every block compared with the query; the best blocks are shown raw. No tree, no lens."""
    memory, tree = prompt.model.memory, prompt.tree(_LEARNED)
    assert memory is not None
    with torch.no_grad():
        newest = tree.ids(max(0, tree.tokens - QUERY_TOKENS), tree.tokens)[None].to(prompt.model.device)
        found = scan(tree, memory, memory.query(newest)[0][0], budget // tree.block_size, tree.tokens - tail)
    return replace(
        _expanded(prompt, found.block, budget, tail),
        flops=routing_key_flops(prompt.model.config, memory.config, QUERY_TOKENS)
        + found.visits * _match_flops(memory.config),
    )


def _ours(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """What a session does when a question arrives, done by the session's own focus: it takes the text in, and refocuses."""
    model, memory = prompt.model, prompt.model.memory
    assert memory is not None
    focus = prompt.history.focus(_session_options(prompt, budget, tail))
    focus.follow(prompt.tokens)
    _, scorer = focus.refocus(model, prompt.tree(_LEARNED), prompt.headroom)
    spent = 0.0 if scorer is None else sum(lens_flops(model.config, memory.config, n) for n in scorer.scored)
    if scorer is not None and scorer.found is not None:
        spent += routing_key_flops(model.config, memory.config, QUERY_TOKENS)
        spent += scorer.found.visits * prompt.block_size * _match_flops(memory.config)
    return _Choice(focus.context, _LEARNED, spent)


def _session_options(prompt: Prompt, budget: int, tail: int) -> SessionOptions:
    return resolve_options(prompt.model, {"budget": budget, "recent_tokens": tail})


def _oracle(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """The blocks that hold the evidence are shown raw: what a perfect lens would do."""
    if not prompt.evidence:
        raise UserError("the oracle needs to be told where the evidence is; leave it out where nobody knows.")
    old = [token // prompt.block_size for token in prompt.evidence if token < prompt.tokens - tail]
    return _expanded(prompt, old, budget, tail)


def _full(prompt: Prompt, budget: int, tail: int, rng: np.random.Generator) -> _Choice:
    """Everything raw, whatever the budget: the ceiling, as far as it can be reached."""
    return _raw(prompt, np.arange(prompt.tokens))


METHODS: dict[str, Callable[[Prompt, int, int, np.random.Generator], _Choice]] = {
    "window": _window,
    "sinks": _sinks,
    "mean_age": _mean_age,
    "gist_age": _gist_age,
    "random": _random,
    "bm25": _bm25,
    "flat": _flat,
    "ours": _ours,
    "oracle": _oracle,
    "full": _full,
}


def _missing(method: str, model: GPT, tokens: int) -> str:
    """What a method lacks; empty when it lacks nothing."""
    if method in ("gist_age", "flat", "ours") and model.memory is None:
        return "a model that was trained with --mc"
    if method == "flat" and model.memory is not None and not model.memory.routes:
        return "trained routing keys (--routing_slots and --mc_recall_share above 0)"
    if method == "full" and tokens > FULL_TOKENS:
        return f"a prompt of at most {FULL_TOKENS} tokens, not {tokens}"
    return ""


def _raw(prompt: Prompt, index: I64) -> _Choice:
    context = WorkingContext(np.zeros(len(index), np.int64), index.astype(np.int64), prompt.block_size)
    return _Choice(context, prompt.gists)


def _old_blocks(prompt: Prompt, tail: int) -> int:
    """Whole blocks before the raw tail."""
    return max(0, prompt.tokens - tail) // prompt.block_size


def _expanded(prompt: Prompt, blocks: Sequence[int] | I64, budget: int, tail: int) -> _Choice:
    """The coarsest context with some blocks raw."""
    context = WorkingContext.initial(prompt.tokens, prompt.block_size, budget, tail)
    return _Choice(expand_blocks(context, blocks, budget), prompt.gists)


def _match_flops(config: MemoryConfig) -> float:
    """Of comparing a query with the keys of one node."""
    return 2.0 * config.routing_slots * config.routing_width
