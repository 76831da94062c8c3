"""Training that is killed again and again, in the middle of writing checkpoints as well, ends bit-equal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from session_programs import one_thread
from test_mc_training import deterministic, make_mc_task, records, saved_at
from test_resume import losses, rows, start, train_here
from tiny import make_task

from megacontext.data.shards import ShardSet
from megacontext.data.stream import RowOrder

KILLS = 40 if os.environ.get("MC_SOAK") else 4
TIMEOUT_S = 200.0 * KILLS
STEPS_A_KILL = 8  # a child does fewer before it is killed, whatever the machine's load

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)  # as in the processes that are killed


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if torch.is_tensor(value):
        return {name: value}
    return {key: tensor for part in value for key, tensor in tensors(value[part], f"{name}/{part}").items()}


@pytest.mark.timeout(2 * TIMEOUT_S + 100)
@pytest.mark.parametrize("mc", [0, 1])
def test_soak_training_killed_many_times_equals_uninterrupted(tmp_path: Path, mc: int) -> None:
    steps = STEPS_A_KILL * KILLS
    settings = {"num_iterations": steps, "save_every": 2, "eval_every": steps // 2}
    given = [f"{name}={value}" for name, value in settings.items()]
    said = start(tmp_path, "killed", f"mc={mc}", f"kills={KILLS}", f"seed={3 + mc}", *given, timeout_s=TIMEOUT_S)
    train_here((make_mc_task if mc else make_task)(tmp_path, "whole", **settings))
    assert said.count(": killed in a write\n") == KILLS // 2, said
    assert said.count(": killed\n") == KILLS // 2, said
    assert f"finished=True step={steps}" in said
    assert len(losses(tmp_path, "whole")) == steps
    killed, whole = (list(map(deterministic, records(tmp_path, run))) for run in ("killed", "whole"))
    assert killed == whole
    assert rows(tmp_path, "killed") == rows(tmp_path, "whole")
    expected = RowOrder(ShardSet.open(str(tmp_path / "train")).num_rows, 5).rows(0, steps * 4).reshape(steps, 4)
    assert rows(tmp_path, "whole") == expected.tolist()
    mine, theirs = (saved_at(tmp_path, run, steps) for run in ("killed", "whole"))
    for part in ("model", "optimizer"):
        one, other = tensors(getattr(mine, part)), tensors(getattr(theirs, part))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()}
