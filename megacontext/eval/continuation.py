"""How well a model predicts what follows a prompt that it is shown as entries: many layouts in one forward pass.

B layouts, L entries, H tokens of the continuation, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from megacontext.eval.methods import Layout
from megacontext.inference.focus import entry_inputs
from megacontext.model.flops import forward_flops_per_token
from megacontext.model.gpt import GPT
from megacontext.model.rotary import Rotary

BATCH_ENTRIES = 1 << 14  # entries of one forward pass: bounds memory
_LOGIT_ENTRIES = 1 << 25  # logits in memory at a time: 128 MiB


@dataclass(frozen=True)
class Scores:
    """`nll` float64 [B, H] in nats, `likeliest` bool [B, H]: whether greedy decoding would say the token.

    `seconds` of all forward passes; `flops` float64 [B] of each layout's own, its padding left out.
    """

    nll: npt.NDArray[np.float64]
    likeliest: npt.NDArray[np.bool_]
    seconds: float
    flops: npt.NDArray[np.float64]


@torch.no_grad()
def score_continuation(
    model: GPT, layouts: Sequence[Layout], continuation: npt.NDArray[np.integer], batch_entries: int = BATCH_ENTRIES
) -> Scores:
    """Score the tokens [B, H] that follow the prompts behind `layouts`, each given those before it, which are raw.

    The first is predicted by a layout's last entry. Entries of different layouts are padded on the right, where no
    entry looks.
    """
    ids = torch.from_numpy(np.ascontiguousarray(continuation, np.int64))
    order = np.argsort([-len(layout) for layout in layouts], kind="stable")  # batches of similar lengths
    nll, likeliest = np.zeros(ids.shape), np.zeros(ids.shape, bool)
    began, start = time.perf_counter(), 0
    while start < len(order):
        longest = len(layouts[order[start]]) + ids.shape[1]
        rows = order[start : start + max(1, batch_entries // longest)]
        losses, hits = _score(model, [layouts[row] for row in rows], ids[torch.from_numpy(rows)].to(model.device))
        nll[rows], likeliest[rows] = losses.cpu().numpy(), hits.cpu().numpy()
        start += len(rows)
    seconds = time.perf_counter() - began
    read = [len(layout) + ids.shape[1] - 1 for layout in layouts]
    return Scores(nll, likeliest, seconds, np.array([n * forward_flops_per_token(model.config, n) for n in read]))


def _score(model: GPT, layouts: Sequence[Layout], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL float64 and verdicts [B, H] of one batch."""
    rows = [_inputs(model, layout, row) for layout, row in zip(layouts, ids, strict=True)]
    longest = max(x.shape[0] for x, _ in rows)
    place = torch.arange(longest, device=ids.device)
    at = [place.clamp(max=x.shape[0] - 1) for x, _ in rows]  # padding repeats the last entry
    x = torch.stack([x[where] for (x, _), where in zip(rows, at, strict=True)])
    hidden = model.trunk(x, _padded([rotary for _, rotary in rows], at))
    first = torch.tensor([len(layout) - 1 for layout in layouts], device=ids.device)
    predicts = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
    flat = hidden[torch.arange(len(rows), device=ids.device)[:, None], predicts].flatten(0, 1)
    targets = ids.flatten()
    losses, hits = [], []
    step = max(1, _LOGIT_ENTRIES // model.config.vocab_size)
    for start in range(0, len(flat), step):
        logits, part = model.head(flat[start : start + step]), targets[start : start + step]
        losses.append(F.cross_entropy(logits, part, reduction="none"))
        hits.append(logits.argmax(-1) == part)
    return torch.cat(losses).double().view(ids.shape), torch.cat(hits).view(ids.shape)


def _padded(rotaries: Sequence[Rotary], at: Sequence[torch.Tensor]) -> Rotary:
    """One rotary of rows [1, L_b, …] whose entries `at` are taken of each."""
    chosen = [
        [part[0][where] for part in rotary if part is not None] for rotary, where in zip(rotaries, at, strict=True)
    ]
    return Rotary(*(torch.stack(parts) for parts in zip(*chosen, strict=True)))


def _inputs(model: GPT, layout: Layout, ids: torch.Tensor) -> tuple[torch.Tensor, Rotary]:
    """Inputs [L + H - 1, D] of a layout and of all but the last of the ids [H] that follow it, and their rotary."""
    context, device = layout.context, model.device
    x, rotary = entry_inputs(model, layout.tree, context)
    if len(ids) > 1:
        tokens, count = context.tokens, len(ids) - 1
        newest = layout.tree.ids(tokens - 1, tokens).to(device)
        previous = torch.cat([newest, ids[: count - 1]])
        slots = torch.arange(len(context), len(context) + count, device=device)[None]
        places = torch.arange(tokens, tokens + count, device=device, dtype=torch.float64)[None]
        end = torch.tensor([tokens], device=device)
        more = model.entry_rotary(places, torch.zeros_like(places), slots, end)
        x = torch.cat([x, model.embed(ids[None, :count], previous[None])], 1)
        rotary = rotary.then(more)
    return x[0], rotary
