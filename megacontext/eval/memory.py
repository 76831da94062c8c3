"""What a memory is worth in language modelling: the loss of what really follows a long history, method by method.

At one budget of W entries every method shows the model N tokens of history; then H tokens follow, raw. What `window`
loses and `full` does not is what far context is worth; a method's CGR is the share of it that it recovers.

The budget holds at every token. Methods that choose entries get W - H of them for the history, and what follows fills
the rest; `window` and `sinks` drop a token for every one that follows, so each of their predictions is made from W: what
is left of the comparison's bias is in their favour. `full` is raw text as far back as `full_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.eval.bm25 import best_blocks, bm25_scores
from megacontext.eval.bootstrap import Interval, Resampler
from megacontext.eval.continuation import score_continuation
from megacontext.eval.counterfactual import block_utilities, substitution_kl
from megacontext.eval.decode_cost import ROLLING, DecodeCost, decode_cost
from megacontext.eval.methods import History, Layout, Prompt, layout
from megacontext.eval.windows import Windows
from megacontext.model.gpt import GPT

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

CLEAR_GAP = 0.02  # nats per token; far context worth less than this leaves nothing to compare
_UNKNOWN = Interval(math.nan, math.nan, math.nan)
_CHUNK_WINDOWS = 8  # windows whose trees are held at once: bounds memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`budget` W in entries, `tail` raw tokens, `full_tokens` that full attention sees at most, its continuation included.

    `oracle_blocks`: blocks whose expansion is measured per window for the oracle. `key_share`: share of the tokens that
    count as key tokens. `timing_windows`: windows on which decoding is timed.
    """

    budget: int
    tail: int
    methods: tuple[str, ...]
    full_tokens: int
    block_size: int = 32
    oracle_blocks: int = 64
    key_share: float = 0.1
    timing_windows: int = 3
    seed: int = 0

    def check(self, horizon: int) -> None:
        """Raise UserError for sizes that leave no room for each other."""
        if self.tail < 1 or self.tail + horizon >= self.budget:
            raise UserError(
                f"a budget of {self.budget} entries has no room for a raw tail of {self.tail} tokens and a horizon of "
                f"{horizon}; raise --budget, or lower --tail or --horizon."
            )
        if self.full_tokens <= self.budget:
            raise UserError(
                f"full attention over {self.full_tokens} tokens sees no more than the budget of {self.budget} entries; "
                "lower --budget, or raise --full_tokens beyond it."
            )
        if not 0 < self.key_share <= 1:
            raise UserError(f"--key_share is {self.key_share}; it is a share of the tokens, above 0 and at most 1.")

    def room(self, method: str, horizon: int, tokens: int) -> int:
        """Entries that a method may show of a history of N tokens."""
        if method == "full":
            return min(tokens, self.full_tokens - horizon)
        return self.budget if method in ROLLING else self.budget - horizon


@dataclass
class Losses:
    """One method over K windows: `nll` [K, H] nats, `entries` [K], `flops` [K] spent on choosing, raw tokens shown."""

    nll: list[F64] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    raw: list[I64] = field(default_factory=list)  # per window, the numbers of the tokens that are raw entries


@dataclass(frozen=True)
class Measured:
    """One length of history: losses by method, what decoding costs, and what the oracle knows of each window."""

    history: int
    block_size: int
    losses: dict[str, Losses]
    costs: dict[str, DecodeCost]
    best_blocks: list[I64]  # per window; empty without an oracle


