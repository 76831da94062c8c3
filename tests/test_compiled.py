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
from megacontext.train.recipe import any_length_trunk
from megacontext.train.throughput import Stopwatch

CPU = torch.device("cpu")


def trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))


def graphs() -> int:
    """Graphs traced since the last `trace`."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def fill(model: GPT) -> GPT:
    """The model with nothing zero in it, so that gradients flow through everything."""
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def same(ours: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None]) -> None:
    for name, one in ours.items():
        other = theirs[name]
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            assert (one - other).norm() <= 1e-4 * one.norm(), name
        if name.startswith("transformer.h"):
            assert one is not None, name
            assert one.any(), name


def grads(model: GPT) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_compiled_twin_trains_as_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    trace(monkeypatch)
    results = []
    for compile_it in (False, True):
        model = fill(GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)))
        forward = model.compiled() if compile_it else model
        ids = torch.arange(34).view(2, 17)
        loss = forward.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        assert graphs() == compile_it
        results.append((loss, grads(model)))
    (loss, ours), (twin_loss, theirs) = results
    assert abs(loss - twin_loss) < 1e-5
    same(ours, theirs)


def test_a_step_with_a_memory_compiles_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    trace(monkeypatch)
    results = []
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 65)))
    for compile_it in (False, True):
        model = GPT(GPTConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
        model.attach_memory(MemoryConfig(mc=1, block_size=4, routing_slots=2, routing_width=8, allocator_recent_tokens=12,
                                         mc_num_random_variants=2, positional_type="gaussian_alibi"))  # fmt: skip
        fill(model)
        forward, views = (model.compiled(), any_length_trunk(model)) if compile_it else (model, None)
        objective = MemoryObjective(forward, 5, 2, 1, lambda step: step / 4, RunningScales(), views)
        losses = []
        for step in range(3):  # a shorter length each
            objective.begin(step)
            batch = Batch(ids, np.arange(2) + 2 * step, np.arange(2))  # of that step
            loss = objective.loss(objective.plan(batch), 0.01, Stopwatch(CPU))
            loss.backward()
            losses.append(loss.item())
            assert graphs() == 2 * compile_it  # one of the rows, one of variants
        lengths = [objective.settings.length(objective.settings.entries(step / 4)) for step in range(3)]
        assert len(set(lengths)) == 3
        results.append((losses, grads(model)))
    (losses, ours), (twin_losses, theirs) = results
    assert losses == pytest.approx(twin_losses, rel=1e-5)
    same(ours, theirs)
