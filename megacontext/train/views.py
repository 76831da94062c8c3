"""Which working contexts a training step sees, and how far the curriculum has come.

Views depend on the seed and on a row's global position alone, not on who trains the row or in which micro-batch: so a
run resumes exactly, and several workers see what one would. Everything is integers, made on the CPU.

Shapes: B rows, N variants of a row, V = B·N views, L entries, n blocks before the raw tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from megacontext.config import MemoryConfig
from megacontext.context.variants import sample_variants
from megacontext.context.views import ViewPlan
from megacontext.context.working_context import smallest_budget
from megacontext.errors import UserError

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

START_SHARE = 0.8  # entries of a variant at the first step, as a share of the sequence
END_SHARE = 0.2
_REFERENCE, _SINGLES = -1, -2  # numbers under which `RowRandom` draws what is not a variant


@dataclass(frozen=True)
class ViewSettings:
    """Lengths of a run's views in tokens and entries.

    `tail` newest tokens are raw in every view; the lens is asked before the last `horizon` of them and judged by them.
    """

    tokens: int
    block_size: int
    max_lod: int
    variants: int
    tail: int
    first_entries: int
    last_entries: int

    @classmethod
    def of(cls, config: MemoryConfig, tokens: int) -> ViewSettings:
        """Settings for rows of T tokens.

        The tail is `allocator_recent_tokens`, but at most half of a variant at the end of training, so that a short
        context still holds more than its tail. Raises UserError when a row has no whole block before the tail, when
        `mc_train_wc_length` is below the coarsest context, or `mc_start_wc_length` below that or above T.
        """
        last = config.mc_train_wc_length or int(END_SHARE * tokens)
        tail = max(2, min(config.allocator_recent_tokens, last // 2))
        if (tokens - tail) // config.block_size < 1:
            raise UserError(
                f"rows of {tokens} tokens with a raw tail of {tail} hold no whole block of {config.block_size}, so there is "
                f"nothing to make a gist of. Use --max_seq_len {tail + config.block_size} or more, or a smaller --block_size."
            )
        least = smallest_budget(tokens, config.block_size, tail, config.max_lod)
        if config.mc_train_wc_length and not least <= last <= tokens:
            raise UserError(
                f"--mc_train_wc_length {last} entries must lie between {least}, the coarsest context of {tokens} tokens with a "
                f"raw tail of {tail}, and {tokens}."
            )
        if not config.mc_train_wc_length:
            last = max(last, min(tokens, least + config.block_size - 1))  # room to expand one block, or nothing differs
        first = config.mc_start_wc_length or max(last, int(START_SHARE * tokens))
        if not last <= first <= tokens:
            raise UserError(
                f"--mc_start_wc_length {first} entries must lie between {last}, where the curriculum ends, and the {tokens} "
                "tokens of a row, which are all there is to show."
            )
        return cls(tokens, config.block_size, config.max_lod, config.mc_num_random_variants, tail, first, last)

    @property
    def horizon(self) -> int:
        """Newest tokens that judge a view: half of the tail."""
        return self.tail // 2

    @property
    def blocks(self) -> int:
        """n, whole blocks before the tail: those whose level of detail is chosen."""
        return (self.tokens - self.tail) // self.block_size

    @property
    def reference_entries(self) -> int:
        """Most entries of the view on which the lens is asked: the end of the curriculum, without the horizon."""
        return self.last_entries - self.horizon

    def length(self, entries: int) -> int:
        """Entries of a view that may have at most so many: a collapse takes block_size - 1 of them at a time."""
        collapses = -(-max(0, self.tokens - entries) // (self.block_size - 1))
        return self.tokens - collapses * (self.block_size - 1)

    def room(self, entries: int) -> int:
        """Most blocks before the tail that a view of at most so many entries can show raw."""
        least = smallest_budget(self.tokens, self.block_size, self.tail, self.max_lod)
        return min(self.blocks, max(0, entries - least) // (self.block_size - 1))

    def entries(self, progress: float) -> int:
        """Most entries of a variant when a share `progress` of the whole run is done: a straight line."""
        return round(self.first_entries + min(max(progress, 0.0), 1.0) * (self.last_entries - self.first_entries))


@dataclass(frozen=True)
class StepViews:
    """Views of a micro-batch: variant n of row b is view b·N + n; `reference` has one view of each row's first
    T - horizon tokens, of the length that training ends with, whatever the curriculum says. What rows at
    even positions show raw there lies next to the tail, as in the contexts that a refocus begins with."""

    variants: ViewPlan
    reference: ViewPlan


def draw_views(
    settings: ViewSettings, seed: int, positions: I64, progress: float, kept: Bool | None = None
) -> StepViews:
    """The views of rows at global positions [B]. All variants of a step have the same number of entries.

    `kept` [B, n]: blocks that a good context of the row shows raw. Every second variant shows as many of them raw as it
    has room for, as a context does whose lens is right; the others are drawn blindly.
    """
    rows = np.arange(len(positions))
    owner = np.repeat(rows, settings.variants)
    number = np.tile(np.arange(settings.variants), len(positions))
    keep = None if kept is None else kept[owner] & (number % 2 == 0)[:, None]
    variants = _sample(settings, settings.tokens, settings.entries(progress), settings.tail, owner,
                       RowRandom(seed, positions[owner], number), keep)  # fmt: skip
    ahead = settings.horizon
    near = np.zeros((len(rows), settings.blocks), bool)
    near[positions % 2 == 0, settings.blocks - settings.room(settings.last_entries) :] = True
    reference = _sample(settings, settings.tokens - ahead, settings.reference_entries, settings.tail - ahead, rows,
                        RowRandom(seed, positions, np.full(len(rows), _REFERENCE)), near)  # fmt: skip
    return StepViews(variants, reference)


def _sample(
    settings: ViewSettings,
    tokens: int,
    entries: int,
    tail: int,
    owner: I64,
    random: RowRandom,
    keep: Bool | None = None,
) -> ViewPlan:
    generator = cast(np.random.Generator, random)  # all that sampling asks of a generator is `random(size)`
    return sample_variants(tokens, settings.block_size, entries, tail, settings.max_lod, owner, generator, keep)


def single_expansions(settings: ViewSettings, chosen: I64) -> tuple[ViewPlan, ViewPlan]:
    """The coarsest one-level view of each row, and it with one block expanded: chosen blocks [B, k] to views b·k + j."""
    rows, count = chosen.shape
    r, n, tokens = settings.block_size, settings.blocks, settings.tokens
    newest = np.arange(n * r, tokens)
    coarse = ViewPlan(
        np.tile(np.repeat([1, 0], [n, len(newest)]), (rows, 1)),
        np.tile(np.concatenate([np.arange(n), newest]), (rows, 1)),
        np.full(rows, n + len(newest)),
        np.arange(rows),
        r,
    )
    block = chosen.reshape(-1, 1)
    column = np.arange(n - 1 + r + len(newest))[None]
    inside = (column >= block) & (column < block + r)
    at = np.clip(np.where(column < block, column, column - (r - 1)), 0, n - 1 + len(newest))  # column before the edit
    lod, index = coarse.lod[0][at], coarse.index[0][at]
    single = ViewPlan(
        np.where(inside, 0, lod),
        np.where(inside, block * r + column - block, index),
        np.full(rows * count, column.size),
        np.repeat(np.arange(rows), count),
        r,
    )
    return coarse, single


def choose_blocks(settings: ViewSettings, seed: int, positions: I64, count: int) -> I64:
    """`count` different blocks before the tail of each row, [B, count]; all of them if there are fewer."""
    random = RowRandom(seed, positions, np.full(len(positions), _SINGLES))
    keys = random.random((len(positions), settings.blocks))
    return np.argsort(keys, axis=1)[:, :count].astype(np.int64)


def raw_blocks(plan: ViewPlan, blocks: int) -> Bool:
    """[V, blocks]: which of a view's first blocks are shown as tokens."""
    found = np.zeros((len(plan.length), blocks), bool)
    first = plan.valid & (plan.lod == 0) & (plan.index % plan.block_size == 0)
    view, column = np.nonzero(first & (plan.index < blocks * plan.block_size))
    found[view, plan.index[view, column] // plan.block_size] = True
    return found


def entry_of_token(plan: ViewPlan, tokens: int) -> I64:
    """[V, tokens]: the column of the entry that shows each of a view's first tokens."""
    begins = np.zeros((len(plan.length), int(plan.tokens.max())), np.int64)
    view, column = np.nonzero(plan.valid)
    begins[view, plan.starts[view, column]] = 1
    return np.asarray(begins.cumsum(1)[:, :tokens] - 1)


class RowRandom:
    """Uniform numbers in [0, 1) for rows, each a function of (seed, position, number, draw, column) and of nothing else.

    `position`, `number` int64 [V]: a row's global position, and which of its views. Counted, not carried: row v of a
    draw is the same whatever other rows are drawn with it. The mixing is the finalizer of MurmurHash3 (Appleby, 2011).
    """

    def __init__(self, seed: int, position: I64, number: I64) -> None:
        with np.errstate(over="ignore"):
            key = _scrambled(np.full(len(position), seed, np.int64).astype(np.uint64))
            key = _scrambled(key + position.astype(np.uint64))
            self._key = _scrambled(key + number.astype(np.int64).astype(np.uint64))
        self._draws = 0

    def random(self, size: int | tuple[int, ...]) -> F64:
        """Numbers [V, ...]: the first axis must be the rows'."""
        shape = (size,) if isinstance(size, int) else size
        assert shape[0] == len(self._key), f"{shape[0]} rows asked for, {len(self._key)} there"
        self._draws += 1
        columns = np.arange(math.prod(shape[1:]), dtype=np.uint64)
        with np.errstate(over="ignore"):
            drawn = _scrambled(self._key + np.uint64(self._draws))
            mixed = _scrambled(drawn[:, None] + columns * np.uint64(0x9E3779B97F4A7C15))
        return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def _scrambled(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return np.asarray(x ^ (x >> np.uint64(33)))
