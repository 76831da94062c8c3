"""Language modelling by method: losses equal single forward passes, figures equal their definitions, the job and its card."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from tiny_memory import BLOCK, HORIZON, TAIL, make_model, make_windows, save_run

from jobs import memory_eval
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.errors import DataError, UserError
from megacontext.eval import memory
from megacontext.eval.bootstrap import Resampler
from megacontext.eval.counterfactual import block_utilities
from megacontext.eval.decode_cost import DecodeCost, decode_cost
from megacontext.eval.memory import Settings
from megacontext.eval.memory_card import memory_plot, memory_table
from megacontext.eval.methods import choose_methods
from megacontext.model.flops import decode_flops_per_token
from megacontext.model.gpt import GPT
from megacontext.telemetry import report

BUDGET, HISTORY = 40, 80


def settings(model: GPT, **overrides: object) -> Settings:
    found = Settings(budget=BUDGET, tail=TAIL, methods=choose_methods(model, []), full_tokens=64, block_size=BLOCK,
                     oracle_blocks=6, timing_windows=1)  # fmt: skip
    return replace(found, **overrides)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured() -> tuple[GPT, memory.Measured]:
    model = make_model()
    return model, memory.measure(model, make_windows(), HISTORY, settings(model))


def raw_losses(model: GPT, text: np.ndarray, seen: int) -> np.ndarray:
    """Losses of the last HORIZON tokens of a text whose last `seen` tokens are shown, as the vanilla model says them."""
    given = torch.from_numpy(text)[None]
    x = model.embed(given)[:, -seen:]  # the token before the first shown one is known to the token shift alone
    with torch.no_grad():
        hidden = model.trunk(x, model.rotary_table.slice(0, seen, given.device))
        log = model.head(hidden).double().log_softmax(-1)[0]
    return np.array([-log[seen - 1 - back, text[-back]].item() for back in range(HORIZON, 0, -1)])


def test_window_and_full_are_the_vanilla_model_on_the_newest_tokens(measured: tuple[GPT, memory.Measured]) -> None:
    model, found = measured
    windows = make_windows()
    assert list(found.losses) == [
        "window",
        "sinks",
        "mean_age",
        "gist_age",
        "random",
        "bm25",
        "flat",
        "ours",
        "oracle",
        "full",
    ]
    for k in range(len(windows)):
        text = np.concatenate([windows.history(k), windows.continuation(k)])
        assert (found.losses["window"].entries[k], found.losses["full"].entries[k]) == (BUDGET, 64 - HORIZON)
        assert found.losses["full"].nll[k] == pytest.approx(raw_losses(model, text, 64), abs=1e-4)
        ends = [HISTORY + done + 1 for done in range(HORIZON)]  # the window moves on with every token
        rolled = [raw_losses(model, text[:end], BUDGET + 1)[-1] for end in ends]
        assert found.losses["window"].nll[k] == pytest.approx(rolled, abs=1e-4)
    short = memory.measure(model, windows, 32, settings(model, full_tokens=64, timing_windows=0))
    for k in range(len(windows)):
        text = np.concatenate([windows.history(k, 32), windows.continuation(k)])
        for method, losses in short.losses.items():  # 32 tokens fit the budget: everything is raw, all methods agree
            assert losses.nll[k] == pytest.approx(raw_losses(model, text, len(text)), abs=1e-4), method


def test_no_method_but_full_sees_more_than_the_budget(measured: tuple[GPT, memory.Measured]) -> None:
    _, found = measured
    for method, losses in found.losses.items():
        allowed = {"window": BUDGET, "sinks": BUDGET, "full": 64 - HORIZON}.get(method, BUDGET - HORIZON)
        assert max(losses.entries) <= allowed, method


def test_oracle_shows_the_blocks_that_measured_best(measured: tuple[GPT, memory.Measured]) -> None:
    model, found = measured
    windows = make_windows()
    tree = Tree(model.memory)
    tree.append(windows.history(2))
    room = BUDGET - HORIZON
    context = WorkingContext.initial(HISTORY, BLOCK, room, TAIL)
    every = block_utilities(model, tree, context, np.arange(HISTORY // BLOCK - 2), windows.continuation(2), TAIL, room)
    blocks = found.best_blocks[2]
    gains = every.ahead[[every.item.tolist().index(block) for block in blocks]]
    assert (np.diff(gains) <= 1e-9).all()
    assert gains[0] == every.ahead.max() or len(every.item) > 6
    first = int(blocks[0]) * BLOCK
    assert set(range(first, first + BLOCK)) <= set(found.losses["oracle"].raw[2].tolist())


def with_far_context_worth(found: memory.Measured, gap: float) -> memory.Measured:
    """The same with a `full` whose losses lie below the window's by about `gap` nats."""
    rng = np.random.default_rng(0)
    full = [nll - gap + rng.normal(0, 0.3, nll.shape) for nll in found.losses["window"].nll]
    losses = {**found.losses, "full": replace(found.losses["full"], nll=full)}
    return replace(found, losses=losses)


