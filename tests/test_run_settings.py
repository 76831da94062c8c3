"""A run's settings: later jobs take them over, a stage made with others is refused or runs again, nothing overwrites them."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_pipeline import MODEL, arguments, run_pipeline, where

from jobs import base_eval, base_train, prepare_data, speedrun, training
from jobs.runtime import cli, run_settings
from jobs.runtime.stage import run_stage
from megacontext.config import TrainConfig
from megacontext.errors import CheckpointError, DataError, UserError
from megacontext.flags import free_flags
from megacontext.stages import BASE, BASE_EVAL, PREPARE_DATA, PREPARE_TEXT, TOK_TRAIN
from megacontext.telemetry.report import read_stage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base folder of a finished run `mine`."""
    base = tmp_path_factory.mktemp("made")
    run_pipeline(base)
    return base


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """A copy of it. Text, tokenizer and token shards are found by the path of the text, which stays that of the original."""
    shutil.copytree(made, tmp_path / "base")
    return tmp_path / "base"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted(job: Any) -> tuple[Any, list[str]]:
    """A job that does nothing, and the list to which each of its runs is added."""
    runs: list[str] = []

    def work(args: cli.Args) -> dict[str, Any]:
        runs.append(job.name)
        return {f"{job.name}/value": len(runs)}

    return replace(job, run=work), runs


def test_a_finished_run_is_skipped_whatever_cannot_change_a_result(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(base / "runs" / "mine" / "checkpoints")
    free = ["--device_batch_size=4", "--save_every=1", "--keep_checkpoints=9", "--log_every=1", "--verify_shards=0",
            "--cpus_per_worker=1", "--max_failures=0", "--compile=off", "--mc_infer_refocus_interval=5"]  # fmt: skip
    speedrun.pipeline(arguments(base, *free))
    assert capsys.readouterr().out.count("complete, skipped") == len(speedrun.JOBS)
    assert content(base / "runs" / "mine" / "checkpoints") == before


def test_every_setting_of_training_is_compared_but_the_free_ones() -> None:
    assert free_flags(TrainConfig, BASE) == {
        "eval_every", "eval_tokens", "sample_every", "save_every", "keep_checkpoints", "log_every", "log_rows", "stream",
        "device_batch_size",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--depth=2"], "base_train.*--depth was 1, is 2"),
        (["--seed=7", "--matrix_lr=0.5"], "--seed was 1337, is 7; --matrix_lr was 0.02, is 0.5"),
        (["--num_iterations=5"], "--num_iterations was 3, is 5"),
        (["--max_minutes=1"], "--max_minutes was 7.0, is 1.0"),
        (["--mc"], "--mc was 0, is 1"),
        (["--dtype=fp32"], "--dtype was 'auto', is 'fp32'"),
        (["--vocab_size=300"], "tok_train.*--vocab_size was 280, is 300"),
        (["--tok_doc_cap=99"], "tok_train.*--tok_doc_cap was 10000, is 99"),
        (["--max_seq_len=32"], "prepare_data.*--max_seq_len was 64, is 32"),
        (["--data_dir=elsewhere"], r"prepare_text.*the text \(--data_dir.*\) was 'text-.*', is 'elsewhere-"),
    ],
)
def test_a_training_with_other_settings_is_refused_before_any_work(base: Path, flags: list[str], named: str) -> None:
    before = content(base)
    with pytest.raises(UserError, match=named) as caught:
        speedrun.pipeline(arguments(base, *flags))
    assert "Leave these flags out" in str(caught.value)
    assert "another --run" in str(caught.value)
    assert content(base) == before


