"""The allocator's decisions, replayed: scores in, edits out, as they are kept in `allocator_decisions.json`.

The oracle of test_allocator.py proves the rules of one round; this file shows when the policy as a whole has changed.
After a change that is meant: python tests/test_allocator_replay.py, and say in the commit what it changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from allocators import allocator_config

from megacontext.context.allocator import FocusAllocator
from megacontext.context.working_context import WorkingContext

KEPT = Path(__file__).with_name("allocator_decisions.json")
CASES: dict[str, dict[str, Any]] = {
    "greedy": dict(budget=40),
    "stochastic": dict(budget=40, allocator_type="stochastic_greedy", seed=3),
    "one edit": dict(budget=64, max_replacements=1, iterations=1),
    "deep": dict(budget=36, iterations=8, max_replacements=8, cooldown=1, max_lod=2),
    "wide thresholds": dict(budget=48, expand_threshold=0.5, collapse_threshold=0.6),
}


def scores_of(refocus: int) -> Callable[[WorkingContext], np.ndarray]:  # type: ignore[type-arg]
    """Scores that depend on the node and the number of the refocus alone: one place is wanted, which moves slowly."""

    def score(context: WorkingContext) -> np.ndarray:  # type: ignore[type-arg]
        noise = (context.lod * 7919 + context.index * 104_729 + refocus // 2 * 15_485_863) % 1009 / 1009
        near = 1 / (1 + np.abs(context.positions - 37 * (1 + refocus // 3)) / 16)
        return 0.6 * noise - 0.8 + 1.2 * near

    return score


def decisions(settings: dict[str, Any]) -> list[list[list[tuple[int, int]]]]:
    """Of each refocus the nodes (lod, index) that it took out of the context, and those that it put in."""
    allocator = FocusAllocator(allocator_config(recent_tokens=8, **settings))
    context = WorkingContext.all_raw(0, 4)
    found = []
    for refocus in range(8):
        context = allocator.extend(context, 96 if refocus == 0 else 12)
        before = context
        context, _ = allocator.refocus(context, scores_of(refocus), headroom=3)
        found.append([sorted(set(a.entries) - set(b.entries)) for a, b in ((before, context), (context, before))])
    return found


@pytest.mark.parametrize("case", CASES)
def test_decisions_are_those_that_were_kept(case: str) -> None:
    kept = json.loads(KEPT.read_text())[case]
    for refocus, (now, before) in enumerate(zip(decisions(CASES[case]), kept, strict=True)):
        assert [[list(node) for node in part] for part in now] == before, f"refocus {refocus}"


def test_the_cases_show_different_policies_that_all_edit() -> None:
    kept = json.loads(KEPT.read_text())
    assert kept.keys() == CASES.keys()
    assert len({json.dumps(case) for case in kept.values()}) == len(CASES)
    assert all(any(removed for removed, _ in case[1:]) for case in kept.values())


if __name__ == "__main__":
    rows = {case: [json.dumps(refocus, separators=(",", ":")) for refocus in decisions(CASES[case])] for case in CASES}
    parts = [f"{json.dumps(case)}: [\n" + ",\n".join(lines) + "\n]" for case, lines in rows.items()]
    KEPT.write_text("{\n" + ",\n".join(parts) + "\n}\n")
