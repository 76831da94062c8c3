"""The working context: ordered nodes that tile a history, as two integer arrays. Everything else is arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megacontext.context.gist_function import check_block_size, levels_of
from megacontext.errors import MegaContextError, UserError

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

MAX_TOKENS = 1 << 52  # node positions are exact in float64 up to here


class InvariantError(MegaContextError, AssertionError):
    """A law of the bookkeeping is broken: a defect of this program, never of the user's input."""


def spans(lod: I64, block_size: int) -> I64:
    """Tokens that nodes of these levels cover: r^lod, int64 of the same shape."""
    top = int(lod.max()) if lod.size else 0
    return np.array([block_size**level for level in range(top + 1)], dtype=np.int64)[lod]


def starts(lod: I64, index: I64, block_size: int) -> I64:
    """First tokens of nodes."""
    return index * spans(lod, block_size)


def positions(lod: I64, index: I64, block_size: int) -> F64:
    """Mean position of what nodes cover, start + (span - 1)/2: float64, exact for any history up to 2^52 tokens."""
    span = spans(lod, block_size)
    return index * span + (span - 1) / 2


def sigmas(lod: I64, block_size: int) -> F64:
    """Spread of what nodes cover: 0 for tokens, span/sqrt(12) for gists."""
    return np.where(lod == 0, 0.0, spans(lod, block_size) / np.sqrt(12.0))


@dataclass(frozen=True, eq=False)
class WorkingContext:
    """Entries (lod[i], index[i]), i < L, that tile [0, tokens) in order. The arrays are int64 [L] and read-only.

    Construction takes the arrays as they are; `check` proves that they tile.
    """

    lod: I64
    index: I64
    block_size: int

    def __post_init__(self) -> None:
        for name in ("lod", "index"):
            array = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            if array is getattr(self, name) and array.flags.writeable:
                array = array.view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        """Cost in entries."""
        return len(self.lod)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WorkingContext):
            return NotImplemented
        same = self.block_size == other.block_size and np.array_equal(self.lod, other.lod)
        return bool(same and np.array_equal(self.index, other.index))

    @property
    def tokens(self) -> int:
        """T, tokens covered."""
        if not len(self):
            return 0
        return (int(self.index[-1]) + 1) * int(self.block_size ** int(self.lod[-1]))

    @property
    def spans(self) -> I64:
        """Tokens that each entry covers [L]."""
        return spans(self.lod, self.block_size)

    @property
    def starts(self) -> I64:
        """First token of each entry [L]."""
        return starts(self.lod, self.index, self.block_size)

    @property
    def positions(self) -> F64:
        """Mean position of what each entry covers [L]."""
        return positions(self.lod, self.index, self.block_size)

    @property
    def sigmas(self) -> F64:
        """Spread of what each entry covers [L]."""
        return sigmas(self.lod, self.block_size)

    @property
    def entries(self) -> list[tuple[int, int]]:
        """[(lod, index), ...] in order."""
        return list(zip(self.lod.tolist(), self.index.tolist(), strict=True))

    def describe(self, at: int) -> str:
        """An entry in words, for messages."""
        return f"entry {at} (lod {int(self.lod[at])}, index {int(self.index[at])})"

    def check(self) -> None:
        """W2: raise InvariantError unless the entries tile [0, T) in order, without gap or overlap."""
        if self.lod.ndim != 1 or self.lod.shape != self.index.shape:
            raise InvariantError(
                f"W2: levels {list(self.lod.shape)} and indices {list(self.index.shape)} do not match."
            )
        top = levels_of(MAX_TOKENS, self.block_size)
        absurd = np.flatnonzero((self.lod < 0) | (self.lod > top) | (self.index < 0) | (self.index > MAX_TOKENS))
        if absurd.size:
            raise InvariantError(f"W2: {self.describe(int(absurd[0]))} is not a node of any history.")
        begins = self.starts
        ends = begins + self.spans
        wrong = np.flatnonzero(begins != np.concatenate([np.zeros(1, np.int64), ends])[: len(begins)])
        if wrong.size:
            at = int(wrong[0])
            due = int(ends[at - 1]) if at else 0
            raise InvariantError(f"W2: {self.describe(at)} starts at token {int(begins[at])}, but {due} is due.")

    def at_token(self, token: int) -> int:
        """Number of the entry that covers a token. Raises UserError outside the history."""
        if not 0 <= token < self.tokens:
            raise UserError(f"token {token} is not in a history of {self.tokens} tokens.")
        return int(np.searchsorted(self.starts, token, side="right")) - 1

    def append(self, count: int) -> WorkingContext:
        """With `count` new raw tokens at the end. May exceed a budget: `FocusAllocator.extend` keeps it."""
        if count < 0:
            raise UserError(f"cannot append {count} tokens; a history only grows.")
        new = np.arange(self.tokens, self.tokens + count, dtype=np.int64)
        lod = np.concatenate([self.lod, np.zeros(count, np.int64)])
        return WorkingContext(lod, np.concatenate([self.index, new]), self.block_size)

    @classmethod
    def from_entries(cls, entries: Iterable[tuple[int, int]], block_size: int) -> WorkingContext:
        """From [(lod, index), ...]. Raises InvariantError when they do not tile a history."""
        check_block_size(block_size)
        table = np.array(list(entries), dtype=np.int64).reshape(-1, 2)
        context = cls(table[:, 0].copy(), table[:, 1].copy(), block_size)
        context.check()
        return context

    @classmethod
    def all_raw(cls, tokens: int, block_size: int) -> WorkingContext:
        """Every token by itself: the vanilla context."""
        check_block_size(block_size)
        return cls(np.zeros(tokens, np.int64), np.arange(tokens, dtype=np.int64), block_size)

    @classmethod
    def initial(
        cls, tokens: int, block_size: int, budget: int, tail: int, max_lod: int | None = None
    ) -> WorkingContext:
        """The coarsest tiling of a history: roots, ever finer nodes for what does not fill a root, then the raw tail.

        `budget` in entries, `tail` in tokens, `max_lod` None for as many levels as the history fills. A history that
        fits the budget stays raw. Raises UserError, naming the smallest budget, when even the coarsest does not fit.
        """
        _check_sizes(tokens, block_size, budget, tail)
        if tokens <= budget:
            return cls.all_raw(tokens, block_size)
        bounds = _coarsest_bounds(tokens, block_size, tail, max_lod)
        check_budget_fits(_cost(bounds, tokens, block_size), tokens, budget, tail)
        return _from_bounds(bounds, tokens, block_size)

    @classmethod
    def by_age(cls, tokens: int, block_size: int, budget: int, tail: int, max_lod: int | None = None) -> WorkingContext:
        """The finest pyramid by age within the budget: equal shares of entries per level, the newest tokens raw.

        The static baseline of a learned focus, and the context of a checkpoint without one. Raises as `initial` does.
        """
        _check_sizes(tokens, block_size, budget, tail)
        if tokens <= budget:
            return cls.all_raw(tokens, block_size)
        low = _coarsest_bounds(tokens, block_size, tail, max_lod)
        check_budget_fits(_cost(low, tokens, block_size), tokens, budget, tail)
        fit, too_big = 0, budget + 1  # entries of each level below the roots; the largest that still fits
        best = low
        while too_big - fit > 1:
            share = (fit + too_big) // 2
            bounds = _pyramid_bounds(tokens, block_size, tail, share, low)
            if _cost(bounds, tokens, block_size) <= budget:
                fit, best = share, bounds
            else:
                too_big = share
        return _from_bounds(_filled(best, budget, tokens, block_size), tokens, block_size)