def test_rows_are_what_their_names_say(measured: tuple[GPT, memory.Measured]) -> None:
    model, found = measured
    found = with_far_context_worth(found, 0.5)
    windows = make_windows()
    rows = {row["method"]: row for row in memory.table_rows(found, windows, settings(model))}
    nll = {method: np.stack(losses.nll) for method, losses in found.losses.items()}
    gain = nll["window"] - nll["full"]
    key = memory.key_tokens(gain, 0.1)
    for method, row in rows.items():
        assert row["nll"] == pytest.approx(nll[method].mean())
        assert row["delta_nll"] == pytest.approx(nll[method].mean() - nll["full"].mean())
        assert row["below_window"] == pytest.approx(nll["window"].mean() - nll[method].mean())
        assert row["cgr"] == pytest.approx((nll["window"] - nll[method]).mean() / gain.mean())
        assert row["key_nll"] == pytest.approx(nll[method][key].mean())
        assert row["key_cgr"] == pytest.approx((nll["window"] - nll[method])[key].sum() / gain[key].sum())
        assert row["nll_low"] <= row["nll"] <= row["nll_high"]
    assert rows["window"]["cgr"] == 0
    assert rows["full"]["cgr"] == pytest.approx(1)
    assert rows["full"]["delta_nll"] == 0
    assert rows["bm25"]["ours_better_by"] == pytest.approx((nll["bm25"] - nll["ours"]).mean())
    low = Resampler.of(windows.document).mean((nll["bm25"] - nll["ours"]).mean(1)).low
    assert rows["bm25"]["ours_better_by_low"] == pytest.approx(low)
    assert "ours_better_by" not in rows["ours"]
    assert rows["ours"]["lens_regret"] == pytest.approx((nll["ours"] - nll["oracle"]).mean())
    shares = []
    for k, blocks in enumerate(found.best_blocks):
        raw = [set(found.losses[method].raw[k].tolist()) for method in ("oracle", "ours")]
        shown = [block for block in blocks.tolist() if block * BLOCK in raw[0]]
        shares.append(np.mean([block * BLOCK in raw[1] for block in shown]))
    assert rows["ours"]["lens_recall"] == pytest.approx(np.mean(shares))
    assert {"ms_per_token", "flops_per_token", "recompute"} <= set(rows["ours"])
    assert rows["window"]["recompute"] == rows["full"]["recompute"] == 0
    json.dumps(list(rows.values()), allow_nan=False)


def test_key_tokens_are_the_top_share_of_gains_above_zero() -> None:
    gain = np.array([[0.5, -1.0, 0.1, 0.2], [0.0, 0.3, -0.2, 0.9]])
    assert memory.key_tokens(gain, 0.25).sum() == 2
    assert memory.key_tokens(gain, 0.25)[1, 3]
    assert memory.key_tokens(gain, 1.0).sum() == 5
    assert not memory.key_tokens(-np.abs(gain), 0.5).any()


