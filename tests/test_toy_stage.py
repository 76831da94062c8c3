"""A new stage of training is a value: rows, an objective and a judge; it starts from the base model, resumes and reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_pipeline import MODEL, arguments, run_pipeline

from jobs import report, training
from jobs.runtime import run_settings
from jobs.runtime.stage import run_stage
from megacontext.checkpoint import load_checkpoint
from megacontext.data.stream import Batch, BatchPlan
from megacontext.errors import CheckpointError
from megacontext.model.gpt import GPT
from megacontext.stages import TRAIN, Stage
from megacontext.train.objective import StepLoss, TokenObjective
from megacontext.train.recipe import Recipe
from megacontext.train.step_plan import StepPlan
from megacontext.train.throughput import Stopwatch

TOKENS = MODEL["max_seq_len"]

# The toy stage begins here: what a developer writes for a new one.
TOY = Stage("toy_train", TRAIN, checkpoint="toy", after=("base",))


@dataclass(frozen=True)
class Counting:
    """Rows that count upwards; every second target counts."""

    digest: str = "counting"
    every_target_counts: bool = False

    def read(
        self, plan: BatchPlan, rank: int, first_step: int, end_step: int, source: Iterator[Batch] | None = None
    ) -> Iterator[Batch]:
        weights = torch.arange(TOKENS).remainder(2).float().expand(plan.device_batch, -1)
        for micro in range(first_step * plan.accum_steps, end_step * plan.accum_steps):
            at = plan.rank_positions(micro, micro + 1, rank)[0]
            yield Batch(torch.from_numpy((at[:, None] + np.arange(TOKENS + 1)) % 250), at, at, weights)


class Doubled(TokenObjective):
    """Twice the cross-entropy."""

    def loss(self, plan: StepPlan, scale: float, watch: Stopwatch) -> torch.Tensor:
        return 2 * super().loss(plan, scale, watch)

    def finish(self, loss: float, totals: Sequence[float]) -> StepLoss:
        return StepLoss(loss / 2, {"toy/doubled": loss})


class Counts:
    """Judged by the loss of counting from 0."""

    def __call__(self, model: GPT, rank: int, world_size: int) -> Mapping[str, float]:
        with torch.no_grad():
            return {"counting": float(model.loss(torch.arange(TOKENS)[None], torch.arange(1, TOKENS + 1)[None]))}

    def seconds(self, model: GPT, world_size: int) -> float:
        return 0.0


RECIPE = Recipe(lambda task, *_: Counting(), lambda task, start: Doubled(start.model), judge=lambda *_: Counts())
JOB = training.job(TOY, RECIPE, folders=lambda args: ("", ""))
# The toy stage ends here.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("toy")
    run_pipeline(base)
    return base


def test_the_toy_stage_is_short() -> None:
    lines = Path(__file__).read_text().split("\n")
    first, last = (
        next(n for n, line in enumerate(lines) if line.startswith(f"# The toy stage {word}"))
        for word in ("begins", "ends")
    )
    code = [line for line in lines[first + 1 : last] if line.strip()]
    assert len(code) <= 40


def test_it_trains_from_the_base_model_and_is_in_the_report(base: Path) -> None:
    args = arguments(base, "--num_iterations=40", "--matrix_lr=0.03", "--eval_every=10", "--save_every=10")
    metrics = run_stage(JOB, args)
    run_dir = base / "runs" / "mine"
    start, end = (load_checkpoint(str(run_dir / "checkpoints" / name), with_optimizer=False)
                  for name in ("megacontext_base_000003", "megacontext_toy_000040"))  # fmt: skip
    assert end.meta["identity"]["init_from"].endswith("megacontext_base_000003")
    assert start.model.keys() == end.model.keys()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    judged = [record["val/counting"] for record in records if "val/counting" in record]
    assert len(judged) == 5
    assert judged[-1] < judged[0] - 1, "it learned to count"
    assert metrics["toy_train/val_counting"] == judged[-1]
    assert any(record.get("toy/doubled", 0) == 2 * record.get("train/loss", 1) for record in records)
    report.run(args)
    assert "toy_train" in (run_dir / "report" / "report.md").read_text()
    assert json.loads((run_dir / "report" / "report.json").read_text())["toy_train/val_counting"] == judged[-1]


def test_its_settings_are_its_own_and_those_of_the_base_stay(base: Path) -> None:
    run_dir = str(base / "runs" / "mine")
    known = run_settings.read(run_dir)
    assert known.values["num_iterations"] == MODEL["num_iterations"]
    assert known.of(TOY.name)["num_iterations"] == 40
    assert yaml.safe_load(Path(run_dir, "config.yaml").read_text())["of_stage"] == {
        "toy_train": {"num_iterations": 40, "matrix_lr": 0.03, "eval_every": 10, "save_every": 10}
    }
    assert run_stage(replace(JOB, run=_fail), arguments(base, "--num_iterations=40", "--matrix_lr=0.03"))  # complete


def test_it_resumes_to_the_same_weights(base: Path) -> None:
    args = arguments(base, "--num_iterations=40", "--matrix_lr=0.03", "--save_every=10")
    checkpoints = base / "runs" / "mine" / "checkpoints"
    whole = load_checkpoint(str(checkpoints / "megacontext_toy_000040"), with_optimizer=False).model
    (checkpoints / "megacontext_toy_000040" / "model.pt").write_bytes(b"half")  # so that it continues from step 30
    (base / "runs" / "mine" / "stages" / "toy_train.json").unlink()
    run_stage(JOB, args)
    again = load_checkpoint(str(checkpoints / "megacontext_toy_000040"), with_optimizer=False).model
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def test_it_needs_the_stage_before_it(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"toy_train of run 'none' starts from a checkpoint of base.*has none; train it"
    ):
        run_stage(JOB, arguments(tmp_path, run="none"))


def _fail(args: object) -> dict[str, float]:
    raise AssertionError("a complete stage runs again")
