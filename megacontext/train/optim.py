"""The optimizer of a training run: Muon for block matrices, AdamW for the embedding and the head, as in nanochat.

It is also the data-parallel layer: gradients are averaged here (`reduce`), so no wrapper stands between the loop and the
model. State is the same on every rank and keyed by parameter name: what rank 0 saves loads at any world size.
The order of a step is reduce, clip, step, zero_grad.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from megacontext.config import TrainConfig
from megacontext.errors import CheckpointError
from megacontext.model.gpt import GPT
from megacontext.train.muon import Muon

VECTOR_LR = 0.01  # AdamW rate of a memory's vectors and small tables
_BUCKET_ELEMENTS = 16 * 2**20
_ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are updated by the same rule. `lr` is the peak rate; betas, eps and weight_decay are AdamW's."""

    kind: Literal["muon", "adamw"]
    parameters: Mapping[str, nn.Parameter]
    lr: float
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    weight_decay: float = 0.0


def gpt_groups(model: nn.Module, config: TrainConfig) -> list[ParamGroup]:
    """nanochat's groups of a GPT: head and embedding by AdamW at lr·(width/768)^−0.5, all block matrices by Muon."""
    named = dict(model.named_parameters())
    width = named["lm_head.weight"].shape[1]
    scale = (width / 768) ** -0.5
    decay = config.weight_decay
    blocks = {name: p for name, p in named.items() if name.startswith("transformer.h.")}
    head = {"lm_head.weight": named["lm_head.weight"]}
    embedding = {"transformer.wte.weight": named["transformer.wte.weight"]}
    shift = {"token_shift": named["token_shift"]} if "token_shift" in named else {}
    return [
        *([ParamGroup("adamw", shift, 0.1 * config.embedding_lr * scale)] if shift else []),
        ParamGroup("adamw", head, config.unembedding_lr * scale, weight_decay=decay),
        ParamGroup("adamw", embedding, config.embedding_lr * scale, weight_decay=decay),
        ParamGroup("muon", blocks, config.matrix_lr),
    ]


