"""The GPT against a plain forward pass, its cache against recomputation, its init and its dtypes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megacontext.config import GPTConfig
from megacontext.errors import UserError
from megacontext.model.gpt import GPT
from megacontext.model.kv_cache import KVCache
from megacontext.model.norm import rms_norm

SHAPES = [
    dict(sequence_len=16, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=128),  # heads of 64
    dict(sequence_len=8, vocab_size=61, n_layer=1, n_head=2, n_kv_head=1, n_embd=256),  # heads of 128, grouped
    dict(sequence_len=32, vocab_size=33, n_layer=3, n_head=6, n_kv_head=2, n_embd=48),  # heads of 8, grouped
]


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(2, 0, 2), (4, 0, 2), (4, 128, 2), (4, 192, 3), (4, 512, 4), (12, 0, 6), (20, 0, 10)]
)
def test_shape_by_depth(depth: int, width: int, heads: int) -> None:
    config = GPTConfig.from_depth(depth, vocab_size=99, sequence_len=64, width=width)
    assert (config.n_embd, config.n_head) == (width or 64 * depth, heads)


def make(config: dict[str, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A model whose weights are all random: a fresh one has zero projections, and would hide mistakes."""
    model = GPT(GPTConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))
    model.compute_dtype = dtype
    return model


def ids_for(model: GPT, batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


WEIGHTS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def plain_logits(state: dict[str, torch.Tensor], c: GPTConfig, row: list[int]) -> torch.Tensor:
    """The oracle: SPEC §8 written out for one row of ids, head by head, without any of the model's code."""
    half = c.head_dim // 2
    angles = torch.arange(len(row)).float()[:, None] / 10_000 ** (torch.arange(half).float() * 2 / c.head_dim)
    cos, sin = angles.cos().bfloat16().float(), angles.sin().bfloat16().float()

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * cos + b * sin, -a * sin + b * cos], 1)

    future = torch.ones(len(row), len(row)).triu(1).bool()
    x = norm(state["transformer.wte.weight"][row])
    for i in range(c.n_layer):
        w = {name: state[f"transformer.h.{i}.{name}.weight"] for name in WEIGHTS}
        h, heads = norm(x), []
        for head in range(c.n_head):
            kv = head // (c.n_head // c.n_kv_head)
            rows_q, rows_kv = (slice(n * c.head_dim, (n + 1) * c.head_dim) for n in (head, kv))
            q, k = (h @ w["attn.c_q"][rows_q].T), (h @ w["attn.c_k"][rows_kv].T)
            q, k, v = norm(turn(q)), norm(turn(k)), h @ w["attn.c_v"][rows_kv].T
            scores = (q @ k.T / math.sqrt(c.head_dim)).masked_fill(future, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, 1) @ w["attn.c_proj"].T
        x = x + (norm(x) @ w["mlp.c_fc"].T).relu() ** 2 @ w["mlp.c_proj"].T
    return 15 * torch.tanh(norm(x) @ state["lm_head.weight"].T / 15)


@pytest.mark.parametrize("config", SHAPES)
def test_logits_and_gradients_equal_the_plain_forward(config: dict[str, int]) -> None:
    model = make(config)
    ids = ids_for(model, 2, 2 * config["sequence_len"] + 3)  # longer than the training length
    state = {name: p.detach().clone().requires_grad_() for name, p in model.state_dict().items()}
    oracle = torch.stack([plain_logits(state, model.config, row.tolist()) for row in ids])
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert (logits - oracle).abs().max() < 1e-4
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    expected = F.cross_entropy(oracle[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - expected) < 1e-5
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        wanted = state[name].grad
        assert (parameter.grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, name


def test_state_dict_holds_nanochats_keys_and_nothing_else() -> None:
    config = SHAPES[0]
    keys = {"transformer.wte.weight", "lm_head.weight"}
    for i in range(config["n_layer"]):
        keys |= {f"transformer.h.{i}.attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "c_proj")}
        keys |= {f"transformer.h.{i}.mlp.{name}.weight" for name in ("c_fc", "c_proj")}
    model = make(config)
    model(ids_for(model, 1, 40))
    assert set(model.state_dict()) == keys


def test_changing_a_token_changes_no_logit_before_it() -> None:
    model = make(SHAPES[2])
    ids = ids_for(model, 1, 20)
    other = ids.clone()
    other[0, 13] = (other[0, 13] + 1) % model.config.vocab_size
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :13], b[:, :13])
    assert not torch.equal(a[:, 13:], b[:, 13:])


def test_init_follows_the_rule_and_the_seed() -> None:
    config = GPTConfig(sequence_len=8, vocab_size=700, n_layer=2, n_head=2, n_kv_head=2, n_embd=128)
    first, second, other = GPT(config), GPT(config), GPT(config)
    first.init_weights(torch.Generator().manual_seed(5))
    torch.manual_seed(99)  # the global generator plays no part
    second.init_weights(torch.Generator().manual_seed(5))
    other.init_weights(torch.Generator().manual_seed(6))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.state_dict()[name])
        if name == "lm_head.weight" or name.endswith("c_proj.weight"):
            assert not parameter.any(), name
            continue
        assert not torch.equal(parameter, other.state_dict()[name])
        fan_out, fan_in = parameter.shape
        std = 1.0 if "wte" in name else min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name
    ids = torch.arange(8)[None]
    assert first.loss(ids, ids).item() == pytest.approx(math.log(700), abs=1e-5)


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 5, 7], [20], [3, 16, 1]])
def test_cached_decode_equals_full_recompute(config: dict[str, int], chunks: list[int]) -> None:
    model = make(config)
    ids = ids_for(model, 2, 20)
    full = model(ids)
    cache = model.make_cache(batch=2, capacity=4)  # grows on the way
    start, parts = 0, []
    with torch.no_grad():
        for tokens in chunks:
            parts.append(model(ids[:, start : start + tokens], cache))
            start += tokens
    assert cache.length == 20
    assert (torch.cat(parts, 1) - full).abs().max() < 1e-5


