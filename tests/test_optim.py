"""Muon against a float64 oracle, AdamW against torch's, two workers against one, state by name."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from megacontext.config import GPTConfig, TrainConfig
from megacontext.errors import CheckpointError
from megacontext.model.gpt import GPT
from megacontext.train.muon import Muon, orthogonalize
from megacontext.train.optim import Optimizer, ParamGroup, build_optimizer, gpt_groups
from megacontext.train.schedule import lr_multiplier, muon_momentum

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
STEPS, ROWS = 20, 4


def new_model(seed: int = 0) -> GPT:
    model = GPT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(CONFIG.vocab_size, (ROWS, 17), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:].clone()


def train(model: GPT, optimizer: Optimizer, steps: range, rank: int = 0, world: int = 1) -> list[float]:
    """Losses of the whole batch; each of `world` workers takes its share of the rows, in two micro-batches."""
    losses = []
    for step in steps:
        x, y = (part[rank::world] for part in batch(step))
        total = torch.zeros(())
        for micro in range(2):
            loss = model.loss(x[micro::2], y[micro::2]) / 2
            loss.backward()
            total += loss.detach()
        optimizer.reduce(world)
        if world > 1:
            dist.all_reduce(total)
        optimizer.clip(1.0)
        optimizer.step(lr_multiplier(step, STEPS), muon_momentum(step))
        optimizer.zero_grad()
        losses.append(total.item() / world)
    return losses


def slow_muon(p: torch.Tensor, grads: list[torch.Tensor], lr: float, momenta: list[float]) -> torch.Tensor:
    """The oracle: the update rule in float64, one matrix, by its singular values where Newton–Schulz is a polynomial."""
    p, buffer = p.double(), torch.zeros_like(p, dtype=torch.float64)
    for grad, momentum in zip(grads, momenta, strict=True):
        buffer = momentum * buffer + (1 - momentum) * grad.double()
        ahead = (1 - momentum) * grad.double() + momentum * buffer
        u, s, vt = torch.linalg.svd(ahead / (ahead.pow(2).sum().sqrt() + 1e-7), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        p = p - lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * (u @ torch.diag(s) @ vt)
    return p


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_muon_equals_the_float64_oracle(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    shapes = {"wide": (8, 24), "tall": (24, 8), "square": (16, 16), "tall2": (24, 8), "row": (1, 8)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    muon = Muon(parameters, lr=0.1, dtype=dtype)
    momenta = [muon_momentum(100 * step) for step in range(4)]
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for momentum in momenta:
        for name, p in parameters.items():
            p.grad = torch.randn(p.shape)
            grads[name].append(p.grad.clone())
        muon.step(0.5, momentum)
    for name, p in parameters.items():
        moved, wanted = (
            p.detach() - start[name],
            slow_muon(start[name], grads[name], 0.05, momenta) - start[name].double(),
        )
        assert (moved - wanted).norm() <= tolerance * wanted.norm(), name


def test_orthogonalize_gives_nearly_orthogonal_rows_and_survives_zero() -> None:
    torch.manual_seed(1)
    stack = torch.randn(5, 12, 30)
    result = orthogonalize(stack, torch.float32)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.4
    assert values.max() < 1.3
    assert not orthogonalize(torch.zeros(2, 3, 4), torch.float32).any()
    assert torch.allclose(orthogonalize(stack.mT, torch.float32), result.mT, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs_and_rates_follow_the_width(weight_decay: float) -> None:
    model, twin = new_model(), new_model()
    optimizer = build_optimizer(model, TrainConfig(weight_decay=weight_decay))
    scale = (32 / 768) ** -0.5
    reference = torch.optim.AdamW(
        [
            dict(params=[twin.lm_head.weight], lr=0.004 * scale),
            dict(params=[twin.transformer["wte"].weight], lr=0.2 * scale),
        ],
        betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay, foreach=False, fused=False,
    )  # fmt: skip
    peaks = [group["lr"] for group in reference.param_groups]
    for step in range(5):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(step))
            theirs.grad = ours.grad.clone()
        optimizer.step(0.3, 0.9)
        for group, peak in zip(reference.param_groups, peaks, strict=True):
            group["lr"] = 0.3 * peak
        reference.step()
    for name in ("lm_head.weight", "transformer.wte.weight"):
        ours, theirs = model.state_dict()[name], twin.state_dict()[name]
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_clip_scales_the_joint_norm_and_inf_only_measures() -> None:
    model = new_model()
    optimizer = build_optimizer(model, TrainConfig())
    model.loss(*batch(0)).backward()
    optimizer.reduce(1)
    expected = torch.sqrt(sum(p.grad.double().pow(2).sum() for p in model.parameters())).item()
    before = model.lm_head.weight.grad.clone()
    assert optimizer.clip(math.inf).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(model.lm_head.weight.grad, before)
    assert optimizer.clip(expected / 4).item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(model.lm_head.weight.grad, before / 4, rtol=1e-4)
    assert optimizer.clip(1e9).item() == pytest.approx(expected / 4, rel=1e-4)
    assert torch.allclose(model.lm_head.weight.grad, before / 4, rtol=1e-4)


def test_training_learns() -> None:
    model = new_model()
    optimizer = build_optimizer(model, TrainConfig())
    ids = torch.randint(CONFIG.vocab_size, (4, 17), generator=torch.Generator().manual_seed(3))
    losses = []
    for step in range(30):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.reduce(1)
        optimizer.clip(1.0)
        optimizer.step(1.0, muon_momentum(step))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(CONFIG.vocab_size), abs=1e-4)
    assert losses[-1] < 0.5


def test_state_restores_by_name_bit_for_bit() -> None:
    model = new_model()
    optimizer = build_optimizer(model, TrainConfig())
    train(model, optimizer, range(5))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = {
        name: {key: value.clone() for key, value in entry.items()} for name, entry in optimizer.state_dict().items()
    }
    assert set(saved) == set(weights)
    expected = train(model, optimizer, range(5, 12))
    again = new_model(seed=1)
    other = build_optimizer(again, TrainConfig())
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    assert train(again, other, range(5, 12)) == expected


def test_a_state_that_does_not_fit_is_refused_and_named() -> None:
    optimizer = build_optimizer(new_model(), TrainConfig())
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight/exp_avg is missing"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "lm_head.weight"})
    with pytest.raises(CheckpointError, match="gist/momentum is unknown"):
        optimizer.load_state_dict({**state, "gist": {"momentum": torch.zeros(2, 2)}})
    wrong = {**state, "transformer.h.0.attn.c_q.weight": {"momentum": torch.zeros(2, 2)}}
    with pytest.raises(CheckpointError, match=r"c_q\.weight/momentum has shape \[2, 2\], expected \[32, 32\]"):
        optimizer.load_state_dict(wrong)


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = new_model()
    model.gist = nn.Linear(4, 4, bias=False)
    with pytest.raises(AssertionError, match=r"missing \['gist.weight'\]"):
        build_optimizer(model, TrainConfig())
    extra = ParamGroup("adamw", {"gist.weight": model.gist.weight}, lr=1e-3)
    groups = [*gpt_groups(model, TrainConfig()), extra]
    optimizer = Optimizer(model, groups, torch.float32)
    with pytest.raises(AssertionError, match=r"in several \['gist.weight'\]"):
        Optimizer(model, [*groups, extra], torch.float32)
    before = model.gist.weight.detach().clone()
    model.loss(*batch(0)).backward()
    optimizer.reduce(1)  # the gist took no part: its gradient is zero
    optimizer.step(1.0, 0.9)
    assert torch.equal(model.gist.weight, before)
    model.gist.weight.grad += 1
    optimizer.step(1.0, 0.9)
    assert not torch.equal(model.gist.weight, before)


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = new_model()
    optimizer = build_optimizer(model, TrainConfig())
    losses = train(model, optimizer, range(STEPS // 2), rank, world)
    result = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({name: _copied(value) for name, value in result.items()}, os.path.join(folder, f"half{rank}.pt"))
    losses += train(model, optimizer, range(STEPS // 2, STEPS), rank, world)
    torch.save({"losses": losses, "model": model.state_dict()}, os.path.join(folder, f"end{rank}.pt"))
    dist.destroy_process_group()


def _copied(value):
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value.clone()


def test_two_workers_train_as_one_and_their_state_continues_on_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(2, str(tmp_path)), nprocs=2)
    ends = [torch.load(tmp_path / f"end{rank}.pt") for rank in range(2)]
    halves = [torch.load(tmp_path / f"half{rank}.pt") for rank in range(2)]
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
    for name, entry in halves[0]["optimizer"].items():
        for key, value in entry.items():
            assert torch.equal(value, halves[1]["optimizer"][name][key]), (name, key)
    model = new_model()
    alone = train(model, build_optimizer(model, TrainConfig()), range(STEPS))
    assert max(abs(a - b) for a, b in zip(alone, ends[0]["losses"], strict=True)) <= 1e-5
    assert alone[-1] != alone[0]
    resumed = new_model(seed=7)
    optimizer = build_optimizer(resumed, TrainConfig())
    resumed.load_state_dict(halves[0]["model"])
    optimizer.load_state_dict(halves[0]["optimizer"])
    continued = train(resumed, optimizer, range(STEPS // 2, STEPS))
    assert max(abs(a - b) for a, b in zip(continued, ends[0]["losses"][STEPS // 2 :], strict=True)) <= 1e-5
