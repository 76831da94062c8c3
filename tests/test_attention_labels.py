"""What LensNet is taught from attention: the masses against loops over what the model itself attends with; its scores."""

from __future__ import annotations

import math

import pytest
import torch

from megacontext.config import GPTConfig
from megacontext.model.gpt import GPT
from megacontext.train.attention_labels import block_attention, relative_scores

TOKENS, NEWEST, BLOCK = 40, 6, 8


def new_model(kv_heads: int) -> GPT:
    model = GPT(GPTConfig(sequence_len=TOKENS, vocab_size=50, n_layer=3, n_head=4, n_kv_head=kv_heads, n_embd=32))
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_block_attention_is_what_the_newest_tokens_of_a_forward_pass_attend_to(kv_heads: int) -> None:
    model = new_model(kv_heads)
    ids = torch.randint(0, 50, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []  # inputs of every layer's attention in an ordinary forward pass
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    model(ids)
    blocks = (TOKENS - NEWEST) // BLOCK
    expected = torch.zeros(2, blocks)
    for block, x in zip(model.blocks, seen, strict=True):
        q, k, _ = block.attn.project(x, model.rotary_table.slice(0, TOKENS, x.device))
        for row in range(2):
            for head in range(4):
                for token in range(TOKENS - NEWEST, TOKENS):
                    keys = k[row, head * kv_heads // 4, : token + 1]
                    weights = (keys @ q[row, head, token] / math.sqrt(8)).softmax(0)
                    for number in range(blocks):
                        first = max(1, number * BLOCK)  # the first token of a row does not count
                        expected[row, number] += weights[first : (number + 1) * BLOCK].sum() / (3 * 4 * NEWEST)
    layer_inputs: list[torch.Tensor] = []
    model.trunk(model.embed(ids), model.rotary_table.slice(0, TOKENS, ids.device), layer_inputs=layer_inputs)
    found = block_attention(model, layer_inputs, torch.arange(2), NEWEST, blocks, BLOCK)
    assert torch.allclose(found, expected.detach(), atol=1e-6)
    second = block_attention(model, layer_inputs, torch.tensor([1]), NEWEST, blocks, BLOCK)
    assert torch.allclose(second, found[1:], atol=1e-6)
    assert not found.requires_grad


def test_relative_scores_order_blocks_and_split_a_row_whatever_its_scale() -> None:
    attention = torch.tensor([[0.4, 0.1, 0.05, 0.2, 0.01]])
    scores = relative_scores(attention)
    assert torch.equal(scores.argsort(), attention.argsort())
    assert torch.allclose(scores, relative_scores(attention / 1000), atol=1e-5)
    assert torch.atanh(scores).mean().abs() < 1e-5
    assert torch.allclose(torch.atanh(scores).square().mean(), torch.tensor(0.25), atol=1e-4)


def test_relative_scores_of_blocks_that_are_attended_to_alike_say_nothing() -> None:
    assert torch.allclose(relative_scores(torch.full((2, 7), 0.01)), torch.zeros(2, 7), atol=1e-3)
    assert torch.isfinite(relative_scores(torch.zeros(1, 4))).all()
