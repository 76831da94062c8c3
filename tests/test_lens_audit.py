"""The lens audit: ranks equal a slow count, a lens that knows scores 1, and a lens must look at the query."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_memory import TAIL, make_model, make_windows, save_run

from jobs import lens_audit as audit_job
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.eval import counterfactual, lens_audit
from megacontext.model.gpt import GPT
from megacontext.telemetry import report


def test_audit_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = make_model(), make_windows()
    result = lens_audit.audit(model, windows, budget=40, tail=TAIL)
    assert [row.scorer for row in result.rows] == ["ours", "lens only", "routing only"]
    assert result.best.value >= result.rows[0].picked.value
    assert result.best.value >= result.mean.value
    assert result.rows[0].change.value > 0  # M5: an old entry's score depends on the query
    assert -1 <= result.rows[0].corr_ahead.value <= 1
    assert result.windows == 4

    class Oracle:
        """Scores by the measured utilities of the window it is asked about; blind to a foreign tail."""

        def __init__(self, model: GPT, tree: Tree, tail: int, **_: Any) -> None:
            self.model, self.tree = model, tree

        def __call__(self, context: WorkingContext) -> np.ndarray:
            ids = self.tree.ids(0, self.tree.tokens).numpy()
            own = [k for k in range(len(windows)) if np.array_equal(windows.history(k), ids)]
            scores = np.zeros(len(context))
            if own:
                found = counterfactual.entry_utilities(
                    self.model, self.tree, context, windows.continuation(own[0]), TAIL
                )
                scores[found.item] = found.ahead / np.abs(found.ahead).max()
            return scores

    monkeypatch.setattr(lens_audit, "LensScorer", Oracle)
    (row,) = lens_audit.audit(model, windows, budget=40, tail=TAIL, scorers={"oracle": (True, True)}).rows
    assert row.corr_ahead.value == pytest.approx(1.0)
    assert row.picked.value == pytest.approx(result.best.value)
    assert math.isnan(row.corr_other_query.value)  # constant scores have no order


def test_the_other_query_is_of_another_document_or_the_next_about_the_same() -> None:
    windows = make_windows()
    assert windows.document.tolist() == [0, 0, 1, 1]
    assert lens_audit._elsewhere(windows) == [2, 2, 0, 0]
    assert lens_audit.next_question(windows) == [1, 0, 3, 2]
    alone = replace(windows, document=np.zeros(4, np.int64))
    assert lens_audit._elsewhere(alone) == [1, 2, 3, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12), st.integers(0, 99))
def test_spearman_against_a_slow_one(values: list[int], seed: int) -> None:
    others = np.random.default_rng(seed).integers(-3, 3, len(values)).tolist()

    def slow(column: list[int]) -> list[float]:
        return [sum(o < v for o in column) + (sum(o == v for o in column) + 1) / 2 for v in column]

    assert lens_audit.ranks(np.array(values, float)).tolist() == slow(values)
    found = lens_audit.spearman(values, others)
    if len(set(values)) == 1 or len(set(others)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(slow(values), slow(others))[0, 1])


def test_bad_requests_are_user_errors() -> None:
    model, windows = make_model(), make_windows()
    with pytest.raises(UserError, match="nothing to compare"):
        lens_audit.audit(model, windows, budget=200, tail=TAIL)
    with pytest.raises(UserError, match="a tail of 80 tokens"):
        lens_audit.audit(model, windows, budget=40, tail=80)
    model.memory = None
    with pytest.raises(UserError, match="no lens to audit"):
        lens_audit.audit(model, windows, budget=40, tail=TAIL)


def test_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, out = save_run(tmp_path), tmp_path / "lens.json"
    flags = ["--checkpoint", str(run_dir), "--docs", str(tmp_path / "book.txt"), "--device", "cpu"]
    audit_job.main([*flags, "--budget", "48", "--history", "128", "--horizon", "8", "--tail", "8", "--windows", "3",
                    "--json", str(out)])  # fmt: skip
    result = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert [row["scorer"] for row in result["rows"]] == ["ours", "lens only", "routing only"]
    assert result["best"]["value"] >= result["rows"][0]["picked"]["value"]
    assert "rank corr. ahead" in capsys.readouterr().out
    numbers = report.write_report(str(run_dir)).numbers
    assert numbers["lens_audit/corr_ahead"] == result["rows"][0]["corr_ahead"]["value"]
    with pytest.raises(SystemExit, match="no lens to audit"):
        audit_job.main(["--checkpoint", str(save_run(tmp_path / "plain", memory=False)), *flags[2:], "--history", "128",
                        "--budget", "48", "--tail", "8"])  # fmt: skip