def measure(
    model: GPT,
    windows: Windows,
    history: int,
    settings: Settings,
    on_window: Callable[[int], object] | None = None,
) -> Measured:
    """Losses of every method on every window with a history of `history` tokens.

    `window` and `full` are always among the methods. `on_window` is called with the number of windows done. Raises
    UserError for sizes that do not fit each other.
    """
    settings.check(windows.horizon)
    methods = tuple(dict.fromkeys(("window", *settings.methods, "full")))
    losses = {method: Losses() for method in methods}
    best: list[I64] = []
    block_size = settings.block_size if model.memory is None else model.memory.block_size
    for start in range(0, len(windows), _CHUNK_WINDOWS):
        numbers = range(start, min(start + _CHUNK_WINDOWS, len(windows)))
        following = np.stack([windows.continuation(k) for k in numbers])
        prompts = [
            Prompt(History(model, windows.history(k, history), settings.block_size), headroom=0) for k in numbers
        ]
        if "oracle" in methods:
            best += [_best(prompt, row, settings) for prompt, row in zip(prompts, following, strict=True)]
            tokens = [tuple(int(block) * block_size for block in blocks) for blocks in best[start:]]
            prompts = [Prompt(p.history, (), evidence, 0) for p, evidence in zip(prompts, tokens, strict=True)]
        for method in methods:
            shown = [_layout(method, p, settings, windows.horizon, k) for p, k in zip(prompts, numbers, strict=True)]
            if method in ("window", "sinks"):
                nll = _rolled(method, prompts, following, settings)
            else:
                nll = score_continuation(model, shown, following).nll
            mine = losses[method]
            mine.nll += list(nll)
            mine.entries += [len(one) for one in shown]
            mine.flops += [one.flops for one in shown]
            mine.raw += [one.context.index[one.context.lod == 0] for one in shown]
        if on_window is not None:
            on_window(numbers.stop)
    timed = range(min(settings.timing_windows, len(windows)))
    costs = {}
    for method in methods if timed else ():
        room = settings.room(method, windows.horizon, history)
        runs = [
            decode_cost(model, method, windows.history(k, history), windows.continuation(k), room, settings.tail,
                        settings.block_size, None if method != "oracle" else best[k], settings.seed + k)
            for k in (0, *timed)  # the first warms up
        ]  # fmt: skip
        costs[method] = DecodeCost.typical(runs[1:])
    return Measured(history, block_size, losses, costs, best)


def table_rows(measured: Measured, windows: Windows, settings: Settings) -> list[dict[str, Any]]:
    """One row a method, plain data: figures with bounds `…_low` and `…_high`, None where a figure has no meaning.

    Intervals are over documents, paired: every figure of a history is resampled by the same draws. There is no CGR
    where the interval of nll_window - nll_full reaches down to 0: a share of nothing.
    """
    draws = Resampler.of(windows.document, seed=settings.seed)
    nll = {method: np.stack(found.nll) for method, found in measured.losses.items()}
    mean = {method: values.mean(1) for method, values in nll.items()}
    key = key_tokens(nll["window"] - nll["full"], settings.key_share)
    keyed = {method: (values * key).sum(1) for method, values in nll.items()}
    gap, key_gap = mean["window"] - mean["full"], keyed["window"] - keyed["full"]
    winnable = draws.mean(gap).low > 0
    rows = []
    for method, found in measured.losses.items():
        figures = {
            "nll": draws.mean(mean[method]),
            "delta_nll": draws.mean(mean[method] - mean["full"]),
            "below_window": draws.mean(mean["window"] - mean[method]),
            "cgr": draws.ratio(mean["window"] - mean[method], gap) if winnable else _UNKNOWN,
            "key_nll": draws.ratio(keyed[method], key.sum(1)),
            "key_cgr": draws.ratio(keyed["window"] - keyed[method], key_gap),
        }
        if "ours" in mean and method != "ours":
            figures["ours_better_by"] = draws.mean(mean[method] - mean["ours"])
        if "oracle" in mean and method not in ("full", "oracle"):
            figures["lens_recall"] = draws.mean(_shares_shown(found, measured))
            figures["lens_regret"] = draws.mean(mean[method] - mean["oracle"])
        row: dict[str, Any] = {"history": measured.history, "method": method, "entries": float(np.mean(found.entries))}
        for name, interval in figures.items():
            row |= {
                name: _known(interval.value),
                f"{name}_low": _known(interval.low),
                f"{name}_high": _known(interval.high),
            }
        if method in measured.costs:
            row |= measured.costs[method].row()
        rows.append(row)
    return rows


def far_context(measured: Measured, windows: Windows, settings: Settings) -> dict[str, Any]:
    """What there is to win: nll_window - nll_full with its interval, and the key tokens that hold most of it.

    `share_of_gap` is the part of the whole difference that lies on the key tokens.
    """
    draws = Resampler.of(windows.document, seed=settings.seed)
    gain = np.stack(measured.losses["window"].nll) - np.stack(measured.losses["full"].nll)
    key = key_tokens(gain, settings.key_share)
    gap: Interval = draws.mean(gain.mean(1))
    total = float(gain.sum())
    return {
        "history": measured.history,
        "full_tokens": int(np.mean(measured.losses["full"].entries)),
        "gap": gap.value,
        "gap_low": gap.low,
        "gap_high": gap.high,
        "clear": gap.value >= CLEAR_GAP,
        "key_share": float(key.mean()),
        "key_gap": float(gain[key].mean()) if key.any() else 0.0,
        "share_of_gap": _known(float(gain[key].sum()) / total) if total > 0 else None,
    }


