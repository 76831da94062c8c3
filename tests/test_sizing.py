"""How long a run that the clock sizes takes: what is in the minutes, the floor below which they do not shrink it, `--mc`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_task

from jobs import base_eval, prepare_data, speedrun, tok_eval, tok_train
from jobs.runtime import cli
from megacontext.config import MC_IMPLIES, TIERS, TrainConfig
from megacontext.train import setup, validation
from megacontext.train.setup import choose_sizes, known_horizon
from megacontext.train.sizing import RESERVE, Pace, describe, fitting_steps, floor_steps, validations
from megacontext.train.step import Stepper, StepResult
from megacontext.train.task import horizon_steps

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when a test says so, in place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    perf_counter = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(setup, "time", found)
    monkeypatch.setattr(validation, "time", found)
    return found


def steps_take(monkeypatch: pytest.MonkeyPatch, clock: Clock, *seconds: float) -> list[int]:
    """Steps do nothing but take time: those given, the last of them again and again. Returns the list of steps taken."""
    taken: list[int] = []

    def run(self: Stepper, step: int, *rest: Any, **more: Any) -> StepResult:
        clock.now += seconds[min(step, len(seconds) - 1)]
        taken.append(step)
        return None  # type: ignore[return-value]

    monkeypatch.setattr(Stepper, "run", run)
    return taken


@given(st.floats(0.2, 30), st.floats(0, 500), st.floats(1e-3, 60), st.floats(0, 20), st.sampled_from([-1, 1, 7, 200]))
def test_as_many_steps_as_fit_with_all_that_is_waited_for(
    minutes: float, spent: float, step: float, validation: float, every: int
) -> None:
    train, pace = TrainConfig(max_minutes=minutes, eval_every=every), Pace(spent, step, validation)
    steps, budget = fitting_steps(train, pace), minutes * 60 * (1 - RESERVE)
    assert steps == 1 or pace.seconds(train, steps) <= budget
    assert pace.seconds(train, steps + 1) > budget or (steps + 1) * step > budget * (1 - 1e-9)


@pytest.mark.parametrize(("steps", "every", "count"), [(12, 4, 4), (13, 4, 5), (1, 4, 2), (12, -1, 1), (12, 50, 2)])
def test_validations_of_a_run(steps: int, every: int, count: int) -> None:
    assert validations(TrainConfig(eval_every=every), steps) == count


def test_a_run_validates_as_often_as_is_counted(tmp_path: Path) -> None:
    from test_resume import train_here

    train_here(make_task(tmp_path, num_iterations=9, eval_every=4))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("val/bpb" in line for line in lines) == validations(TrainConfig(eval_every=4), 9)


def test_too_few_tokens_take_longer_and_say_so() -> None:
    """19 steps in 7 minutes, beside other work: they were the whole training."""
    train = TrainConfig(max_minutes=7.0, min_tokens=1_000_000, total_batch_size=4096, eval_every=-1)
    pace = Pace(spent=20.0, step=20.0, validation=10.0)
    fitting = fitting_steps(train, pace)
    assert fitting < 20
    assert floor_steps(train) == 245
    text = describe(train, pace, fitting, 245)
    assert f"{fitting} steps in 7 minutes" in text
    assert "fewer than 1,000,000 (--min_tokens)" in text
    assert "training takes 245 steps: about 86 minutes" in text
    assert "--min_tokens" not in describe(train, pace, 300, 300)


def test_the_floor_holds_for_the_clock_alone(tmp_path: Path) -> None:
    task = make_task(tmp_path, num_iterations=-1, max_minutes=1.0, min_tokens=1000)  # steps of 128 tokens
    assert horizon_steps(task, 3) == 8
    assert horizon_steps(task, 30) == 30
    assert horizon_steps(make_task(tmp_path, num_iterations=3, min_tokens=1000), None) == 3


def test_measuring_is_said_cheap_and_part_of_the_minutes(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task(tmp_path, num_iterations=-1, max_minutes=2.0, eval_every=-1)
    taken = steps_take(monkeypatch, clock, 10.0)  # a slow machine: one step is enough to know
    steps, _ = choose_sizes(task, CPU, 1)
    shown = capsys.readouterr().out
    assert len(taken) == 1
    assert steps == int((120 * (1 - RESERVE) - 10) / 10)
    assert shown.index("measuring how long a step takes") < shown.index("a step takes 10 s")
    assert known_horizon(task) == steps  # from now on, whatever the clock says
    assert choose_sizes(task, CPU, 1)[0] == steps


def test_what_was_waited_for_before_and_what_only_the_first_step_does_count(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, num_iterations=-1, max_minutes=10.0, eval_every=-1)
    taken = steps_take(monkeypatch, clock, 5.0, 1.0)
    steps, _ = choose_sizes(task, CPU, 1, began=clock.now - 15)
    assert len(taken) == 6
    waited, measured, again = 2 * 15, 5 + 5 * 1, 5 - 1
    assert steps == int(600 * (1 - RESERVE) - waited - measured - again)


def test_a_compiled_model_is_timed_behind_its_compiling(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "compiled", lambda model, choice, device: model.compiled())
    task = make_task(tmp_path, num_iterations=-1, max_minutes=10.0, eval_every=-1)
    taken = steps_take(monkeypatch, clock, 100.0, 1.0)
    steps, _ = choose_sizes(task, CPU, 1)
    assert len(taken) == 2
    assert steps == int(600 * (1 - RESERVE) - 101 - 99)


# What --mc implies


def test_mc_alone_is_a_recipe_by_which_a_memory_recalls() -> None:
    args = cli.resolve({"tier": "cpu", "mc": 1})
    assert args.model.token_shift == 1
    assert args.memory.mc_recall_share == MC_IMPLIES["cpu"]["mc_recall_share"] > 0
    assert floor_steps(args.train) == 600
    for tier in TIERS.keys() - {"cpu"}:
        there = cli.resolve({"tier": tier, "mc": 1})
        assert there.model.token_shift == 1
        assert there.memory.mc_recall_share > 0
        assert there.model.depth == TIERS[tier]["depth"]


def test_without_mc_nothing_is_implied() -> None:
    for mc in ({}, {"mc": 0}):
        args = cli.resolve({"tier": "cpu", **mc})
        assert (args.model.depth, args.model.token_shift, args.data.vocab_size) == (4, 0, 8192)
        assert args.memory.mc_recall_share == 0
        assert args.train.min_tokens == TIERS["cpu"]["min_tokens"] > 0


def test_what_is_given_beats_what_is_implied() -> None:
    args = cli.resolve({"tier": "cpu", "mc": 1, "token_shift": 0, "mc_recall_share": 0.1, "routing_slots": 4})
    assert (args.model.token_shift, args.memory.mc_recall_share, args.memory.routing_slots) == (0, 0.1, 4)


def test_minutes_that_a_user_gives_are_kept() -> None:
    assert cli.resolve({"tier": "cpu", "max_minutes": 2.0}).train.min_tokens == 0
    assert cli.resolve({"tier": "cpu", "max_minutes": 2.0, "min_tokens": 5}).train.min_tokens == 5


@pytest.mark.parametrize("job", [tok_train, tok_eval, prepare_data, base_eval])
def test_every_stage_can_be_told_of_the_memory(job: ModuleType, tmp_path: Path) -> None:
    """The stages of a run one by one: they share the tokenizer, whose size --mc implies."""
    flags = ["--tier", "cpu", "--base_dir", str(tmp_path), "--mc"]
    whole = cli.parse(speedrun.SECTIONS, None, flags)
    assert cli.paths(cli.parse(job.SECTIONS, None, flags)) == cli.paths(whole)
    assert whole.data.vocab_size == MC_IMPLIES["cpu"]["vocab_size"]


def test_help_says_what_mc_implies() -> None:
    assert "cpu with --mc: " in cli.tier_note("mc_recall_share", 0.0)


def test_sizes_do_not_decide_whether_a_run_continues(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    longer = replace(task, train=replace(task.train, min_tokens=10**6))
    assert task.identity() == longer.identity()
