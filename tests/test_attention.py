"""Attention and rotary positions against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from megacontext.model.attention import attend, biased
from megacontext.model.rotary import Rotary, RotaryTable, rotate_and_norm


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Query i of Tq sees keys up to Tk − Tq + i, one head at a time."""
    groups, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = k.shape[2] - q.shape[2] + i + 1
                keys, values = k[b, h // groups, :seen], v[b, h // groups, :seen]
                out[b, h, i] = (keys @ q[b, h, i] / math.sqrt(q.shape[3])).softmax(0) @ values
    return out


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (1, 9), (4, 9), (1, 1)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
def test_attend_is_causal_with_the_last_query_at_the_last_key(
    queries: int, keys: int, heads: int, kv_heads: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, queries, 8, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, keys, 8, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(attend(q, k, v), plain_attention(q, k, v), atol=1e-9)


def test_rotation_pairs_halves_and_depends_on_distance_only() -> None:
    table = RotaryTable(8)
    cos, sin, _ = table.slice(0, 50, torch.device("cpu"))
    assert cos.dtype == torch.bfloat16
    assert cos.shape == (1, 50, 1, 4)
    x = torch.randn(1, 50, 2, 8)
    expected = torch.empty_like(x)
    for t in range(50):
        for c in range(4):
            angle = torch.tensor(t / 10_000 ** (2 * c / 8))
            co, si = angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
            expected[0, t, :, c] = x[0, t, :, c] * co + x[0, t, :, c + 4] * si
            expected[0, t, :, c + 4] = -x[0, t, :, c] * si + x[0, t, :, c + 4] * co
    expected = expected / expected.pow(2).mean(-1, keepdim=True).sqrt()
    assert torch.allclose(rotate_and_norm(x, Rotary(cos, sin)), expected, atol=1e-5)
    q = k = torch.randn(1, 1, 1, 8).expand(1, 50, 1, 8)
    turned_q, turned_k = rotate_and_norm(q, Rotary(cos, sin))[0, :, 0], rotate_and_norm(k, Rotary(cos, sin))[0, :, 0]
    assert torch.allclose(turned_q[12] @ turned_k[2], turned_q[40] @ turned_k[30], atol=0.1)  # tables are bfloat16


def test_rotation_gradient_is_exact() -> None:
    table = RotaryTable(6)
    cos, sin = (part.double() for part in table.slice(3, 4, torch.device("cpu"))[:2])
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate_and_norm(x, Rotary(cos, sin)), (x,))


def test_tables_grow_without_changing_what_was_there() -> None:
    table = RotaryTable(16)
    with torch.inference_mode():
        short = [part.clone() for part in table.slice(5, 10, torch.device("cpu"))[:2]]
    long = table.slice(0, 5000, torch.device("cpu"))
    for before, after in zip(short, long[:2], strict=True):
        assert torch.equal(before, after[:, 5:15])
    x = torch.randn(1, 5000, 1, 16, requires_grad=True)
    rotate_and_norm(x, long).sum().backward()  # a table from inference mode would refuse


def test_positions_may_differ_by_row() -> None:
    """Tables gathered per row, [B, T, 1, K/2], turn each row by its own positions."""
    cos, sin, _ = RotaryTable(8).slice(0, 40, torch.device("cpu"))
    positions = torch.tensor([[0, 1, 2], [30, 31, 39]])
    x = torch.randn(2, 3, 2, 8)
    both = rotate_and_norm(x, Rotary(cos[0][positions], sin[0][positions]))
    second = rotate_and_norm(x[1:], Rotary(cos[:, positions[1]], sin[:, positions[1]]))
    assert torch.equal(both[1:], second)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_a_bias_of_keys_is_a_term_of_the_logits(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, 5, 8, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, 7, 8, dtype=torch.float64) for _ in range(2))
    bias = -torch.rand(2, 7, dtype=torch.float64) * 9
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(heads):
            slope, kv = 2 ** (-8 * (h + 1) / heads), h * kv_heads // heads
            for i in range(5):
                seen = 7 - 5 + i + 1
                logits = k[b, kv, :seen] @ q[b, h, i] / math.sqrt(8) + slope * bias[b, :seen]
                expected[b, h, i] = logits.softmax(0) @ v[b, kv, :seen]
    found = attend(*biased(q, k, v, bias), scale=8**-0.5)
    assert torch.allclose(found[..., :8], expected, atol=1e-6)
