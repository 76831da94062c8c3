"""The KV cache of a working context: what an edit left in place is kept, the rest is computed again and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from megacontext.context.edits import kept_prefix
from megacontext.context.working_context import WorkingContext
from megacontext.inference.focus import entry_inputs

if TYPE_CHECKING:
    from megacontext.context.tree import Tree
    from megacontext.model.gpt import GPT
    from megacontext.model.rotary import Rotary

_FIRST_CAPACITY = 256


class EntryCache:
    """Keys and values of at most `budget` entries. A cached entry depends on those before it alone, so the first entries
    that two contexts share are good for both.

    `computed` counts entries given to the model; `recomputed` those among them that are not a token given for the first
    time: gists, and what stood behind an edit.
    """

    def __init__(self, model: GPT, tree: Tree, budget: int) -> None:
        self._model, self._tree = model, tree
        self._kv = model.make_cache(1, min(budget, _FIRST_CAPACITY), budget, entries=True)
        self._held = WorkingContext.all_raw(0, tree.block_size)
        self._anchor = (0, 0)
        self._seen = 0  # tokens that were computed as themselves, or never will be
        self.computed = self.recomputed = 0

    @torch.inference_mode()
    def logits(self, context: WorkingContext, end: int) -> torch.Tensor:
        """Logits [V] float32 of the token after a context of at least one entry.

        `end` is the token count from which far positions are measured; a new one costs a full recompute where positions
        depend on it (histories beyond the training length, positional types other than slot).
        """
        anchor = self._anchor_of(context, end)
        kept = kept_prefix(self._held, context) if anchor == self._anchor else 0
        kept = min(kept, len(context) - 1)  # the last entry's hidden state is not cached
        self._kv.truncate(kept)
        self._held = WorkingContext(
            context.lod[:kept], context.index[:kept], context.block_size
        )  # if we are interrupted
        x, _ = entry_inputs(self._model, self._tree, context, kept)
        rotary = self._rotary(context, kept, end).to(self._model.compute_dtype)
        hidden = self._model.trunk(x, rotary, cache=self._kv)
        logits = self._model.head(hidden[0, -1])
        new = (context.lod[kept:] == 0) & (context.index[kept:] >= self._seen)
        self.computed += len(new)
        self.recomputed += len(new) - int(np.count_nonzero(new))
        self._held, self._anchor, self._seen = context, anchor, context.tokens
        return logits

    def _rotary(self, context: WorkingContext, start: int, end: int) -> Rotary:
        """Rotary of the entries from number `start` on, with far positions measured from `end`."""
        device = self._model.device
        positions, sigmas = (
            torch.from_numpy(array[start:].copy())[None].to(device) for array in (context.positions, context.sigmas)
        )
        slots = torch.arange(start, len(context), device=device)[None]
        return self._model.entry_rotary(positions, sigmas, slots, torch.tensor([end], device=device))

    def _anchor_of(self, context: WorkingContext, end: int) -> tuple[int, int]:
        """What the positions of all entries depend on, 0 where they do not: the `end`, and how many tokens gists hide."""
        memory = self._model.memory
        kind = "slot" if memory is None else memory.config.positional_type
        far = kind != "slot" and end > self._model.config.sequence_len
        return (end if far else 0, context.tokens - len(context) if kind == "gaussian_alibi" else 0)