def key_tokens(gain: F64, share: float) -> Bool:
    """The tokens [K, H] that full context helps most: the top `share` of all by gain in nats, those with a gain above 0.

    As LongPPL's (arXiv:2410.23771), with a share in place of a threshold in nats, which small models hardly reach.
    """
    return (gain >= np.quantile(gain, 1 - share)) & (gain > 0)


def substitution(model: GPT, windows: Windows, settings: Settings, count: int, blocks: int = 8) -> list[dict[str, Any]]:
    """Mean KL in nats per token when one block of a raw context is shown as its gist instead, by distance in blocks.

    Over the first `count` windows and `blocks` blocks each, spread from the newest to the oldest that fits the budget.
    """
    r = settings.block_size if model.memory is None else model.memory.block_size
    held = min(settings.budget - windows.horizon, windows.history_tokens) // r
    if count < 1 or held < 2:
        return []
    index = np.unique(np.linspace(0, held - 2, min(blocks, held - 1)).round().astype(int))  # the newest stays raw
    kl = []
    for k in range(min(count, len(windows))):
        prompt = Prompt(History(model, windows.history(k, held * r), r))
        nodes = [(1, int(at)) for at in index]
        kl.append(substitution_kl(model, prompt.tree(prompt.gists), nodes, windows.continuation(k)))
    means = np.mean(kl, 0)
    return [{"blocks_back": int(held - at), "kl": float(value)} for at, value in zip(index, means, strict=True)]


def _layout(method: str, prompt: Prompt, settings: Settings, horizon: int, window: int) -> Layout:
    room = settings.room(method, horizon, prompt.tokens)
    return layout("window" if method == "full" else method, prompt, room, settings.tail, settings.seed + window)


def _rolled(method: str, prompts: list[Prompt], following: I64, settings: Settings) -> F64:
    """NLL [B, H] of the tokens that follow, each predicted from the W entries that a window holds just before it."""
    shown = [
        _layout(method, Prompt(prompt.history, row[:done]), settings, len(row), 0)
        for prompt, row in zip(prompts, following, strict=True)
        for done in range(len(row))
    ]
    return score_continuation(prompts[0].model, shown, following.reshape(-1, 1)).nll.reshape(following.shape)


def _best(prompt: Prompt, following: I64, settings: Settings) -> I64:
    """Blocks worth showing raw, by what showing each alone takes off the loss of what follows; at least the best one.

    Candidates: half the newest, half those that share most words with the query; all when there are few enough.
    """
    r, room = prompt.block_size, settings.room("oracle", len(following), prompt.tokens)
    old = max(0, prompt.tokens - settings.tail) // r
    newest = np.arange(old - 1, -1, -1)
    alike = best_blocks(bm25_scores(prompt.history.ids[: old * r], prompt.query, r))
    half = settings.oracle_blocks // 2
    ordered = np.concatenate([newest[:half], alike, newest[half:]])
    _, first = np.unique(ordered, return_index=True)
    candidates = ordered[np.sort(first)][: settings.oracle_blocks]
    context = WorkingContext.initial(prompt.tokens, r, room, settings.tail)
    tree = prompt.tree(prompt.gists)
    found = block_utilities(prompt.model, tree, context, candidates, following, settings.tail, room)
    order = np.argsort(-found.ahead, kind="stable")
    worth: I64 = found.item[order][: max(1, int((found.ahead > 0).sum()))]
    return worth if len(worth) else candidates[:1]


def _shares_shown(found: Losses, measured: Measured) -> list[float]:
    """Per window, the share of the blocks that the oracle shows that are raw here too; nan where it shows none."""
    shares = []
    for raw, oracle, blocks in zip(found.raw, measured.losses["oracle"].raw, measured.best_blocks, strict=True):
        first = blocks * measured.block_size
        shown = first[np.isin(first, oracle)]
        shares.append(float(np.isin(shown, raw).mean()) if len(shown) else math.nan)
    return shares


def _known(value: float) -> float | None:
    """A number for JSON."""
    return value if math.isfinite(value) else None
