"""What single edits of a working context are worth, measured: many contexts of one tree in few forward passes.

V contexts, L entries, H tokens that follow the history, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megacontext.context.edits import Edits, apply, collapse_node
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.eval.methods import expand_blocks
from megacontext.inference.focus import entry_inputs
from megacontext.model.cross_entropy import linear_cross_entropy
from megacontext.model.gpt import GPT, SOFTCAP

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
_BATCH_ENTRIES = 1 << 14  # entries of a forward pass: bounds memory
_INDEX_BITS = 56  # nodes lie below 2^52 tokens


@dataclass(frozen=True)
class Utilities:
    """Of M things to expand: `item` int64 [M], and the nats per token that expanding each alone gains, float64 [M].

    `tail`: on the raw tail, which the lens sees. `ahead`: on what follows, which it does not.
    """

    item: I64
    tail: F64
    ahead: F64


def entry_utilities(model: GPT, tree: Tree, context: WorkingContext, following: I64, tail: int) -> Utilities:
    """Utility of each gist of a context; `item` are numbers of entries. `following` [H] are the ids that come next."""
    gists = np.flatnonzero(context.lod > 0)
    edits = [apply(context, Edits(expand=np.array([at], np.int64)), tail) for at in gists.tolist()]
    return _utilities(model, tree, [context, *edits], gists, following, tail)


def block_utilities(
    model: GPT, tree: Tree, context: WorkingContext, blocks: I64, following: I64, tail: int, budget: int
) -> Utilities:
    """Utility of showing each block raw, whatever nodes stand above it; `item` are the blocks that the budget allows."""
    edits = {int(block): expand_blocks(context, [int(block)], budget) for block in blocks}
    fitting = {block: edit for block, edit in edits.items() if len(edit) > len(context)}
    item = np.array(list(fitting), np.int64)
    return _utilities(model, tree, [context, *fitting.values()], item, following, tail)


@torch.no_grad()
def substitution_kl(model: GPT, tree: Tree, nodes: Sequence[tuple[int, int]], following: I64) -> F64:
    """KL(raw ‖ one node shown as its gist) [nodes] in nats per token, over the tokens that follow an all-raw history.

    How well a gist stands in for what it covers. Raises UserError for a node that the history does not hold whole.
    """
    raw = WorkingContext.all_raw(tree.tokens, tree.block_size)
    variants = [raw]
    for lod, index in nodes:
        context = raw
        for level in range(1, lod + 1):
            inside = tree.block_size ** (lod - level)
            for node in range(index * inside, (index + 1) * inside):
                context = apply(context, collapse_node(context, level, node))
        variants.append(context)
    found, reference = [], None
    for hidden in _hidden(model, tree, variants, following, 1):
        for row in hidden:
            log = model.head(row).double().log_softmax(-1)
            reference = log if reference is None else reference
            found.append(float((reference.exp() * (reference - log)).sum(-1).mean()))
    return np.array(found[1:])


@torch.no_grad()
def tiling_losses(model: GPT, tree: Tree, contexts: Sequence[WorkingContext], following: I64, tail: int) -> F64:
    """Losses [V, tail - 1 + H] in nats: of the tail but its first token, then of the ids `following` [H].

    All contexts show the whole tree and are raw in its last `tail` tokens.
    """
    targets = torch.cat([tree.ids(tree.tokens - tail + 1, tree.tokens), torch.from_numpy(following)]).to(model.device)
    out = []
    for hidden in _hidden(model, tree, contexts, following, tail):
        losses = linear_cross_entropy(
            hidden.flatten(0, 1), model.lm_head.weight, targets.repeat(len(hidden)), cap=SOFTCAP, reduction="none"
        )
        out.append(losses.view(len(hidden), -1).double().cpu().numpy())
    return np.concatenate(out)


def _utilities(
    model: GPT, tree: Tree, contexts: Sequence[WorkingContext], item: I64, following: I64, tail: int
) -> Utilities:
    losses = tiling_losses(model, tree, contexts, following, tail)
    gain = losses[0] - losses[1:]
    ahead = gain[:, tail - 1 :].mean(1) if len(following) else np.full(len(item), math.nan)
    seen = gain[:, : tail - 1].mean(1) if tail > 1 else np.full(len(item), math.nan)
    return Utilities(item, seen, ahead)


def _hidden(
    model: GPT, tree: Tree, contexts: Sequence[WorkingContext], following: I64, tail: int
) -> Iterator[torch.Tensor]:
    """Batches [v, tail - 1 + H, D] of the states that predict the tail but its first token, and what follows.

    Nodes that contexts share are embedded once. Shorter contexts are padded at the end, where no entry looks.
    """
    total, new = tree.tokens, len(following)
    keys = [(context.lod << _INDEX_BITS) | context.index for context in contexts]
    nodes = np.unique(np.concatenate(keys))
    table = WorkingContext(nodes >> _INDEX_BITS, nodes & ((1 << _INDEX_BITS) - 1), tree.block_size)
    known, _ = entry_inputs(model, tree, table)  # tokens by position, then gists level by level
    ids = torch.cat([tree.ids(total - 1, total), torch.from_numpy(following)])[None].to(model.device)
    x = torch.cat([known[0], model.embed(ids[:, 1:], ids[:, :-1])[0]])
    positions = np.concatenate([table.positions, total + np.arange(new)])
    sigmas = np.concatenate([table.sigmas, np.zeros(new)])
    end = torch.tensor([total], device=model.device)
    wanted = tail - 1 + new
    step = max(1, _BATCH_ENTRIES // (max(map(len, keys)) + new))
    for start in range(0, len(keys), step):
        batch = keys[start : start + step]
        length = np.array([len(key) for key in batch]) + new
        rows = np.zeros((len(batch), int(length.max())), np.int64)
        for at, key in enumerate(batch):
            rows[at, : len(key)] = np.searchsorted(nodes, key)
            rows[at, len(key) : length[at]] = len(nodes) + np.arange(new)
        slots = torch.arange(rows.shape[1], device=model.device).expand(len(batch), -1)
        places = [torch.from_numpy(values[rows]).to(model.device) for values in (positions, sigmas)]
        rotary = model.entry_rotary(places[0], places[1], slots, end.expand(len(batch)))
        hidden = model.trunk(x[torch.from_numpy(rows).to(model.device)], rotary)
        columns = torch.from_numpy(length[:, None] - 1 - wanted + np.arange(wanted)).to(model.device)
        yield hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
