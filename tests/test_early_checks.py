"""What can be known to be wrong is said before any work: impossible settings, missing GPUs and keys, mistyped flags."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import without

from jobs import base_train, chat_cli, recall_eval, run10, run1000, speedrun
from jobs.runtime import checks, cli, hardware, run_settings
from jobs.runtime.run_settings import FLAGS as SETTINGS
from jobs.runtime.run_settings import SECTIONS
from megacontext import precision
from megacontext.config import TIERS, RunConfig, TrainConfig
from megacontext.errors import UserError
from megacontext.flags import own_fields
from megacontext.stages import PREPARE_TEXT
from megacontext.train.sizing import Pace, describe

CPU = ["--tier=cpu", "--wandb=off"]


@pytest.fixture(autouse=True)
def no_gpu_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, outside of Ray, torchrun and W&B."""
    for name in ("RAY_ADDRESS", "WORLD_SIZE", "RANK", "WANDB_API_KEY", "WANDB_MODE", "MEGACONTEXT_ENABLE_WANDB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "_local_gpus", lambda: 0)


def refusal(base: Path, *flags: str, main: Any = speedrun.main) -> str:
    """The message with which a command is refused; it must have made nothing, in two lines or less."""
    with pytest.MonkeyPatch.context() as patch, without("ray"):
        patch.setattr(sys, "argv", ["job.py", f"--base_dir={base}", *flags])
        with pytest.raises(SystemExit) as caught:
            main()
    assert not base.exists(), "something was made before the refusal"
    message = str(caught.value.code)
    assert "\n" not in message
    return message


# Numbers and names


def numeric() -> list[tuple[str, Any]]:
    return [(name, item) for name, (_, item) in SETTINGS.items() if not isinstance(item.default, str)]


@pytest.mark.parametrize(("name", "item"), numeric())
def test_every_number_has_limits(name: str, item: Any, tmp_path: Path) -> None:
    """Below the smallest, above the largest, and what is no number at all."""
    low, high, above, off = (item.metadata[key] for key in ("low", "high", "above", "off"))
    floor = low if above is None else above
    assert floor is not None, f"--{name} has no lower limit"
    whole = isinstance(item.default, int)
    wrong = [floor - 3] + ([above] if above is not None else []) + ([high + 1] if high is not None else [])
    wrong += [] if whole else [math.nan, math.inf, -math.inf]
    for value in wrong:
        assert value != off
        with pytest.raises(UserError, match=rf"--{name} is {value}; it must be "):
            cli.resolve({"tier": "cpu", "base_dir": str(tmp_path), name: value})
    if off is not None:
        cli.resolve({"tier": "cpu", "base_dir": str(tmp_path), name: off})


def test_every_tier_is_within_the_limits_and_plans_a_training(tmp_path: Path) -> None:
    for tier in TIERS:
        for memory in (0, 1):
            args = cli.resolve({"tier": tier, "base_dir": str(tmp_path), "mc": memory, "device": "cpu", "wandb": "off"})
            checks.check_training(args)


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "x" * 300, "é" * 150, "a\0b", "a\nb", "a\udcffb", "run*", "a::b"],
)  # fmt: skip
def test_names_that_cannot_be_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--run is .*; it (must not|would be|has 300 bytes)"):
        cli.resolve({"tier": "cpu", "base_dir": str(tmp_path), "run": name})


@pytest.mark.parametrize("name", ["é", "mein Lauf", "日本語", "a.b-c_d", "x" * 200, ".hidden"])
def test_names_that_can_be_a_folder_are_taken(name: str, tmp_path: Path) -> None:
    where = cli.paths(cli.resolve({"tier": "cpu", "base_dir": str(tmp_path), "run": name}))
    assert where.run_dir == f"{tmp_path}/runs/{name}"


def test_other_samples_of_the_text_have_other_folders(tmp_path: Path) -> None:
    given = {"tier": "cpu", "base_dir": str(tmp_path)}
    plain, fewer, shorter = (
        cli.paths(cli.resolve(given | more)) for more in ({}, {"tok_max_chars": 1000}, {"tok_doc_cap": 50})
    )
    assert len({where.tokenizer_dir for where in (plain, fewer, shorter)}) == 3
    assert len({where.tokens_dir for where in (plain, fewer, shorter)}) == 3
    assert plain.tokenizer_dir.endswith("-v8192"), "as before"


