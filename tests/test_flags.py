"""Flags: switches that stand alone, the first page of the help, and one check of types for flags and library."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from jobs.runtime import cli
from jobs.runtime.run_settings import FLAGS, SECTIONS
from megacontext.config import DataConfig, MemoryConfig, TrainConfig
from megacontext.data.tokenizer import MIN_VOCAB_SIZE
from megacontext.errors import UserError
from megacontext.flags import is_switch

ALL = list(SECTIONS.values())
SWITCHES = [name for name, (_, item) in FLAGS.items() if is_switch(item)]


def parsed(tmp_path: Path, *given: str) -> dict[str, object]:
    return cli.flat_values(cli.parse(ALL, None, ["--tier", "cpu", "--base_dir", str(tmp_path), *given]))


def test_every_switch_may_stand_alone_and_takes_0_and_1(tmp_path: Path) -> None:
    assert {"mc", "token_shift", "mc_auto_batch", "verify_shards", "log_rows"} == set(SWITCHES)
    alone = parsed(tmp_path, *(f"--{name}" for name in SWITCHES), "--depth", "2")
    assert all(alone[name] == 1 for name in SWITCHES)
    assert alone["depth"] == 2
    for value in (0, 1):
        given = parsed(tmp_path, *(word for name in SWITCHES for word in (f"--{name}", str(value))))
        assert all(given[name] == value for name in SWITCHES)
    with pytest.raises(SystemExit, match="--log_rows is 2; it must be a whole number from 0 to 1"):
        parsed(tmp_path, "--log_rows", "2")


def shown(option: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as ended:
        cli.parse(ALL, "A job.", [option])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    return {name for name in FLAGS if f"--{name} " in text.split("options:")[1]}


def test_help_shows_the_dozen_that_people_set_first_and_help_all_shows_every_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = shown("--help", capsys)
    assert first == {name for name, (_, item) in FLAGS.items() if item.metadata["first"]}
    assert 10 <= len(first) <= 14
    assert {"run", "tier", "mc", "depth", "data_dir"} <= first
    assert shown("--help_all", capsys) == set(FLAGS)


def test_a_hidden_flag_is_still_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(tmp_path, "--grad_clip", "0.5")["grad_clip"] == 0.5
    with pytest.raises(SystemExit):
        parsed(tmp_path, "--grad_clop", "0.5")
    assert "did you mean --grad_clip?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DataConfig, {"max_seq_len": 1}, "--max_seq_len is 1; it must be a whole number of at least 2"),
        (DataConfig, {"max_seq_len": 2.0}, "--max_seq_len is 2.0; it must be a whole number of at least 2"),
        (DataConfig, {"max_seq_len": True}, "--max_seq_len is True; it must be a whole number of at least 2"),
        (DataConfig, {"data_dir": 5}, "--data_dir is 5; it must be a text"),
        (DataConfig, {"data_dir": "a\0"}, "null character"),
        (TrainConfig, {"stream": "x"}, "--stream 'x' is unknown; choose one of auto, ray, mmap"),
        (TrainConfig, {"warmup_ratio": 1.5}, "--warmup_ratio is 1.5; it must be a finite number from 0 to 1"),
        (TrainConfig, {"warmup_ratio": float("nan")}, "--warmup_ratio is nan; it must be a finite number from 0 to 1"),
        (TrainConfig, {"max_minutes": 0}, "--max_minutes is 0; it must be a finite number above 0, or -1"),
        (TrainConfig, {"eval_every": 0}, "--eval_every is 0; it must be a whole number of at least 1, or -1"),
        (
            DataConfig,
            {"vocab_size": 100},
            f"--vocab_size is 100; it must be a whole number of at least {MIN_VOCAB_SIZE}",
        ),
        (MemoryConfig, {"mc": 2}, "--mc is 2; it must be a whole number from 0 to 1"),
    ],
    ids=str,
)
def test_a_setting_is_checked_as_an_argument_of_the_library(
    section: type, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        section(**values)
    assert message in str(refused.value)


def test_the_limits_that_turn_a_setting_off_are_allowed() -> None:
    assert TrainConfig(max_minutes=-1, eval_every=-1).eval_every == -1
    assert MemoryConfig(mc=True).mc  # as a YAML file says it
    assert all(item.metadata["help"] for section in ALL for item in fields(section))