def test_far_context_says_when_there_is_nothing_to_win(measured: tuple[GPT, memory.Measured]) -> None:
    model, found = measured
    windows, chosen = make_windows(), settings(model)
    worth = with_far_context_worth(found, 0.5)
    far = memory.far_context(worth, windows, chosen)
    gain = np.stack(worth.losses["window"].nll) - np.stack(worth.losses["full"].nll)
    assert far["gap"] == pytest.approx(gain.mean())
    assert far["clear"]
    key = memory.key_tokens(gain, 0.1)
    assert far["share_of_gap"] == pytest.approx(gain[key].sum() / gain.sum())
    assert (far["key_share"], far["key_gap"]) == pytest.approx((key.mean(), gain[key].mean()))
    worse = with_far_context_worth(found, -0.5)
    none = memory.far_context(worse, windows, chosen)
    assert none["gap"] < 0
    assert not none["clear"]
    assert none["share_of_gap"] is None
    rows = memory.table_rows(worse, windows, chosen)
    assert {row["cgr"] for row in rows} == {None}  # nothing to share out
    for losses in (worth, worse):
        result = {
            "config": {"budget": BUDGET, "horizon": HORIZON, "windows": 4, "documents": 2},
            "far_context": [memory.far_context(losses, windows, chosen)],
            "rows": memory.table_rows(losses, windows, chosen),
        }
        assert ("say much" in memory_table(result)) == (losses is worse)
        assert memory_plot(result)[:4] == b"\x89PNG"


def test_cost_of_decoding_counts_what_an_edit_invalidates() -> None:
    model, windows = make_model(), make_windows()
    ids, following = windows.history(0), windows.continuation(0)
    full = decode_cost(model, "full", ids, following, 70, TAIL, BLOCK)
    assert full.recompute == 0
    assert full.flops == decode_flops_per_token(model.config, 70)
    assert full.build_ms == 0
    ours = decode_cost(model, "ours", ids, following, BUDGET - HORIZON, TAIL, BLOCK)
    assert 0 < ours.recompute <= (BUDGET - HORIZON) / HORIZON
    assert ours.flops > decode_flops_per_token(model.config, BUDGET - HORIZON)
    assert ours.ms > ours.choose_ms > 0
    typical = DecodeCost.typical([ours, replace(ours, ms=ours.ms * 9), replace(ours, ms=ours.ms * 5)])
    assert typical.ms == pytest.approx(ours.ms * 5)


def test_substitution_is_reported_by_distance() -> None:
    model, windows = make_model(), make_windows()
    found = memory.substitution(model, windows, settings(model), 2, blocks=4)
    assert [part["blocks_back"] for part in found] == sorted((part["blocks_back"] for part in found), reverse=True)
    assert found[-1]["blocks_back"] == 2
    assert all(part["kl"] > 0 for part in found)
    assert memory.substitution(model, windows, settings(model), 0) == []


def test_sizes_that_do_not_fit_are_user_errors() -> None:
    model = make_model()
    with pytest.raises(UserError, match="no room for a raw tail of 8 tokens and a horizon of 6"):
        memory.measure(model, make_windows(), HISTORY, settings(model, budget=14))
    with pytest.raises(UserError, match="sees no more than the budget of 40"):
        memory.measure(model, make_windows(), HISTORY, settings(model, full_tokens=40))
    with pytest.raises(UserError, match="key_share is 0"):
        settings(model, key_share=0.0).check(HORIZON)