# Before any work


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--depth=0"], "--depth is 0; it must be a whole number of at least 1"),
        (["--width=99"], "--depth 4 with --width 99 and --n_kv_head 0 is no model"),
        (["--n_kv_head=3"], "--n_kv_head 3 is no model"),
        (["--vocab_size=100"], "--vocab_size is 100"),
        (["--total_batch_size=4097"], "--total_batch_size 4097 .* not a multiple of --max_seq_len 512"),
        (["--device_batch_size=3"], "8 rows per step cannot be shared by 1 workers with a device batch of 3"),
        (["--num_workers=3"], "8 rows per step cannot be shared by 3 workers"),
        (
            ["--mc", "--max_seq_len=64", "--total_batch_size=4096", "--block_size=64", "--routing_slots=4"],
            "no whole block of 64",
        ),
        (["--mc", "--mc_train_wc_length=9999"], "--mc_train_wc_length 9999"),
        (
            ["--mc", "--max_seq_len=64", "--block_size=4", "--routing_slots=4", "--allocator_recent_tokens=4"],
            "a fact of niah takes 5 tokens",
        ),
        (["--mc", "--vocab_size=300"], "recall tasks need 64"),
        (["--max_minutes=-1", "--target_param_data_ratio=-1"], "no training horizon"),
        (
            ["--device=cuda"],
            "--device cuda asks for a GPU, and there is none on this machine.*--device auto",
        ),
        (["--launcher=local", "--num_workers=4"], "--num_workers is 4, but --launcher local trains in 1 process"),
        (["--launcher=local", "--stream=ray"], "--stream ray needs --launcher ray"),
        (["--eval_bundle=nowhere"], "nowhere"),
        (["--init_from=nowhere"], "nowhere"),
        (["--run=../x"], "--run is '../x'"),
        (["--cpus_per_worker=-1"], "--cpus_per_worker is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(flags: list[str], named: str, tmp_path: Path) -> None:
    assert re.search(named, refusal(tmp_path / "base", *CPU, *flags))


def test_base_train_makes_the_same_checks(tmp_path: Path) -> None:
    assert "3 workers" in refusal(tmp_path / "base", *CPU, "--num_workers=3", main=base_train.main)


def test_torchrun_starts_the_processes_of_the_local_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"tier": "cpu", "base_dir": str(tmp_path), "launcher": "local", "wandb": "off", "device_batch_size": 1}
    monkeypatch.setenv("WORLD_SIZE", "4")
    checks.check_training(cli.resolve(given | {"num_workers": 4}))
    checks.check_training(cli.resolve(given))
    with pytest.raises(UserError, match=r"trains in 4 processes.*--nproc_per_node 2"):
        checks.check_training(cli.resolve(given | {"num_workers": 2}))


# GPUs


@pytest.mark.parametrize(
    ("main", "flags", "tier"),
    [
        (run10.main, ["--gpu", "h100"], "h100"),
        (run10.main, ["--gpu=5090"], "5090"),
        (run1000.main, [], "run1000"),
        (speedrun.main, ["--tier=speedrun"], "speedrun"),
        (base_train.main, ["--tier=5090"], "5090"),
    ],
)
def test_a_tier_for_gpus_says_at_once_that_there_is_none(
    main: Any, flags: list[str], tier: str, tmp_path: Path
) -> None:
    said = refusal(tmp_path / "base", *flags, main=main)
    assert f"--tier {tier} is sized for a GPU, and there is none on this machine." in said
    assert "Use --tier cpu, or submit the job to a cluster with GPUs, or insist with --device cpu" in said


def test_a_cluster_is_asked_when_the_driver_sits_on_a_machine_without_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    cluster = {"GPU": 8.0, "CPU": 64.0, "accelerator_type:H100": 1.0}
    monkeypatch.setattr(hardware, "_cluster_resources", lambda: cluster)
    given = {"base_dir": str(tmp_path), "wandb": "off"}
    assert cli.resolve(given).run.tier == "speedrun"
    args = cli.resolve(given | {"tier": "h100"})
    assert checks.worker_count(args.run) == 8
    checks.check_training(args)
    with pytest.raises(UserError, match="--num_workers 9 needs 9 GPUs, there are 8"):
        checks.worker_count(cli.resolve(given | {"tier": "h100", "num_workers": 9}).run)
    cluster["GPU"] = 1.0
    assert cli.resolve(given).run.tier == "h100"
    del cluster["accelerator_type:H100"]
    assert cli.resolve(given).run.tier == "5090"
    del cluster["GPU"]
    assert cli.resolve(given).run.tier == "cpu"
    with pytest.raises(UserError, match="none on this machine or on the Ray cluster"):
        checks.worker_count(args.run)
    with pytest.raises(UserError, match=r"none on this machine\. "):
        checks.worker_count(cli.resolve(given | {"tier": "h100", "launcher": "local"}).run)
    assert checks.worker_count(cli.resolve(given | {"tier": "h100", "device": "cpu"}).run) == 1