def smallest_budget(tokens: int, block_size: int, tail: int, max_lod: int | None = None) -> int:
    """Entries of the coarsest tiling of a history with a raw tail."""
    return _cost(_coarsest_bounds(tokens, block_size, tail, max_lod), tokens, block_size)


def check_budget_fits(cost: int, tokens: int, budget: int, tail: int) -> None:
    """Raise UserError when the coarsest tiling, `cost` entries, is over the budget."""
    if cost > budget:
        raise UserError(
            f"a budget of {budget} entries cannot hold a history of {tokens} tokens: the raw tail of {tail} and the "
            f"coarsest nodes before it take {cost}. Raise the budget to {cost}, shorten the tail, or allow more levels."
        )


# A pyramid is its bounds [b_1, b_2, …], ascending in age: tokens [b_1, T) are raw, [b_2, b_1) are level 1, and so on;
# level l ends at b_l, a multiple of r^l, and starts at b_(l+1), a multiple of r^(l+1).


def _coarsest_bounds(tokens: int, block_size: int, tail: int, max_lod: int | None) -> list[int]:
    old = max(0, tokens - tail)
    return [old // block_size**level * block_size**level for level in range(1, levels_of(old, block_size, max_lod) + 1)]


def _pyramid_bounds(tokens: int, block_size: int, tail: int, share: int, coarsest: Sequence[int]) -> list[int]:
    """At most about `share` entries of each level below the top, and no coarser than the coarsest tiling."""
    bounds: list[int] = []
    end = tokens
    for level, limit in enumerate(coarsest, 1):
        span = block_size**level
        wanted = -(-max(0, end - max(share, 0) * span // block_size) // span) * span
        end = min(wanted, limit, end // span * span)
        bounds.append(end)
    return bounds


def _filled(bounds: Sequence[int], budget: int, tokens: int, block_size: int) -> list[int]:
    """Spend what rounding left over: expand the newest nodes of each level, finest first, until nothing fits."""
    filled, before = list(bounds), [-1]
    while filled != before:
        before = list(filled)
        for level in range(len(filled)):
            expansions = (budget - _cost(filled, tokens, block_size)) // (block_size - 1)
            end = filled[level + 1] if level + 1 < len(filled) else 0
            filled[level] = max(filled[level] - expansions * block_size ** (level + 1), end)
    return filled


def _cost(bounds: Sequence[int], tokens: int, block_size: int) -> int:
    ends, begins = [tokens, *bounds], [*bounds, 0]
    return sum((end - begin) // block_size**level for level, (end, begin) in enumerate(zip(ends, begins, strict=True)))


def _from_bounds(bounds: Sequence[int], tokens: int, block_size: int) -> WorkingContext:
    ends, begins = [tokens, *bounds], [*bounds, 0]
    lods, indices = [], []
    for level in reversed(range(len(ends))):
        span = block_size**level
        index = np.arange(begins[level] // span, ends[level] // span, dtype=np.int64)
        lods.append(np.full(len(index), level, np.int64))
        indices.append(index)
    return WorkingContext(np.concatenate(lods), np.concatenate(indices), block_size)


def _check_sizes(tokens: int, block_size: int, budget: int, tail: int) -> None:
    check_block_size(block_size)
    if tail < 0 or tokens < 0 or budget < 1:
        raise UserError(f"tokens {tokens} and tail {tail} must be at least 0, budget {budget} at least 1.")
    if tokens > MAX_TOKENS:
        raise UserError(f"a history of {tokens} tokens is beyond {MAX_TOKENS}, the last at which positions are exact.")
    if tail >= budget:
        raise UserError(
            f"a raw tail of {tail} tokens leaves no room in a budget of {budget} entries; raise the budget or shorten the tail."
        )
