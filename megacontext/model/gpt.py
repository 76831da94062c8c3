"""The classic nanochat GPT (2025): pre-norm, no biases, rotary, QK norm, relu², untied head, softcapped logits.

Legend: B batch, T tokens, L entries, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from typing import cast

import torch
from torch import nn

from megacontext.config import FocusConfig, GPTConfig, MemoryConfig
from megacontext.errors import DataError
from megacontext.model.attention import CausalSelfAttention, Linear
from megacontext.model.cross_entropy import linear_cross_entropy, softcapped
from megacontext.model.kv_cache import KVCache
from megacontext.model.memory import Memory
from megacontext.model.mlp import MLP
from megacontext.model.norm import rms_norm
from megacontext.model.rotary import Rotary, RotaryTable
from megacontext.model.rotary_entries import entry_rotary

SOFTCAP = 15.0


class Block(nn.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, cache: KVCache | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        x = x + self.attn(rms_norm(x), rotary, cache, mask)
        return x + self.mlp(rms_norm(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """The model. State-dict keys are nanochat's; nothing but weights is in it.

    `compute_dtype` (float32 or bfloat16) is what activations and matrix products use; weights may be wider and are
    cast at use. Logits and losses are always float32.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.token_shift = nn.Parameter(torch.empty(config.n_embd)) if config.token_shift else None
        self.memory: Memory | None = None
        self.focus = FocusConfig()  # defaults of whoever shows the model a working context
        self.rotary_table = RotaryTable(config.head_dim)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize in place: drawn on the CPU in a fixed order, so a seed gives the same weights on every device.

        Matrices N(0, (1/√fan_in)·min(1, √(fan_out/fan_in))) (spectral condition, arXiv:2310.17813), embedding N(0, 1),
        zeros in lm_head and in the output projections, so that every block starts as the identity.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("memory."):
                continue
            if name == "token_shift":
                parameter.fill_(0.5)
                continue
            if name == "lm_head.weight" or name.endswith("c_proj.weight"):
                parameter.zero_()
                continue
            fan_out, fan_in = parameter.shape
            std = 1.0 if name == "transformer.wte.weight" else min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
        if self.memory is not None:  # after the GPT, whose weights are then those without a memory
            self.memory.init_weights(generator)

    def attach_memory(self, config: MemoryConfig, router_trained: bool | None = None) -> Memory:
        """Give the model a memory, not yet initialized; its parameters are `memory.*` of the state dict.

        `router_trained`: whether the router has learned to search; unless given, whether `config` trains it.
        """
        self.memory = Memory(self.config, config, self.embed, router_trained).to(self.device)
        self.focus = config.focus
        return self.memory

    @torch.no_grad()
    def prepare_inference(self) -> None:
        """Cast matrices to compute_dtype once and fuse the projections; for a model that is trained no further.

        The embedding keeps its dtype: it is looked up, not multiplied, and rounding it would change the results.
        """
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.data = module.weight.data.to(self.compute_dtype)
        for block in self.blocks:
            block.attn.fuse()
        self.eval()

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(cast(nn.ModuleList, self.transformer["h"])))

    def make_cache(self, batch: int, capacity: int, max_capacity: int | None = None, entries: bool = False) -> KVCache:
        """An empty KV cache of this model's shape, dtype and device: for tokens, or for a working context's `entries`."""
        c, memory = self.config, self.memory
        biased = entries and memory is not None and memory.config.positional_type == "gaussian_alibi"
        width = c.head_dim + biased  # the channel of the bias
        return KVCache(batch, c.n_layer, c.n_kv_head, width, capacity, self.compute_dtype, self.device, max_capacity)

    def embed(self, ids: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Normed token embeddings: ids [B, T] int64 to [B, T, D] in compute_dtype.

        With token_shift each carries a share of the embedding of the token before it in the text: `previous` [B, T],
        -1 where there is none, or the ids themselves moved by one.
        """
        x = self.transformer["wte"](ids)
        if self.token_shift is None:
            return rms_norm(x, self.compute_dtype)
        x = rms_norm(x)
        if previous is None:
            before = nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        else:
            before = rms_norm(self.transformer["wte"](previous.clamp(min=0))) * (previous >= 0)[..., None]
        return rms_norm(x + self.token_shift * before, self.compute_dtype)

    def embed_entries(
        self, ids: torch.Tensor, previous: torch.Tensor, content: torch.Tensor, lod: torch.Tensor
    ) -> torch.Tensor:
        """Inputs [B, L, D] of a working context: tokens where lod is 0, gists elsewhere.

        ids, previous, lod [B, L] int64; content [B, L, D]: gists of the memory, or means of embeddings for a model
        without one. What ids hold at gists, and content at tokens, is not used.
        """
        gists = content.to(self.compute_dtype)
        gists = rms_norm(gists) if self.memory is None else self.memory.tagged(gists, lod)
        return torch.where((lod == 0)[..., None], self.embed(ids, previous), gists)

    def entry_rotary(
        self,
        positions: torch.Tensor,
        sigmas: torch.Tensor,
        slots: torch.Tensor,
        end: torch.Tensor | None = None,
    ) -> Rotary:
        """Rotary of entries, by the memory's positional_type (slots without a memory); see `rotary_entries`."""
        kind = "slot" if self.memory is None else self.memory.config.positional_type
        return entry_rotary(kind, positions, sigmas, slots, self.config.head_dim, self.config.sequence_len, end)

    def trunk(
        self,
        x: torch.Tensor,
        rotary: Rotary,
        cache: KVCache | None = None,
        mask: torch.Tensor | None = None,
        layer_inputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """All blocks and the final norm: x [B, L, D] (token embeddings, later gists as well) to hidden [B, L, D].

        rotary: cos and sin, broadcast to [B, L, 1, K/2]. cache: earlier keys and values, extended by these. mask: bool,
        broadcast to [B, H, L, length + L], True where attention may look; causal without it. layer_inputs: a list that is
        given what every block gets [B, L, D], without gradient.
        """
        for block in self.blocks:
            if layer_inputs is not None:
                layer_inputs.append(x.detach())
            x = block(x, rotary, cache, mask)
        if cache is not None:
            cache.advance(x.shape[1])
        return rms_norm(x)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Softcapped logits [..., V] float32 of hidden [..., D]."""
        return softcapped(self.lm_head(hidden), SOFTCAP)

    def hidden(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Hidden states [B, T, D] of token ids [B, T] that follow what the cache holds."""
        start = 0 if cache is None else cache.length
        x = self.embed(ids) if cache is None else self.embed(ids, cache.previous_of(ids))
        return self.trunk(x, self.rotary_table.slice(start, ids.shape[1], ids.device), cache)

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits [B, T, V] float32 of token ids [B, T] int64; with a cache, ids continue it and are added to it.

        Raises DataError for anything else than a batch of ids of the vocabulary.
        """
        self._check_ids(ids)
        return self.head(self.hidden(ids, cache))

    def _check_ids(self, ids: torch.Tensor) -> None:
        """Raise DataError unless these are ids [B, T]: whole numbers of the vocabulary, on the model's device."""
        right = isinstance(ids, torch.Tensor) and ids.dim() == 2 and ids.dtype in (torch.int64, torch.int32)
        if not right or not ids.numel():
            found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else f"a {type(ids).__name__}"
            raise DataError(f"a model takes ids [B, T] int64, at least one, not {found}. Use torch.tensor([ids]).")
        if ids.device != self.device:
            raise DataError(f"the ids are on {ids.device}, the model is on {self.device}; use ids.to(model.device).")
        low, high = (int(limit) for limit in ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise DataError(
                f"the ids are {low} to {high}; the vocabulary has 0 to {self.config.vocab_size - 1}. Encode the text with "
                "this model's tokenizer."
            )

    def loss(self, ids: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy in nats, float32, of targets [B, T] int64 given ids [B, T]; targets of -1 do not count.

        reduction "mean" or "sum" gives a scalar, "none" [B, T]. The logits of the batch are never held at once.
        """
        hidden = self.hidden(ids).flatten(0, 1)
        losses = linear_cross_entropy(
            hidden, self.lm_head.weight, targets.reshape(-1), cap=SOFTCAP, reduction=reduction
        )
        return losses.view(targets.shape) if reduction == "none" else losses

    def compiled(self) -> GPT:
        """A model that shares these weights and runs its trunk through torch.compile; state and inference stay here."""
        twin = copy.copy(self)
        twin.__dict__["trunk"] = torch.compile(self.trunk, dynamic=False)
        return twin
