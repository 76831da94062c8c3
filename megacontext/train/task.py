"""One stage of training as plain data: what crosses process borders, is stored, and is checked on resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megacontext.config import GPTConfig, MemoryConfig, TrainConfig
from megacontext.errors import CheckpointError, UserError
from megacontext.flags import free_flags
from megacontext.model.flops import count_params
from megacontext.stages import BASE
from megacontext.train.recipe import Recipe
from megacontext.train.sizing import floor_steps

# Settings on which no result of training depends: they may change between two starts of a run.
FREE_TRAIN_FLAGS = free_flags(TrainConfig, BASE)
FREE_MEMORY_FLAGS = free_flags(MemoryConfig, BASE)
HORIZON_FLAGS = frozenset({"num_iterations", "target_flops", "max_minutes", "min_tokens", "target_param_data_ratio"})


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Everything the loop needs to train one stage. Paths are absolute or URIs. `memory` is None without `--mc`."""

    stage: str
    run_dir: str
    train_tokens_dir: str
    val_tokens_dir: str
    tokenizer_dir: str
    gpt: GPTConfig
    train: TrainConfig
    seed: int
    memory: MemoryConfig | None = None
    recipe: Recipe = field(default_factory=Recipe)
    dtype: str = "auto"
    compile: str = "auto"
    verify_shards: bool = True
    init_from: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows_per_step(self) -> int:
        """Training rows of one optimizer step. Raises UserError when tokens per step is not a whole number of rows."""
        rows, rest = divmod(self.train.total_batch_size, self.gpt.sequence_len)
        if rest or rows < 1:
            nearest = max(1, round(self.train.total_batch_size / self.gpt.sequence_len)) * self.gpt.sequence_len
            raise UserError(
                f"--total_batch_size {self.train.total_batch_size} tokens is not a multiple of --max_seq_len "
                f"{self.gpt.sequence_len}; the nearest that is: {nearest}."
            )
        return rows

    @property
    def sized_by_clock(self) -> bool:
        """Whether max_minutes decides the horizon."""
        return self.train.num_iterations < 0 and self.train.target_flops <= 0 and self.train.max_minutes > 0

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is computed; a checkpoint continues only under the same ones."""
        train = {key: value for key, value in asdict(self.train).items() if key not in FREE_TRAIN_FLAGS | HORIZON_FLAGS}
        memory = {} if self.memory is None else asdict(self.memory)
        gpt = asdict(self.gpt)
        if not gpt["token_shift"]:
            del gpt["token_shift"]  # as in checkpoints from before there was one
        return {
            "stage": self.stage,
            "seed": self.seed,
            "init_from": self.init_from,
            "model_config": gpt,
            **train,
            **{key: value for key, value in memory.items() if key not in FREE_MEMORY_FLAGS},
        }

    def flops_per_token(self, progress: float) -> float:
        """Training FLOPs per token of a row when a share `progress` of the run is done."""
        return self.recipe.flops_per_token(self.gpt, self.memory, progress)

    @property
    def mean_flops_per_token(self) -> float:
        """`flops_per_token` over the whole run."""
        points = [(step + 0.5) / 64 for step in range(64)]
        return sum(map(self.flops_per_token, points)) / len(points)

    def check_continues(self, identity: Mapping[str, Any], checkpoint: str) -> None:
        """Raises CheckpointError naming every setting that differs from the checkpoint's."""
        mine = self.identity()
        differing = [
            f"{key} was {identity.get(key)!r}, is {mine.get(key)!r}"
            for key in [*mine, *(key for key in identity if key not in mine)]
            if identity.get(key) != mine.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"run {self.run_dir!r} cannot continue from {checkpoint!r} with other settings: {'; '.join(differing)}. "
                "Use the old values, or start another --run."
            )


def horizon_steps(task: TrainTask, fitting: int | None) -> int:
    """Optimizer steps of a stage, by the first of num_iterations, target_flops, max_minutes, the data:param ratio.

    `fitting`: steps that fit max_minutes, as measured; needed only when these decide. There are never fewer steps than
    `min_tokens` takes.
    """
    cfg = task.train
    if cfg.num_iterations >= 0:
        return cfg.num_iterations
    if cfg.target_flops > 0:
        return max(1, round(cfg.target_flops / (task.mean_flops_per_token * cfg.total_batch_size)))
    if cfg.max_minutes > 0:
        assert fitting is not None
        return max(1, fitting, floor_steps(cfg))
    if cfg.target_param_data_ratio > 0:
        return max(1, round(cfg.target_param_data_ratio * count_params(task.gpt) / cfg.total_batch_size))
    raise UserError(
        "no training horizon: set one of --num_iterations, --target_flops, --max_minutes or --target_param_data_ratio."
    )
