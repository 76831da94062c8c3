"""How many steps fit `--max_minutes`, and what is said of it. All times are seconds of this machine."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from megacontext.config import TrainConfig

RESERVE = 0.05  # share of the minutes for checkpoints and for what ends the stage


@dataclass(frozen=True)
class Pace:
    """What was measured before the first step.

    `spent`: time of the stage that no step gets: starting, measuring, compiling. `step`: one optimizer step.
    `validation`: one validation.
    """

    spent: float
    step: float
    validation: float

    def seconds(self, train: TrainConfig, steps: int) -> float:
        """Time of the whole stage with so many steps, without its checkpoints."""
        return self.spent + steps * self.step + validations(train, steps) * self.validation


def validations(train: TrainConfig, steps: int) -> int:
    """Validations of a run of so many steps: before the first one, every `eval_every` steps, and after the last one."""
    return 1 if train.eval_every < 1 else 2 + (steps - 1) // train.eval_every


def fitting_steps(train: TrainConfig, pace: Pace) -> int:
    """Most steps whose stage takes `max_minutes` with its validations and checkpoints; at least 1."""
    budget = train.max_minutes * 60 * (1 - RESERVE)
    most = max(1, int(budget / pace.step))
    return max(1, bisect.bisect_right(range(1, most + 1), budget, key=lambda steps: pace.seconds(train, steps)))


def floor_steps(train: TrainConfig) -> int:
    """Steps that `min_tokens` takes."""
    return -(-train.min_tokens // train.total_batch_size)


def describe(train: TrainConfig, pace: Pace, fitting: int, steps: int) -> str:
    """What was measured and what follows from it, as one line."""
    minutes = pace.seconds(train, steps) / (1 - RESERVE) / 60
    text = f"a step takes {pace.step:.3g} s, a validation {pace.validation:.3g} s; "
    text += f"{_counted(fitting, 'step')} in {_counted(train.max_minutes, 'minute')}"
    if steps > fitting:
        text += (
            f". That makes {fitting * train.total_batch_size:,} tokens, and fewer than {train.min_tokens:,} (--min_tokens) do not "
            f"make a useful model, so training takes {_counted(steps, 'step')}: about {minutes:.{0 if minutes > 10 else 1}f} "
            "minutes. With --min_tokens 0 it ends by the clock"
        )
    return text


def _counted(number: float, noun: str) -> str:
    """`1 step`, `2 steps`, `1.5 minutes`."""
    return f"{number if number % 1 else int(number):,} {noun}{'' if number == 1 else 's'}"