def test_a_training_under_way_is_bound_to_its_settings_too(base: Path) -> None:
    (base / "runs" / "mine" / "stages" / "base_train.json").unlink()
    with pytest.raises(UserError, match=r"base_train of run 'mine' used other settings: --max_minutes was 7.0, is 3.0"):
        training.start(base_train.JOB, arguments(base, "--max_minutes=3"))
    (base / "runs" / "mine" / "stages" / "prepare_data.json").unlink()
    with pytest.raises(UserError, match=r"base_train of run 'mine' used other settings: --max_seq_len was 64, is 32"):
        run_stage(prepare_data.JOB, arguments(base, "--max_seq_len=32"))
    shutil.rmtree(base / "runs" / "mine" / "checkpoints")
    job, runs = counted(base_train.JOB)  # nothing is left that was trained: other settings may be tried
    run_stage(job, arguments(base, "--matrix_lr=0.5"))
    assert runs
    assert arguments(base).train.matrix_lr == 0.5


def test_an_evaluation_runs_again_with_other_settings_or_another_checkpoint(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, runs = counted(base_eval.JOB)
    run_stage(job, arguments(base))
    assert not runs
    run_stage(job, arguments(base, "--sample_tokens=3"))
    assert len(runs) == 1
    assert "base_eval: runs again, because --sample_tokens was 2, is 3" in capsys.readouterr().out
    run_stage(job, arguments(base))  # sample_tokens of the run is 3 now
    assert len(runs) == 1
    run_stage(job, arguments(base, "--eval_tokens=99"))
    assert len(runs) == 2
    manifest = next((base / "runs" / "mine" / "checkpoints").iterdir()) / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    run_stage(job, arguments(base, "--eval_tokens=99"))
    assert len(runs) == 3
    assert "--checkpoint was" in capsys.readouterr().out


def test_a_bundle_that_does_not_exist_is_refused_and_the_old_result_stays(base: Path) -> None:
    before = content(base)
    bundle = base / "nowhere"
    with pytest.raises(DataError, match="nowhere"):
        run_stage(base_eval.JOB, arguments(base, f"--eval_bundle={bundle}"))
    with pytest.raises(DataError, match="nowhere"):
        speedrun.pipeline(arguments(base, f"--eval_bundle={bundle}", run="another"))  # before the first stage
    assert content(base) == before


def test_a_stage_whose_output_is_gone_runs_again(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(base / "tokens")
    shutil.rmtree(base / "runs" / "mine" / "checkpoints")
    for job, again in ((prepare_data.JOB, True), (base_train.JOB, True), (speedrun.JOBS[1], False)):
        job, runs = counted(job)
        run_stage(replace(job, ready=lambda args: None), arguments(base))
        assert bool(runs) == again, job.name
    assert "prepare_data: runs again, because what it made is not there any more" in capsys.readouterr().out


def test_results_of_earlier_versions_hold_no_settings(base: Path) -> None:
    for path in (base / "runs" / "mine" / "stages").iterdir():
        result = json.loads(path.read_text())
        path.write_text(json.dumps({name: result[name] for name in ("stage", "seconds", "flops", "metrics", "text")}))
    run_stage(base_train.JOB, arguments(base))
    with pytest.raises(CheckpointError, match=r"matrix_lr was 0\.02, is 0\.5"):
        run_stage(base_train.JOB, arguments(base, "--matrix_lr=0.5"))
    with pytest.raises(CheckpointError, match="3 steps and 9 are asked for"):
        run_stage(base_train.JOB, arguments(base, "--num_iterations=9"))
    job, runs = counted(base_eval.JOB)
    run_stage(job, arguments(base))
    assert runs


# config.yaml


def test_a_later_job_takes_the_settings_of_the_run(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = cli.parse(base_eval.SECTIONS, None, where(base))
    now = cli.flat_values(args)
    assert {name: now[name] for name in MODEL} == MODEL
    assert args.run.tier == "cpu"
    assert args.data.data_dir.endswith("/text")
    cli.print_config(args, base_eval.SECTIONS)
    assert "from config.yaml of the run: data_dir=" in capsys.readouterr().out
    given = cli.parse(base_eval.SECTIONS, None, [*where(base), "--max_seq_len=99"])
    assert given.data.max_seq_len == 99


def test_flag_over_run_over_tier_over_default(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "r"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({
        "stages": ["base_train"], "run": {"tier": "5090", "num_workers": 7, "launcher": "local", "device": "cuda", "seed": 3},
        "model": {"depth": 6}, "train": {"matrix_lr": 1},
    }))  # fmt: skip
    args = cli.resolve({"base_dir": str(tmp_path), "run": "r", "seed": 4})
    assert (args.run.seed, args.model.depth, args.train.device_batch_size, args.train.total_batch_size) == (
        4,
        6,
        16,
        524288,
    )
    assert args.train.matrix_lr == 1
    assert args.run.tier == "5090"
    assert (args.run.num_workers, args.run.launcher, args.run.device) == (0, "ray", "auto"), "where and how a job runs"
    assert args.inherited == {"depth": 6, "matrix_lr": 1, "tier": "5090"}
    assert cli.resolve({"base_dir": str(tmp_path), "run": "other", "tier": "cpu"}).model.depth == 4


def test_an_evaluation_never_changes_what_training_recorded(base: Path) -> None:
    path = base / "runs" / "mine" / "config.yaml"
    before, provenance = yaml.safe_load(path.read_text()), (base / "runs" / "mine" / "provenance.json").read_bytes()
    job, runs = counted(base_eval.JOB)
    run_stage(
        job, arguments(base, "--eval_tokens=99", "--device_batch_size=1", "--core_max_per_task=7", "--dtype=fp32")
    )
    assert runs
    after = yaml.safe_load(path.read_text())
    assert after["eval"].pop("core_max_per_task") == 7
    before["eval"].pop("core_max_per_task")
    assert after == before
    assert (base / "runs" / "mine" / "provenance.json").read_bytes() == provenance


def test_a_job_that_cannot_begin_writes_nothing(tmp_path: Path) -> None:
    args = cli.resolve(
        {"base_dir": str(tmp_path), "tier": "cpu", "run": "new", "depth": 3, "data_dir": str(tmp_path / "no")}
    )
    for job in speedrun.JOBS:
        with pytest.raises((CheckpointError, DataError)):
            run_stage(job, args)
    assert content(tmp_path) == {}


def test_a_stage_records_what_it_reads_and_no_more(tmp_path: Path) -> None:
    values = cli.flat_values(cli.resolve({"base_dir": str(tmp_path), "tier": "cpu", "run": "r"}))
    run_settings.record(str(tmp_path / "r"), PREPARE_TEXT, values)
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text()) == {
        "stages": ["prepare_text"], "run": {"tier": "cpu"}, "data": {"data_dir": "", "data_shards": 0},
    }  # fmt: skip
    run_settings.record(str(tmp_path / "r"), BASE, values | {"depth": 5})
    known = run_settings.read(str(tmp_path / "r"))
    assert known.values["depth"] == 5
    assert known.values["mc"] == 0
    assert "block_size" not in known.values, "without a memory nobody reads its settings"
    run_settings.record(str(tmp_path / "r"), PREPARE_DATA, values | {"max_seq_len": 9})
    assert run_settings.read(str(tmp_path / "r")).values["max_seq_len"] == 512, "training ranks above preparation"


def test_jobs_at_once_lose_no_setting(tmp_path: Path) -> None:
    values = cli.flat_values(cli.resolve({"base_dir": str(tmp_path), "tier": "cpu", "run": "r"}))
    stages = [PREPARE_TEXT, TOK_TRAIN, PREPARE_DATA, BASE, BASE_EVAL] * 4
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda stage: run_settings.record(str(tmp_path / "r"), stage, values), stages))
    known = run_settings.read(str(tmp_path / "r"))
    assert list(known.stages) == [stage.name for stage in stages[:5]]
    assert known.values.keys() >= {"data_dir", "vocab_size", "max_seq_len", "depth", "eval_bundle"}


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\xfe\x00garbage", b"model: {depth", b"- 1\n- 2\n", b"stages: 3\n", b"model: 3\n", b"model: {depth: four}\n",
     b"model: {depth: 0}\n", b"run: {tier: huge}\n", b"train: {matrix_lr: .nan}\n", b"[" * 3000],
)  # fmt: skip
def test_a_damaged_config_names_itself_and_the_remedy(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "runs" / "r").mkdir(parents=True)
    path = tmp_path / "runs" / "r" / "config.yaml"
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"runs/r/config\.yaml.* is damaged: .*Restore it, or remove it") as caught:
        cli.resolve({"base_dir": str(tmp_path), "run": "r", "tier": "cpu"})
    assert len(str(caught.value)) < 600
    assert path.read_bytes() == damage


