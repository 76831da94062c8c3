"""Costs against counting, and the table of peaks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.gist_function import build_levels
from megacontext.model.flops import (
    attention_label_flops,
    count_params,
    decode_flops_per_token,
    forward_flops_per_token,
    lens_flops,
    matmul_params,
    peak_flops,
    peak_flops_by_name,
    train_flops_per_token,
    tree_flops,
)
from megacontext.model.gpt import GPT
from megacontext.train.attention_labels import block_attention

CONFIG = GPTConfig(sequence_len=64, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)


def test_parameters_are_those_of_the_model() -> None:
    model = GPT(CONFIG)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert count_params(CONFIG) == total
    assert matmul_params(CONFIG) == total - model.transformer["wte"].weight.numel()


def test_training_flops_follow_nanochats_formula() -> None:
    expected = 6 * matmul_params(CONFIG) + 12 * CONFIG.n_layer * CONFIG.n_head * CONFIG.head_dim * 64
    assert train_flops_per_token(CONFIG) == expected
    assert train_flops_per_token(CONFIG, 128) > expected


def test_forward_flops_equal_those_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 64, dtype=torch.int64))
    attention = 2 * 64 * 4 * CONFIG.n_layer * CONFIG.n_embd * 64
    counted = counter.get_total_flops()
    if "scaled_dot" not in str(counter.get_flop_counts()):  # the CPU kernel is not in torch's table
        counted += attention
    assert counted == forward_flops_per_token(CONFIG) * 2 * 64


def counted(work: Callable[[], object]) -> int:
    """FLOPs that torch counts, in matrix products alone: the CPU's attention kernel is not in its table."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    assert "scaled_dot" not in str(counter.get_flop_counts())
    return counter.get_total_flops()


@pytest.mark.parametrize("pooling", ["mean", "query", "cls"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("kind", ["transformer", "mean"])
@pytest.mark.parametrize("slots", [0, 2])
def test_flops_of_a_memory_equal_those_torch_counts(pooling: str, head: str, kind: str, slots: int) -> None:
    memory = MemoryConfig(block_size=4, gistnet_type=kind, gistnet_pooling=pooling, gistnet_head=head, lensnet_head=head,
                          routing_slots=slots, routing_width=8)  # fmt: skip
    model = GPT(CONFIG)
    ours = model.attach_memory(memory)
    model.init_weights()
    ids = torch.zeros(1, 64, dtype=torch.int64)
    children, gists = 4 + (pooling == "cls"), 16 + 4
    attention = gists * 2 * children * 4 * 32 * children * (kind != "mean")  # layers · entries · (scores and values)
    assert counted(lambda: build_levels(ids, ours, 2)) + attention == tree_flops(CONFIG, memory, 64)
    x, lod = torch.randn(1, 30, 32), torch.zeros(1, 30, dtype=torch.int64)
    rotary = model.rotary_table.slice(0, 30, x.device)
    assert counted(lambda: ours.scores(x, lod, rotary)) + 2 * 30 * 4 * 32 * 30 == lens_flops(CONFIG, memory, 30)


def test_flops_of_attention_labels_equal_those_torch_counts() -> None:
    model = GPT(CONFIG)
    model.init_weights()
    x = torch.randn(1, 64, 32)
    found = counted(lambda: block_attention(model, [x] * CONFIG.n_layer, torch.zeros(1, dtype=torch.int64), 5, 3, 8))
    assert found == attention_label_flops(CONFIG, 64, 5)


@pytest.mark.parametrize("cached", [0, 10])
def test_flops_of_decoding_equal_those_torch_counts(cached: int) -> None:
    model = GPT(CONFIG)
    model.init_weights()
    found = counted(lambda: model(torch.zeros(1, 1, dtype=torch.int64)))  # what a token costs without attention
    attention = CONFIG.n_layer * 2 * 2 * CONFIG.n_embd * (cached + 1)  # scores and values, two FLOPs each
    assert found + attention == decode_flops_per_token(CONFIG, cached)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_peaks_by_product_name(name: str, tflops: float) -> None:
    assert peak_flops_by_name(name) == tflops * 1e12


def test_unknown_hardware_has_no_peak() -> None:
    assert peak_flops_by_name("Some GPU 1") is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
