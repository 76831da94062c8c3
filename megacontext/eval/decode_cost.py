"""What a decoded token costs with each method: choosing the entries, computing again what an edit invalidates, one row
a token, and the gists of the text that is added. Refocused once per continuation of H tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megacontext.context.edits import kept_prefix
from megacontext.eval.methods import History, Layout, Prompt, layout
from megacontext.inference.focus import entry_inputs
from megacontext.model.flops import decode_flops_per_token, forward_flops_per_token, tree_flops
from megacontext.model.gpt import GPT

I64 = npt.NDArray[np.int64]
ROLLING = ("window", "sinks", "full")  # drop tokens one at a time: a rolling cache keeps the rest
_NEEDS_TREE = ("mean_age", "gist_age", "random", "flat", "ours", "oracle")


@dataclass(frozen=True)
class DecodeCost:
    """Per decoded token: `ms` of all, of which `choose_ms` and `build_ms` (gists); `flops`; `recompute` entries that
    are computed again because something before them changed.
    """

    ms: float
    choose_ms: float
    build_ms: float
    flops: float
    recompute: float

    @classmethod
    def typical(cls, runs: Sequence[DecodeCost]) -> DecodeCost:
        """Medians."""
        values = np.median([[r.ms, r.choose_ms, r.build_ms, r.flops, r.recompute] for r in runs], 0).tolist()
        return cls(*values)

    def row(self) -> dict[str, float]:
        """The columns of the table."""
        return {
            "ms_per_token": self.ms,
            "choose_ms_per_token": self.choose_ms,
            "build_ms_per_token": self.build_ms,
            "flops_per_token": self.flops,
            "recompute": self.recompute,
        }


def decode_cost(
    model: GPT,
    method: str,
    ids: I64,
    following: I64,
    room: int,
    tail: int,
    block_size: int,
    oracle_blocks: I64 | None = None,
    seed: int = 0,
) -> DecodeCost:
    """Decode the tokens `following` [H] after a history `ids` [N] with a KV cache, as a session would.

    The cache holds what the refocus H tokens earlier left (untimed); then the refocus, the entries that it invalidates,
    and H steps are timed. Methods that drop tokens one at a time keep their cache. `full` is a window of `room` tokens.
    """
    horizon = len(following)
    name = "window" if method == "full" else method
    history = History(model, ids, block_size)
    evidence = () if oracle_blocks is None else tuple(int(block) * history.block_size for block in oracle_blocks)
    now = layout(name, Prompt(history, (), evidence, 0), room, tail, seed)
    kept = len(now)
    if method not in ROLLING:
        earlier = [token for token in evidence if token < len(ids) - horizon] or [0]
        before = layout(name, Prompt(History(model, ids[:-horizon], block_size), (), earlier, 0), room, tail, seed)
        kept = kept_prefix(before.context.append(horizon), now.context)
    recompute = len(now) - kept
    seconds = _decode_seconds(model, now, kept, following)
    uses_tree = method in _NEEDS_TREE
    build = history.build_seconds.get(now.gists, 0.0) / len(ids) if uses_tree else 0.0
    per_entry = forward_flops_per_token(model.config, len(now))
    flops = decode_flops_per_token(model.config, len(now)) + (now.flops + recompute * per_entry) / horizon
    if uses_tree and now.gists == "learned" and model.memory is not None:
        flops += tree_flops(model.config, model.memory.config, len(ids)) / len(ids)
    return DecodeCost(
        ms=1e3 * ((now.seconds + seconds) / horizon + build),
        choose_ms=1e3 * now.seconds / horizon,
        build_ms=1e3 * build,
        flops=flops,
        recompute=recompute / horizon,
    )


@torch.no_grad()
def _decode_seconds(model: GPT, shown: Layout, kept: int, following: I64) -> float:
    """Seconds to compute the entries from number `kept` on, and then one token after the other."""
    context, horizon = shown.context, len(following)
    entries, device = len(context), model.device
    cache = model.make_cache(1, entries + horizon, entries=True)
    x, rotary = entry_inputs(model, shown.tree, context)
    if kept:
        model.trunk(x[:, :kept], rotary.span(0, kept), cache)
    _wait(device)
    began = time.perf_counter()
    if kept < entries:
        model.trunk(x[:, kept:], rotary.span(kept, entries), cache)
    end = torch.tensor([context.tokens], device=device)
    newest = shown.tree.ids(context.tokens - 1, context.tokens)
    ids = torch.cat([newest, torch.from_numpy(following)])[None].to(device)
    for step in range(horizon):
        at = ids[:, step + 1 : step + 2]
        place = torch.full((1, 1), float(context.tokens + step), dtype=torch.float64, device=device)
        slot = torch.full((1, 1), entries + step, device=device)
        here = model.entry_rotary(place, torch.zeros_like(place), slot, end)
        model.head(model.trunk(model.embed(at, ids[:, step : step + 1]), here, cache)[:, -1]).argmax(-1)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