def test_config_of_an_earlier_version_opens(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names no stages, may hold values of a job that did not read them, and settings that are no more."""
    path = base / "runs" / "mine" / "config.yaml"
    old = yaml.safe_load(path.read_text())
    del old["stages"]
    old["model"]["depth"] = 4
    old["memory"]["mc_of_the_past"] = 1
    path.write_text(yaml.safe_dump(old))
    (base / "runs" / "mine" / "stages" / "base_train.json").unlink()
    args = arguments(base, "--depth=1")  # what a checkpoint was made with decides, not the old file
    assert "no setting mc_of_the_past; left out" in capsys.readouterr().out
    job, runs = counted(base_train.JOB)
    run_stage(job, args)
    assert runs
    assert run_settings.read(str(base / "runs" / "mine")).values["depth"] == 1


# A model taken over


def test_the_settings_state_the_shape_of_the_model_taken_over(base: Path) -> None:
    source = base / "runs" / "mine"
    run_pipeline(
        base, f"--init_from={source}", "--vocab_size=280", "--depth=1", "--width=0", "--num_iterations=1", run="next"
    )
    known = run_settings.read(str(base / "runs" / "next")).values
    assert (known["depth"], known["width"], known["vocab_size"], known["n_kv_head"]) == (1, 32, 280, 1)
    shutil.rmtree(source)
    args = cli.parse(base_eval.SECTIONS, None, where(base, "next"))  # the copy in the run says the shape now
    assert (args.model.depth, args.model.width, args.data.vocab_size) == (1, 32, 280)
    assert args.run.init_from == str(source)


@pytest.mark.parametrize(("name", "value"), [("depth", 2), ("width", 64), ("vocab_size", 300), ("token_shift", 1)])
def test_a_flag_that_contradicts_the_model_taken_over_is_refused(made: Path, name: str, value: int) -> None:
    given = {"base_dir": str(made), "run": "next", "tier": "cpu", "init_from": str(made / "runs" / "mine"), name: value}
    with pytest.raises(
        UserError, match=rf"--{name} is {value}, and the model of --init_from .* has \d+.*leave --{name} out"
    ):
        cli.resolve(given)


# Results of stages


@pytest.mark.parametrize(
    "damage",
    [b"", b"garbage", b"\xff\xff", b"[]", b"null", b"3", b"{}", b'{"seconds": 1, "metrics": []}', b"[" * 200_000,
     b'{"seconds": "long", "metrics": {}}', b'{"seconds": 1, "metrics": {"a": "b"}}', b'{"seconds": 1, "metrics": {}, "text": 3}',
     b'{"seconds": 1, "metrics": {}, "settings": [1]}'],
)  # fmt: skip
def test_a_damaged_stage_result_names_itself_and_the_remedy(base: Path, damage: bytes) -> None:
    from megacontext.telemetry import report

    run_dir = base / "runs" / "mine"
    path = run_dir / "stages" / "base_eval.json"
    path.write_bytes(damage)
    job, runs = counted(base_eval.JOB)
    for work in (lambda: run_stage(job, arguments(base)), lambda: report.write_report(str(run_dir))):
        with pytest.raises(
            UserError, match=r"base_eval\.json.* is damaged: .*Remove the file; the stage then runs again"
        ):
            work()
    path.unlink()
    run_stage(job, arguments(base))
    assert runs
    assert read_stage(str(run_dir), "base_eval") is not None
