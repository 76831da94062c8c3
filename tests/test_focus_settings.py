"""Focus settings: a checkpoint holds defaults, every use of the model overrides them, and nothing is trained again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_memory import save_run

import megacontext as mc
from megacontext.checkpoint import load_checkpoint
from megacontext.config import FocusConfig
from megacontext.errors import UserError
from megacontext.eval.methods import History, Prompt, layout
from megacontext.inference.session_options import options_of_flags

BUDGET, TAIL = 48, 8
CHANGED = {"allocator_expand_threshold": 0.9, "mc_infer_allocator_iterations": 1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path)


def entries_of_a_session(run: Path, focus: dict[str, Any], **options: Any) -> list[tuple[int, int]]:
    model, tokenizer = mc.load(run, focus=focus)
    with mc.Session(model, tokenizer, **{"budget": BUDGET, "recent_tokens": TAIL, **options}) as session:
        ids = np.random.default_rng(0).integers(0, 280, 500)
        session.append(ids[:470])
        session.append(ids[470:])
        session.refocus()
        return session.entries


def entries_of_ours(run: Path, focus: dict[str, Any]) -> list[tuple[int, int]]:
    model, _ = mc.load(run, focus=focus)
    ids = np.random.default_rng(0).integers(0, 280, 500)
    history = History(model, ids[:470])
    layout("ours", Prompt(history, ids[:9]), BUDGET, TAIL)  # another question about the history leaves nothing behind
    return layout("ours", Prompt(history, ids[470:]), BUDGET, TAIL).context.entries


def test_what_is_measured_is_what_a_session_does(run: Path) -> None:
    for focus in ({}, CHANGED, {"search_blocks": 1, "scarcity": 0.0}):
        assert entries_of_ours(run, focus) == entries_of_a_session(run, focus)


def test_a_focus_setting_changes_the_context_without_training(run: Path) -> None:
    assert entries_of_a_session(run, CHANGED) != entries_of_a_session(run, {})
    assert entries_of_a_session(run, {}, **options_of_flags({**CHANGED, "mc_eval_soft_max_length": BUDGET})) == (
        entries_of_a_session(run, CHANGED)
    )
    assert mc.load(run)[0].focus == FocusConfig()
    assert mc.load(run, focus=CHANGED)[0].focus == replace(FocusConfig(), **CHANGED)
    with pytest.raises(UserError, match="wings is no focus setting; there are mc_eval_soft_max_length"):
        mc.load(run, focus={"wings": 2})


def test_flags_are_options_of_a_session() -> None:
    assert options_of_flags({}) == {"budget": None}
    assert options_of_flags({"mc_eval_soft_max_length": 0, "allocator_recent_tokens": 8}) == {
        "budget": None, "recent_tokens": 8,
    }  # fmt: skip
    flags = {
        "mc_eval_soft_max_length": 9,
        "mc_infer_allocator_iterations": 2,
        "allocator_type": "greedy",
        "scarcity": 1.0,
    }
    assert options_of_flags(flags) == {"budget": 9, "iterations": 2, "allocator_type": "greedy", "scarcity": 1.0}


@pytest.mark.parametrize(
    ("stored", "share", "routes"), [(True, 0.0, True), (False, 0.25, False), (None, 0.25, True), (None, 0.0, False)]
)
def test_whether_the_router_is_used_is_stored_with_what_trained_it(
    run: Path, stored: bool | None, share: float, routes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of before has no such entry; the share of recall tasks says it then."""
    real = load_checkpoint(str(run / "checkpoints" / "megacontext_base_000001"), with_optimizer=False)
    meta = {**real.meta, "memory_config": {**real.meta["memory_config"], "mc_recall_share": share}}
    meta = {key: value for key, value in meta.items() if key != "router_trained"}
    meta |= {} if stored is None else {"router_trained": stored}
    monkeypatch.setattr("megacontext.api.load_checkpoint", lambda *_, **__: replace(real, meta=meta))
    memory = mc.load(run)[0].memory
    assert memory is not None
    assert memory.routes == routes