def test_truncated_cache_continues_as_if_never_longer() -> None:
    model = make(SHAPES[2])
    ids, other = ids_for(model, 1, 12), ids_for(model, 1, 6, seed=2)
    cache = model.make_cache(1, 32)
    with torch.no_grad():
        model(ids, cache)
        cache.truncate(5)
        continued = model(other, cache)
        full = model(torch.cat([ids[:, :5], other], 1))[:, 5:]
    assert (continued - full).abs().max() < 1e-5
    with pytest.raises(UserError, match="11 positions to 12"):
        cache.truncate(12)


def test_expanded_cache_serves_each_row() -> None:
    model = make(SHAPES[1])
    prompt, tails = ids_for(model, 1, 6), ids_for(model, 3, 4, seed=3)
    cache = model.make_cache(1, 6)
    with torch.no_grad():
        model(prompt, cache)
        rows = cache.expand(3)
        continued = model(tails, rows)
        full = model(torch.cat([prompt.expand(3, -1), tails], 1))[:, 6:]
    assert (continued - full).abs().max() < 1e-5
    assert cache.length == 6
    with pytest.raises(UserError, match="has 3"):
        rows.expand(2)


def test_cache_says_what_is_wrong() -> None:
    cache = KVCache(batch=2, n_layer=1, n_kv_head=1, head_dim=4, capacity=2, dtype=torch.float32, max_capacity=3)
    entry = torch.zeros(2, 1, 4, 4)
    with pytest.raises(UserError, match="needs 4 positions and the KV cache may hold 3"):
        cache.insert(0, entry, entry)
    with pytest.raises(UserError, match="holds 2 rows, got 1"):
        cache.insert(0, entry[:1], entry[:1])
    cache.insert(0, entry[:, :, :3], entry[:, :, :3])
    assert cache.capacity == 3


def test_an_explicit_mask_replaces_causality() -> None:
    model = make(SHAPES[2])
    ids = ids_for(model, 2, 10)
    rotary = model.rotary_table.slice(0, 10, ids.device)
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    with torch.no_grad():
        x = model.embed(ids)
        assert (model.trunk(x, rotary, mask=causal) - model.trunk(x, rotary)).abs().max() < 1e-5
        blind = causal.clone()
        blind[5:, 2] = False
        assert not torch.allclose(model.trunk(x, rotary, mask=blind), model.trunk(x, rotary))


def test_bf16_compute_keeps_fp32_masters_and_gradients_and_is_close() -> None:
    model = make(SHAPES[0])
    ids = ids_for(model, 4, 17)
    exact = model.loss(ids[:, :-1], ids[:, 1:])
    exact.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.compute_dtype = torch.bfloat16
    assert model(ids).dtype == torch.float32
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 0.02
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        cosine = F.cosine_similarity(parameter.grad.flatten(), wanted[name].flatten(), dim=0)
        assert cosine > 0.99, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_inference_changes_no_result_and_keeps_the_state_dict(dtype: torch.dtype) -> None:
    model = make(SHAPES[2], dtype=dtype)
    ids = ids_for(model, 2, 9)
    with torch.no_grad():
        before, shapes = model(ids), {name: value.shape for name, value in model.state_dict().items()}
        model.prepare_inference()
        model.prepare_inference()
        assert (model(ids) - before).abs().max() < 1e-6
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert {value.dtype for name, value in model.state_dict().items() if "wte" not in name} == {dtype}


def test_weights_of_the_fused_projection_stay_the_parameters() -> None:
    model = make(SHAPES[0])
    model.prepare_inference()
    ids = ids_for(model, 1, 5)
    with torch.no_grad():
        before = model(ids)
        model.load_state_dict(make(SHAPES[0], seed=9).state_dict())
        assert not torch.allclose(model(ids), before)
        assert (model(ids) - make(SHAPES[0], seed=9)(ids)).abs().max() < 1e-6


def test_rms_norm_gradient_is_exact() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x,))
    assert torch.allclose(rms_norm(x), F.rms_norm(x, (8,), eps=torch.finfo(torch.float32).eps))
    assert torch.equal(rms_norm(torch.zeros(2, 4)), torch.zeros(2, 4))
