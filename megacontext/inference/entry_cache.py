"""The KV cache of a working context: which of its entries are cached, what is computed for the next token, and at what cost.

`CachedEntries` keeps the books and computes nothing, so an engine with a cache of its own can use it. `EntryCache`
computes one session at a time; what it returns is the reference for every engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megacontext.context.edits import kept_prefix
from megacontext.context.working_context import WorkingContext
from megacontext.inference.focus import entry_inputs

if TYPE_CHECKING:
    from megacontext.context.tree import Tree
    from megacontext.model.gpt import GPT
    from megacontext.model.kv_cache import KVCache

_FIRST_CAPACITY = 256


@dataclass(frozen=True)
class NextInput:
    """What the next token needs: entries number `first` and later of `context`, behind the `first` entries in the cache.

    `end`: the token count that far positions are measured from (`entry_inputs`).
    """

    context: WorkingContext
    first: int
    end: int

    @property
    def entries(self) -> int:
        """Entries to compute: at least 1."""
        return len(self.context) - self.first


class CachedEntries:
    """Which entries of a session are in a KV cache. A cached entry depends on the entries before it alone, so the first
    entries that two contexts share serve both.

    `computed`: entries given to the GPT. `recomputed`: those among them that are not a raw token given for the first
    time: gists, and everything behind an edit.
    """

    def __init__(self, model: GPT, block_size: int) -> None:
        self._model, self._block_size = model, block_size
        self._seen = 0  # tokens below this index were given raw already, or were folded into gists
        self.computed = self.recomputed = 0
        self.forget()

    def __len__(self) -> int:
        return len(self._held)

    def forget(self) -> None:
        """The cache is gone: the next token needs every entry."""
        self._held, self._anchor = WorkingContext.all_raw(0, self._block_size), (0, 0)

    def next_input(self, context: WorkingContext, end: int) -> NextInput:
        """What a context of at least one entry needs for its next token. From now on only the entries before `first` count
        as cached.

        A new `end` costs every entry where positions depend on it: histories beyond the training length, positional
        types other than slot.
        """
        kept = kept_prefix(self._held, context) if self._anchor_of(context, end) == self._anchor else 0
        kept = min(kept, len(context) - 1)  # the hidden state of the last entry is not cached
        self._held = WorkingContext(context.lod[:kept], context.index[:kept], context.block_size)
        return NextInput(context, kept, end)

    def add(self, given: NextInput) -> None:
        """All entries of an input are in the cache now. Adding one input twice counts once."""
        context = given.context
        if self._held is context:
            return
        new = (context.lod[given.first :] == 0) & (context.index[given.first :] >= self._seen)
        self.computed += len(new)
        self.recomputed += len(new) - int(np.count_nonzero(new))
        self._held, self._anchor, self._seen = context, self._anchor_of(context, given.end), context.tokens

    def _anchor_of(self, context: WorkingContext, end: int) -> tuple[int, int]:
        """What the positions of all entries depend on, 0 where they do not: the `end`, and how many tokens gists hide."""
        memory = self._model.memory
        kind = "slot" if memory is None else memory.config.positional_type
        far = kind != "slot" and end > self._model.config.sequence_len
        return (end if far else 0, context.tokens - len(context) if kind == "gaussian_alibi" else 0)


class EntryCache:
    """Keys and values of at most `budget` entries of one session, made when they are first needed."""

    def __init__(self, model: GPT, tree: Tree, budget: int) -> None:
        self._model, self._tree, self._budget = model, tree, budget
        self._kv: KVCache | None = None

    def __len__(self) -> int:
        return 0 if self._kv is None else self._kv.length

    @torch.inference_mode()
    def logits(self, given: NextInput) -> torch.Tensor:
        """Logits [V] float32 of the token after the context of an input."""
        if self._kv is None:
            capacity = min(self._budget, _FIRST_CAPACITY)
            self._kv = self._model.make_cache(1, capacity, self._budget, entries=True)
        self._kv.truncate(given.first)
        x, rotary = entry_inputs(self._model, self._tree, given.context, given.first, given.end)
        hidden = self._model.trunk(x, rotary.to(self._model.compute_dtype), cache=self._kv)
        return self._model.head(hidden[0, -1])

    def release(self) -> None:
        """Give the memory of all keys and values back."""
        self._kv = None
