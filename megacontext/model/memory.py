"""The memory of a GPT: GistNet, LensNet and the router, trained with it and stored beside its weights.

It is the tree's gist function: a node's record is its gist [D] followed by its routing keys [S·K], one flat vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.model import router as routing
from megacontext.model.gistnet import GistNet
from megacontext.model.lensnet import LensNet
from megacontext.model.rotary import Rotary
from megacontext.model.router import QUERY_TOKENS, Router

Embed = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
# Settings that came after trees stored the digest; no record depends on them.
_UNHASHED = {"allocator_cooldown", "search_blocks", "search_visits", "restated_match", "restated_bonus", "scarcity"}
_AUX = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Memory(nn.Module):
    """Satisfies `context.gist_function.GistFunction`. `embed` is the GPT's: ids and ids before them to [B, T, D]."""

    leaf_context_blocks = 1

    def __init__(self, gpt: GPTConfig, config: MemoryConfig, embed: Embed, router_trained: bool | None = None) -> None:
        super().__init__()
        self.config, self.width = config, gpt.n_embd
        self.block_size = config.block_size
        self.embed = embed
        self.gist = GistNet(gpt, config)
        self.lens = LensNet(gpt, config)
        self.router = Router(gpt.n_embd, config) if config.routing_slots else None
        self.router_trained = config.mc_recall_share > 0 if router_trained is None else router_trained
        self.lod_tag = nn.Parameter(torch.empty(config.max_lod, gpt.n_embd))
        self._digest: tuple[tuple[tuple[int, int], ...], str] = ((), "")

    @property
    def record_width(self) -> int:
        """R: D numbers of the gist, then S·K of the keys."""
        return self.width + self.config.routing_slots * self.config.routing_width

    @property
    def digest(self) -> str:
        """Identity of everything a record depends on: the weights, the embedding's included, and the settings.

        Computed once for each state of the weights.
        """
        state = tuple((id(p), p._version) for p in self.parameters())
        if self._digest[0] != state:
            self._digest = (state, self._hash())
        return self._digest[1]

    def _hash(self) -> str:
        settings = {name: value for name, value in asdict(self.config).items() if name not in _UNHASHED}
        found = hashlib.sha256(repr(sorted(settings.items())).encode())
        probe = torch.arange(8, device=self.lod_tag.device)[None]
        with torch.no_grad():
            tensors = [self.embed(probe, None), *(value for _, value in sorted(self.state_dict().items()))]
        for tensor in tensors:
            found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:32]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize in place, drawn on the CPU in a fixed order: matrices by the spectral condition, outputs zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight") or name.endswith("gate.weight") or parameter.dim() < 1:
                parameter.zero_()
            elif name == "router.recency":
                parameter.copy_(-0.5 * torch.arange(QUERY_TOKENS - 1, -1, -1.0))
            elif name.endswith((".positions", ".query", ".levels", "lod_tag")):
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.1, generator=generator))
            else:
                fan_out, fan_in = parameter.shape
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        if self.router is not None:
            self.router.log_scale.fill_(math.log(10.0))

    def leaf(self, ids: torch.Tensor) -> torch.Tensor:
        """Records [n, m, R] of blocks of ids [n, m, r]. What precedes a block is not seen: its record is its own."""
        blocks = ids.flatten(0, -2).to(self.lod_tag.device)
        x = self._aux(self.embed(blocks, None))
        content = self.gist(x).float()
        if self.router is not None:
            content = torch.cat([content, self.router.keys(x.detach()).flatten(1)], -1)
        records: torch.Tensor = content.view(*ids.shape[:-1], -1)
        return records

    def inner(self, records: torch.Tensor, level: int) -> torch.Tensor:
        """Records [n, R] of nodes above the first level from their children's [n, r, R]; one network for all levels."""
        records = records.to(self.lod_tag.device)
        content = self.gist(self._aux(self.content(records))).float()
        return torch.cat([content, records[..., self.width :].amax(1)], -1)

    def content(self, records: torch.Tensor) -> torch.Tensor:
        """Gists [..., D] of records [..., R]."""
        return records[..., : self.width]

    def keys(self, records: torch.Tensor) -> torch.Tensor:
        """Routing keys [..., S, K] of records [..., R], none below zero."""
        slots = self.config.routing_slots
        return records[..., self.width :].reshape(*records.shape[:-1], slots, self.config.routing_width)

    @property
    def routes(self) -> bool:
        """Whether there is a router that was trained: without recall tasks what it finds is noise."""
        return self.router is not None and self.router_trained

    def query(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit routing queries [B, K] of the newest raw ids [B, Q], and the logits [B] that they ask for something; at
        most the last 32 ids count."""
        assert self.router is not None
        x = self._aux(self.embed(ids[:, -QUERY_TOKENS:], None))
        return self.router.query(x.detach())

    def match(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Matches [..., N] of queries [..., K] with nodes' keys [..., N, S, K]."""
        return routing.match(query, keys)

    def route_logits(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Logits [n, N] of n queries [n, K] over N blocks' keys [N, S, K], for a softmax over the blocks."""
        assert self.router is not None
        flat = query @ keys.flatten(0, 1).T
        return self.router.logits(flat.view(len(query), *keys.shape[:2]).amax(-1))

    def scores(self, x: torch.Tensor, lod: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """LensNet's scores [B, L] float32 in [-1, 1] of entries x [B, L, D] with levels lod [B, L]."""
        return torch.tanh(self.lens(self._aux(x), lod, rotary))

    def tagged(self, content: torch.Tensor, lod: torch.Tensor) -> torch.Tensor:
        """Gists [..., D] with the tag of their level (lod >= 1 [...]); levels above those of training share the last."""
        return content + self.lod_tag.to(content.dtype)[lod.clamp(1, len(self.lod_tag)) - 1]

    def _aux(self, x: torch.Tensor) -> torch.Tensor:
        """In the dtype of GistNet and LensNet."""
        return x.to(_AUX.get(self.config.mc_aux_dtype, x.dtype))
