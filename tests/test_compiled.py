"""Training under torch.compile: one graph for the rows, one for variants of any length, and what the model computes without.

Traced as for a real compile, forward and backward, but run by a backend that needs no C++ compiler. A graph that would
break into several raises.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.stream import Batch
from megacontext.model.gpt import GPT
from megacontext.train.lens_loss import RunningScales
from megacontext.train.memory_objective import MemoryObjective
from megacontext.train.setup import any_length_trunk
from megacontext.train.throughput import Stopwatch

CPU = torch.device("cpu")


def trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))


def same(ours: list[torch.Tensor | None], theirs: list[torch.Tensor | None]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).norm() <= 1e-4 * one.norm()


def test_compiled_twin_trains_as_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    trace(monkeypatch)
    results = []
    for compile_it in (False, True):
        model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32))
        model.init_weights(torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
        forward = model.compiled() if compile_it else model
        ids = torch.arange(34).view(2, 17)
        loss = forward.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    (loss, grads), (twin_loss, twin_grads) = results
    assert abs(loss - twin_loss) < 1e-5
    same(grads, twin_grads)


def test_a_step_with_a_memory_compiles_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    trace(monkeypatch)
    results = []
    batch = Batch(torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 65))), None, np.arange(2), np.arange(2))
    for compile_it in (False, True):
        model = GPT(GPTConfig(sequence_len=64, vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32))
        model.attach_memory(MemoryConfig(mc=1, block_size=4, routing_slots=2, routing_width=8, allocator_recent_tokens=12,
                                         mc_num_random_variants=2, positional_type="gaussian_alibi"))  # fmt: skip
        model.init_weights(torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
        forward, views = (model.compiled(), any_length_trunk(model)) if compile_it else (model, None)
        objective = MemoryObjective(forward, 5, 2, 1, lambda step: step / 4, RunningScales(), views)
        losses, graphs = [], []
        for step in range(3):  # a shorter length each
            objective.begin(step)
            loss = objective.loss(batch, CPU, 0.01, Stopwatch(CPU))
            loss.backward()
            losses.append(loss.item())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[1:] == graphs[:1] * 2
        results.append((losses, [parameter.grad for parameter in model.parameters()]))
    (losses, grads), (twin_losses, twin_grads) = results
    assert losses == pytest.approx(twin_losses, rel=1e-5)
    same(grads, twin_grads)