def test_an_address_of_the_jobs_api_is_no_cluster_to_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr(hardware, "_cluster_resources", lambda: pytest.fail("joined"))
    assert cli.resolve({"base_dir": str(tmp_path)}).run.tier == "cpu"


# W&B


def test_uploads_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    said = refusal(tmp_path / "base", "--tier=cpu", "--wandb=online")
    assert "--wandb online needs a key, and WANDB_API_KEY is not set" in said
    for mode in ("auto", "offline", "off"):
        checks.check_wandb(mode)
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40)
    netrc.chmod(0o600)
    checks.check_wandb("online")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(UserError, match="needs a key"):
        checks.check_wandb("online")
    monkeypatch.setenv("WANDB_API_KEY", "1" * 40)
    checks.check_wandb("online")


# The command line


@pytest.mark.parametrize(
    ("main", "argv", "told"),
    [
        (base_train.main, ["--dept", "6"], "unrecognized arguments: --dept 6 (did you mean --depth?)."),
        (
            speedrun.main,
            ["--max-seq-len=64"],
            "unrecognized arguments: --max-seq-len=64 (did you mean --max_seq_len?).",
        ),
        (speedrun.main, ["--qqqq"], "unrecognized arguments: --qqqq."),
        (speedrun.main, ["--depth", "six"], "argument --depth: invalid int value: 'six'."),
        (speedrun.main, ["--depth"], "argument --depth: expected one argument."),
        (run10.main, ["--gpu", "h10"], "argument --tier/--gpu: invalid choice: 'h10'"),
        (chat_cli.main, ["--temprature=1"], "unrecognized arguments: --temprature=1 (did you mean --temperature?)."),
        (
            recall_eval.main,
            ["--checkpoint=x", "--budgt=1"],
            "unrecognized arguments: --budgt=1 (did you mean --budget?).",
        ),
    ],
)
def test_a_mistyped_flag_is_told_in_two_lines(
    main: Any, argv: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/job.py", *argv])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"job.py: {told}")
    assert lines[1].startswith("job.py --help")
    assert lines[1].endswith(" lists all flags.")


def test_sections_are_the_flags() -> None:
    assert sum(len(own_fields(section)) for section in SECTIONS.values()) == len(SETTINGS), "two sections share a flag"
    assert {name for name, (section, item) in SETTINGS.items() if section is RunConfig and not item.metadata["machine"]} == {
        "tier", "init_from", "seed", "dtype", "compile",
    }  # fmt: skip


def test_a_run_keeps_its_tier(tmp_path: Path) -> None:
    """Settings of the run go before those of a tier, so another tier would change nothing and say nothing."""
    settings = {"base_dir": str(tmp_path), "run": "mine", "device": "cpu"}
    args = cli.resolve({**settings, "tier": "cpu"})
    run_settings.record(cli.paths(args).run_dir, PREPARE_TEXT, cli.flat_values(args))
    for same in ({}, {"tier": "auto"}, {"tier": "cpu"}):
        assert cli.resolve({**settings, **same}).run.tier == "cpu"
    with pytest.raises(UserError, match="--tier is '5090', and run 'mine' was made with --tier cpu"):
        cli.resolve({**settings, "tier": "5090"})


def test_a_compiler_that_is_missing_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"base_dir": str(tmp_path), "tier": "cpu", "device": "cpu", "compile": "on", "wandb": "off"}
    real = precision.Hardware.probe
    for there in (True, False):
        monkeypatch.setattr(precision.Hardware, "probe", lambda device, there=there: replace(real(device), cxx=there))
        if there:
            checks.check_training(cli.resolve(settings))
        else:
            with pytest.raises(UserError, match=r"--compile on needs a C\+\+ compiler"):
                checks.check_training(cli.resolve(settings))


def test_one_step_is_one_step() -> None:
    pace = Pace(spent=1.0, step=100.0, validation=1.0)
    said = describe(TrainConfig(max_minutes=1.0, min_tokens=0), pace, 1, 1)
    assert said.endswith("1 step in 1 minute")
    assert describe(TrainConfig(max_minutes=1.5, min_tokens=0), pace, 2, 2).endswith("2 steps in 1.5 minutes")
