"""What a stage is made of: where its rows come from, what it minimizes, what that costs, how it is judged.

A recipe is plain data: functions of modules, so that it crosses to other processes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megacontext import precision
from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.model.flops import train_flops_per_token
from megacontext.model.gpt import GPT
from megacontext.model.rotary import Rotary
from megacontext.train.lens_loss import RunningScales
from megacontext.train.memory_flops import memory_flops_per_token
from megacontext.train.memory_objective import MemoryObjective
from megacontext.train.objective import Objective, TokenObjective
from megacontext.train.rows import Rows, ShardRows
from megacontext.train.validation import BpbJudge, Judge

if TYPE_CHECKING:
    from megacontext.train.task import TrainTask


@dataclass(frozen=True)
class Start:
    """What an objective begins with: the model that trains (compiled where that pays), the number of workers, the share
    of the run that is done when a step begins, and what a checkpoint holds of the objective's `state_dict`."""

    model: GPT
    world_size: int
    progress: Callable[[int], float]
    state: Mapping[str, Any]


def token_or_memory(task: TrainTask, start: Start) -> Objective:
    """Next-token cross-entropy, of an `--mc` run with the losses of its memory."""
    if task.memory is None:
        return TokenObjective(start.model)
    compiled = precision.choose_compile(task.compile, start.model.device)
    view_trunk = any_length_trunk(start.model) if compiled else None
    scales = RunningScales(**start.state)
    return MemoryObjective(
        start.model, task.seed, task.rows_per_step, start.world_size, start.progress, scales, view_trunk
    )


def any_length_trunk(model: GPT) -> Callable[[Tensor, Rotary], Tensor]:
    """The trunk for variants, compiled by itself and once: with that of the rows, each new length would compile anew."""
    return torch.compile(partial(GPT.trunk, model), dynamic=True)


def token_or_memory_flops(gpt: GPTConfig, memory: MemoryConfig | None, progress: float) -> float:
    """Training FLOPs per token of a row when a share `progress` of the run is done."""
    return train_flops_per_token(gpt) if memory is None else memory_flops_per_token(gpt, memory, progress)


@dataclass(frozen=True)
class Recipe:
    """A stage of training. `rows` and `judge` are called with the task, its tokenizer, and whether to verify checksums."""

    rows: Callable[[TrainTask, Tokenizer, bool], Rows] = ShardRows.open
    objective: Callable[[TrainTask, Start], Objective] = token_or_memory
    flops_per_token: Callable[[GPTConfig, MemoryConfig | None, float], float] = token_or_memory_flops
    judge: Callable[[TrainTask, Tokenizer, bool], Judge] = BpbJudge.open
