"""What a model costs: parameters, FLOPs per token, and what hardware could deliver."""

from __future__ import annotations

import torch

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.model.router import HIDDEN, WINDOW

# Dense tensor-core FLOP/s in bfloat16 with float32 accumulation, from the vendors' data sheets, by a part of the
# device name; the first match counts, so longer names come first. GeForce: half of the float16-accumulate rate.
_BF16_PEAK: tuple[tuple[str, float], ...] = (
    ("B300", 2.25e15), ("GB200", 2.5e15), ("B200", 2.25e15), ("GH200", 989e12), ("H200", 989e12),
    ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("H800", 989e12), ("H20", 148e12),
    ("A100", 312e12), ("A800", 312e12), ("A10G", 70e12), ("A10", 125e12), ("A30", 165e12), ("A40", 149.7e12),
    ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12),
    ("RTX PRO 6000", 503.8e12), ("RTX 6000 Ada", 364e12), ("A6000", 154.8e12),
    ("RTX 5090", 209.5e12), ("RTX 5080", 112.6e12), ("RTX 4090", 165.2e12), ("RTX 4080", 97.5e12),
    ("RTX 3090", 71e12), ("MI300X", 1307e12), ("MI250X", 383e12),
)  # fmt: skip


def count_params(config: GPTConfig) -> int:
    """Parameters of the model without a memory, embedding and head included."""
    return matmul_params(config) + (config.vocab_size + config.token_shift) * config.n_embd


def matmul_params(config: GPTConfig) -> int:
    """Parameters that take part in a matrix product for every token: all but the embedding, which is a lookup."""
    width = config.n_embd
    return config.n_layer * (_qkv_params(config) + 9 * width * width) + config.vocab_size * width


def _qkv_params(config: GPTConfig) -> int:
    """Parameters of one layer's projections to queries, keys and values."""
    return config.n_embd * (config.n_head + 2 * config.n_kv_head) * config.head_dim


def train_flops_per_token(config: GPTConfig, seq_len: int | None = None) -> float:
    """FLOPs of forward and backward per token at `seq_len` tokens (the model's own length unless given).

    6 per matrix parameter plus 12·layers·width·T for attention scores and values: the convention of PaLM
    (arXiv:2204.02311, appendix B) that nanochat uses; it counts the causally masked half of attention as well.
    """
    return 3 * forward_flops_per_token(config, seq_len)


def forward_flops_per_token(config: GPTConfig, seq_len: int | None = None) -> float:
    """FLOPs of one forward pass per token at `seq_len` tokens, by the same convention."""
    tokens = config.sequence_len if seq_len is None else seq_len
    return 2.0 * matmul_params(config) + 4.0 * config.n_layer * config.n_embd * tokens


def head_flops_per_token(config: GPTConfig) -> float:
    """FLOPs of the logits of one token."""
    return 2.0 * config.vocab_size * config.n_embd


def gist_flops(config: GPTConfig, memory: MemoryConfig, gists: int) -> float:
    """FLOPs of making `gists` gists, each of its block_size children: the encoder and the head."""
    if memory.gistnet_type == "mean":
        return 0.0
    children = memory.block_size + (memory.gistnet_pooling == "cls")
    head = (4 if memory.gistnet_head == "mlp" else 1) * config.n_embd**2
    if memory.gistnet_pooling == "query":
        head += children * config.n_embd
    return gists * (_encoder_flops(config, memory.gistnet_layers, children) + 2.0 * head)


def lens_flops(config: GPTConfig, memory: MemoryConfig, entries: int) -> float:
    """FLOPs of scoring a context of `entries` entries once."""
    head = (2 * config.n_embd + 2) * config.n_embd if memory.lensnet_head == "mlp" else config.n_embd
    return _encoder_flops(config, memory.lensnet_layers, entries) + 2.0 * head * entries


def attention_label_flops(config: GPTConfig, tokens: int, newest: int) -> float:
    """FLOPs of asking what the `newest` tokens of a row that was read attend to: all layers' projections once more, and
    those queries' scores."""
    return config.n_layer * 2.0 * tokens * (_qkv_params(config) + newest * config.n_embd)


def routing_key_flops(config: GPTConfig, memory: MemoryConfig, tokens: int) -> float:
    """FLOPs of the routing keys of whole blocks of `tokens` tokens; above the first level keys cost nothing."""
    if not memory.routing_slots:
        return 0.0
    return 2.0 * tokens * HIDDEN * (WINDOW * config.n_embd + memory.routing_width)


def tree_flops(config: GPTConfig, memory: MemoryConfig, tokens: int) -> float:
    """FLOPs of all records of a history of `tokens` tokens up to the highest level of training."""
    nodes = [tokens // memory.block_size**level for level in range(1, memory.max_lod + 1)]
    return gist_flops(config, memory, sum(nodes)) + routing_key_flops(config, memory, nodes[0] * memory.block_size)


def _encoder_flops(config: GPTConfig, layers: int, entries: int) -> float:
    """FLOPs of a bidirectional encoder of the model's width over one sequence of entries."""
    return layers * entries * (24.0 * config.n_embd**2 + 4.0 * config.n_embd * entries)


def decode_flops_per_token(config: GPTConfig, context_tokens: int) -> float:
    """FLOPs of decoding one token after `context_tokens` cached ones (itself included in the attention)."""
    return forward_flops_per_token(config, context_tokens + 1)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of the device for MFU, or None when unknown: CPUs, float32, and GPUs not in the table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a GPU by its product name, or None when it is not in the table."""
    return next((peak for part, peak in _BF16_PEAK if part.lower() in name.lower()), None)