def memory_groups(model: nn.Module, config: TrainConfig) -> list[ParamGroup]:
    """Groups of `memory.*`, none without one: matrices by Muon as those of the blocks, the rest by AdamW.

    A matrix with one row is a vector here: Muon would move it by the same length whatever its gradient. LensNet and the
    router learn from their own losses alone, and neither optimizer knows the size of a gradient; so the weights of
    these losses are factors of the learning rates as well, or they would do nothing.
    """
    memory = getattr(model, "memory", None)
    if memory is None:
        return []
    weights = {"memory.lens.": memory.config.mc_lens_loss_weight, "memory.router.": memory.config.mc_route_loss_weight}
    taught: dict[float, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("memory."):
            weight = next((weight for prefix, weight in weights.items() if name.startswith(prefix)), 1.0)
            taught.setdefault(weight, {})[name] = parameter
    groups = []
    for weight, named in taught.items():
        matrices = {name: p for name, p in named.items() if name.endswith(".weight") and p.ndim == 2 and len(p) > 1}
        vectors = {name: p for name, p in named.items() if name not in matrices}
        groups += [ParamGroup("muon", matrices, weight * config.matrix_lr)] if matrices else []
        groups += [ParamGroup("adamw", vectors, weight * VECTOR_LR)] if vectors else []
    return groups


def build_optimizer(model: GPT, config: TrainConfig) -> Optimizer:
    """The optimizer of a GPT and its memory. Newton–Schulz runs in the model's compute dtype: bfloat16 is only chosen where
    the hardware has it, and a float32 run should be float32 throughout."""
    return Optimizer(model, [*gpt_groups(model, config), *memory_groups(model, config)], model.compute_dtype)


class Optimizer:
    """Muon and AdamW over named parameter groups that together cover every parameter of `module` exactly once."""

    def __init__(self, module: nn.Module, groups: Sequence[ParamGroup], muon_dtype: torch.dtype) -> None:
        self.named = dict(module.named_parameters())
        _check_cover(self.named, groups)
        self._parameters = list(self.named.values())
        self._muons = [Muon(group.parameters, group.lr, muon_dtype) for group in groups if group.kind == "muon"]
        adam = [group for group in groups if group.kind == "adamw"]
        self._adam_lrs = [group.lr for group in adam]
        self._adam_names = [name for group in adam for name in group.parameters]
        self._adamw = torch.optim.AdamW(
            [
                dict(params=list(g.parameters.values()), lr=g.lr, betas=g.betas, eps=g.eps, weight_decay=g.weight_decay)
                for g in adam
            ],
            fused=True,
        )
        for name in self._adam_names:  # complete from the start, so that a checkpoint of step 0 is whole
            parameter = self.named[name]
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def reduce(self, world_size: int) -> None:
        """Average gradients over the ranks, in flat buckets; a parameter that took no part counts as zero."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if world_size == 1:
            return
        pending = []
        for bucket in self._buckets():
            flat = torch.cat([_grad(parameter).reshape(-1) for parameter in bucket])
            pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in pending:
            assert work is not None
            work.wait()
            flat.div_(world_size)  # not ReduceOp.AVG: Gloo has none
            offset = 0
            for parameter in bucket:
                parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their joint norm is at most `max_norm` (inf only measures).

        Returns the norm before, a float32 scalar on the device; nothing waits for it.
        """
        grads = [_grad(parameter) for parameter in self._parameters]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if max_norm != float("inf"):
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float) -> None:
        """Update the parameters from their gradients at `lr_multiplier` times the peak rates. Every rank must call it."""
        for group, lr in zip(self._adamw.param_groups, self._adam_lrs, strict=True):
            group["lr"] = lr * lr_multiplier
        self._adamw.step()
        for muon in self._muons:
            muon.step(lr_multiplier, momentum)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """State by parameter name, plain tensors: {"momentum"} under Muon, {"step", "exp_avg", "exp_avg_sq"} under AdamW.

        The tensors are views of the live state.
        """
        state: dict[str, dict[str, torch.Tensor]] = {}
        for muon in self._muons:
            state |= muon.state()
        for name in self._adam_names:
            state[name] = {key: self._adamw.state[self.named[name]][key] for key in _ADAM_KEYS}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state in place. Raises CheckpointError naming every entry that is missing, unknown or of another shape."""
        mine, theirs = (_flat(tree) for tree in (self.state_dict(), state))
        problems = [f"{key} is missing" for key in mine.keys() - theirs.keys()]
        problems += [f"{key} is unknown" for key in theirs.keys() - mine.keys()]
        problems += [
            f"{key} has shape {list(theirs[key].shape)}, expected {list(mine[key].shape)}"
            for key in mine.keys() & theirs.keys()
            if theirs[key].shape != mine[key].shape
        ]
        if problems:
            raise CheckpointError(
                f"optimizer state does not fit this model: {'; '.join(sorted(problems))}. "
                "Resume with the model and the optimizer groups it was saved from."
            )
        for key, tensor in mine.items():
            tensor.copy_(theirs[key])

    def _buckets(self) -> Iterator[list[nn.Parameter]]:
        bucket: list[nn.Parameter] = []
        for parameter in self._parameters:
            bucket.append(parameter)
            if sum(p.numel() for p in bucket) >= _BUCKET_ELEMENTS:
                yield bucket
                bucket = []
        if bucket:
            yield bucket


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "no gradient: run a backward pass and reduce() first"
    return parameter.grad


def _flat(tree: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": tensor for name, entry in tree.items() for key, tensor in entry.items()}


def _check_cover(named: Mapping[str, nn.Parameter], groups: Sequence[ParamGroup]) -> None:
    listed = [name for group in groups for name in group.parameters]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    missing, unknown = sorted(named.keys() - set(listed)), sorted(set(listed) - named.keys())
    problem = f"missing {missing}, unknown {unknown}, in several {twice}" if twice or missing or unknown else ""
    assert not problem, f"every parameter belongs to exactly one group; {problem}"
    for group in groups:
        for name, parameter in group.parameters.items():
            assert parameter is named[name], f"group names {name}, but holds another tensor"
