"""What LensNet is taught about text: which old blocks the newest tokens attend to when all of the row is raw.

As the index of sparse attention is taught from full attention (DeepSeek-V3.2, 2025): a label for every block of every
row, where comparing working contexts gives one noisy number a row.

Shapes: B rows of a batch, R of them, T tokens, D width, H heads, Q newest tokens, n blocks before the tail, r block size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megacontext.model.gpt import GPT
from megacontext.model.norm import rms_norm

SINK_TOKENS = 32  # of a row: attention rests on them whatever they say (StreamingLLM, arXiv:2309.17453)


@torch.no_grad()
def block_attention(
    model: GPT, layer_inputs: Sequence[Tensor], rows: Tensor, newest: int, blocks: int, block_size: int
) -> Tensor:
    """Attention [R, n] of the last Q tokens of `rows` [R] to each of the first n blocks: mean over tokens, heads, layers.

    layer_inputs: what every layer got [B, T, D] when the batch was read raw (`GPT.trunk`). A row's first token does not
    count: heads that look for nothing look there. What else of that falls on a row's first blocks is left out of the
    lesson: `first_labelled`.
    """
    tokens, device = layer_inputs[0].shape[1], layer_inputs[0].device
    rotary = model.rotary_table.slice(0, tokens, device)
    later = torch.ones(newest, tokens, dtype=torch.bool, device=device).triu(tokens - newest + 1)
    total = torch.zeros(len(rows), blocks, device=device)
    for block, x in zip(model.blocks, layer_inputs, strict=True):
        q, k, _ = block.attn.project(rms_norm(x[rows]), rotary)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = q[:, :, tokens - newest :] @ k.transpose(2, 3) / q.shape[3] ** 0.5
        weights = logits.float().masked_fill(later, -torch.inf).softmax(3)
        weights[..., 0] = 0.0
        old = weights[..., : blocks * block_size].mean((1, 2))
        total += old.view(len(rows), blocks, block_size).sum(2)
    return total / len(model.blocks)


def first_labelled(blocks: int, block_size: int) -> int:
    """The first of a row's n blocks whose attention says something about its text; at least three quarters do."""
    return min(-(-SINK_TOKENS // block_size), blocks // 4)


def relative_scores(attention: Tensor) -> Tensor:
    """Scores [B, n] in (-1, 1) to teach, of attention [B, n]: by how many spreads a block's logarithm is above the row's
    mean, squashed. So half of a row deserves detail and half does not, whatever the length of the history; and the few
    blocks next to the query, three spreads above the rest, still differ from each other."""
    logs = attention.clamp(min=1e-9).log()
    centred = logs - logs.mean(1, keepdim=True)
    return torch.tanh(0.5 * centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-3))