def test_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MC_OTEL_ENDPOINT", raising=False)
    run_dir = save_run(tmp_path)
    out = tmp_path / "out" / "memory.json"
    flags = ["--checkpoint", str(run_dir), "--docs", str(tmp_path / "book.txt"), "--budget", "48", "--tail", "8"]
    memory_eval.main([*flags, "--history", "256", "128", "--horizon", "8", "--windows", "4", "--json", str(out),
                      "--device", "cpu", "--oracle_blocks", "4", "--timing_windows", "1", "--substitution_windows", "1"])  # fmt: skip
    shown = capsys.readouterr().out
    result = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert [far["history"] for far in result["far_context"]] == [128, 256]
    methods = ["window", "sinks", "mean_age", "gist_age", "random", "bm25", "flat", "ours", "oracle", "full"]
    assert [row["method"] for row in result["rows"]] == methods * 2
    for name in ("nll", "delta_nll", "cgr", "key_nll", "ms_per_token", "flops_per_token", "recompute"):
        assert all(name in row for row in result["rows"])
    assert all("lens_recall" in row and "lens_regret" in row for row in result["rows"] if row["method"] == "ours")
    assert "nll_window - nll_full =" in shown
    assert "history 256 tokens" in shown
    assert "█ raw tokens" in shown
    for name in ("memory.png", "memory-timeline.png"):
        assert matplotlib.image.imread(out.parent / name).shape[1] > 1000
    written = report.write_report(str(run_dir))
    ours = result["rows"][-3]
    for name in ("delta_nll", "cgr", "key_nll", "lens_recall", "lens_regret"):
        assert written.numbers.get(f"memory_eval/eval/{name}") == ours[name]
    assert written.numbers["memory_eval/runtime/recompute_tokens_per_token"] == ours["recompute"]
    assert 0 <= written.numbers["memory_eval/runtime/swap_rate"] <= 1
    assert written.plots == ["memory_eval.png", "memory_eval_timeline.png"]
    assert memory_table(result).split("\n")[0] in (run_dir / "report" / "report.md").read_text()


@pytest.mark.parametrize("path", ["runs/a", "runs/a/checkpoints", "runs/a/checkpoints/megacontext_base_000001/"])
def test_the_run_of_a_checkpoint(tmp_path: Path, path: str) -> None:
    (tmp_path / "runs/a/checkpoints/megacontext_base_000001").mkdir(parents=True)
    assert report.run_of_checkpoint(str(tmp_path / path)) == str(tmp_path / "runs/a")
    assert report.run_of_checkpoint(str(tmp_path / "base_checkpoints" / "d1")) is None


def test_a_model_without_a_memory_takes_blocks_of_any_size(tmp_path: Path) -> None:
    run_dir, out = save_run(tmp_path, memory=False), tmp_path / "memory.json"
    flags = ["--checkpoint", str(run_dir), "--docs", str(tmp_path / "book.txt"), "--device", "cpu", "--json", str(out)]
    entries = []
    for block_size in ("4", "8"):
        memory_eval.main([*flags, "--budget", "48", "--tail", "8", "--history", "128", "--horizon", "8", "--windows", "2",
                          "--methods", "mean_age", "--block_size", block_size, "--timing_windows", "0"])  # fmt: skip
        result = json.loads(out.read_text())
        assert result["config"]["block_size"] == int(block_size)
        entries.append(next(row["entries"] for row in result["rows"] if row["method"] == "mean_age"))
    assert entries[0] != entries[1]


def test_bad_requests_of_the_job(tmp_path: Path) -> None:
    flags = ["--checkpoint", str(save_run(tmp_path, memory=False)), "--device", "cpu", "--budget", "48",
             "--block_size", "8", "--horizon", "8"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"DataError: --docs .* does not exist"):
        memory_eval.main([*flags, "--docs", str(tmp_path / "none")])
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="hold 0 windows"):
        memory_eval.main([*flags, "--docs", str(tmp_path / "short.txt")])
    with pytest.raises(SystemExit, match="'ours' needs a model that was trained with --mc"):
        memory_eval.main([*flags, "--docs", "x", "--methods", "ours"])
    with pytest.raises(SystemExit, match="--oracle_blocks is 0"):
        memory_eval.main([*flags, "--docs", "x", "--methods", "oracle", "--oracle_blocks", "0"])
    with pytest.raises(
        SystemExit, match=r"--budget 48 is too small for histories of up to 600 tokens: a raw tail of 30"
    ):
        memory_eval.main([*flags, "--docs", "x", "--history", "600", "--tail", "30"])
    with pytest.raises(SystemExit) as unknown:
        memory_eval.main([*flags, "--doc", "x"])
    assert unknown.value.code == 2
    assert issubclass(DataError, UserError)
    assert math.isnan(Resampler.of([0]).ratio([0.0], [0.0]).value)
