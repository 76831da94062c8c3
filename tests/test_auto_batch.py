"""`--mc_auto_batch`: the rows of a micro-batch by the memory that is free, decided once per run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mc_training import MEMORY, make_mc_task, records, train_here

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.shards import Manifest, ids_dtype, write_shard
from megacontext.data.tokenizer import Tokenizer
from megacontext.train import auto_batch, setup
from megacontext.train.auto_batch import fitting_batch, free_memory, saved_bytes
from megacontext.train.setup import choose_sizes, known_batch
from megacontext.train.task import TrainTask

CPU = torch.device("cpu")
GB, MB = 10**9, 10**6


def batch_of(task: TrainTask) -> int:
    return choose_sizes(task, CPU, 1)[1]


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(setup, "free_memory", lambda device: free)


@pytest.mark.parametrize(
    ("batch", "row", "fixed", "free", "expected"),
    [(8, 100 * MB, 0, 10 * GB, 8), (32, 400 * MB, 0, 10 * GB, 8), (8, 100 * MB, 7 * GB, 10 * GB, 4),
     (12, 100 * MB, 0, GB, 3), (6, 300 * MB, 0, 5 * GB // 2, 3), (7, 300 * MB, 0, 2 * GB, 1), (8, GB, 0, 0, 1), (1, GB, 0, 0, 1)],
)  # fmt: skip
def test_the_batch_halves_until_it_fits(batch: int, row: int, fixed: int, free: int, expected: int) -> None:
    assert fitting_batch(batch, row, fixed, free) == expected


def test_rows_of_the_cpu_tier_stay_as_they_are_with_10_gb_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were cut from 8 to 1, and training took 1.7 times as long. The shape and the views are those of that report."""
    gpt = GPTConfig.from_depth(4, width=128, vocab_size=8192, sequence_len=512)
    task = make_mc_task(tmp_path, "run", MemoryConfig(mc=1), device_batch_size=8, total_batch_size=8 * 128)
    with_free(monkeypatch, 10 * GB)
    shards = tmp_path / "long"
    _write_rows(shards, 513, Tokenizer.load(task.tokenizer_dir).digest)
    task = replace(task, gpt=gpt, train_tokens_dir=str(shards))
    assert batch_of(task) == 8
    assert capsys.readouterr().out == ""
    row = json.loads((tmp_path / "run" / "horizon" / "base_batch.json").read_text())["row_bytes"]
    assert 60 * MB < row < 150 * MB  # 115 MB a row at the peak of a real step (record of 2026-11-27)


def _write_rows(folder: Path, row_tokens: int, tokenizer_digest: str) -> None:
    ids = np.random.default_rng(0).integers(0, 850, (2, row_tokens)).astype(ids_dtype(8192))
    info = write_shard(str(folder / "shard_00000.arrow"), {"ids": ids})
    Manifest(version=1, split="train", row_tokens=row_tokens, dtype="uint16", vocab_size=8192, tokenizer_digest=tokenizer_digest,
             columns=("ids",), shards=(info,), documents=2, tokens_in=1, tokens_kept=1, source={}).write(str(folder))  # fmt: skip


def test_too_little_memory_makes_smaller_batches_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_mc_task(tmp_path, "run", device_batch_size=4)
    with_free(monkeypatch, 0)
    assert batch_of(task) == 1
    assert "device batch 4 -> 1 rows" in capsys.readouterr().out
    assert batch_of(replace(task, memory=replace(MEMORY, mc_auto_batch=0))) == 4
    assert batch_of(replace(task, memory=None)) == 4
    assert batch_of(replace(task, memory=replace(MEMORY, mc_num_random_variants=0))) == 4


def test_a_resumed_run_keeps_its_batch_whatever_is_free_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: sums over micro-batches of other sizes round differently."""
    with_free(monkeypatch, 0)
    train_here(make_mc_task(tmp_path, "whole", device_batch_size=4))
    task = make_mc_task(tmp_path, "run", device_batch_size=4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    assert not train_here(task).finished
    (tmp_path / "run" / "STOP").unlink()
    with_free(monkeypatch, 10 * GB)
    assert train_here(task).finished
    for run in ("whole", "run"):
        assert {record["train/grad_accum_steps"] for record in records(tmp_path, run)} == {4}
    losses = [[record["train/loss"] for record in records(tmp_path, run)] for run in ("whole", "run")]
    assert losses[0] == losses[1]


def test_another_batch_that_is_asked_for_is_measured_anew_and_so_is_a_damaged_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_mc_task(tmp_path, "run", device_batch_size=4)
    with_free(monkeypatch, 0)
    assert batch_of(task) == 1
    with_free(monkeypatch, 10 * GB)
    assert known_batch(task) == 1
    assert batch_of(replace(task, train=replace(task.train, device_batch_size=2))) == 2
    for damaged in ("", "[]", '{"asked": 4}', "[" * 100_000):
        (tmp_path / "run" / "horizon" / "base_batch.json").write_text(damaged)
        assert known_batch(task) is None
        assert "base_batch.json is damaged" in capsys.readouterr().out
    assert batch_of(task) == 4


def test_workers_of_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_mc_task(tmp_path, "run", device_batch_size=2)
    batch_of(task)
    known = json.loads((tmp_path / "run" / "horizon" / "base_batch.json").read_text())
    parameters = 12 * sum(p.numel() for p in setup.fresh(task, CPU, torch.float32)[0].parameters())
    enough = int((parameters + 2 * auto_batch.PEAK * known["row_bytes"]) / auto_batch.USABLE) + MB
    for world_size, expected in ((1, 2), (2, 1)):
        (tmp_path / "run" / "horizon" / "base_batch.json").unlink()
        with_free(monkeypatch, enough)
        assert choose_sizes(task, CPU, world_size)[1] == expected


def test_saved_bytes_are_those_of_the_tensors_kept_for_backward() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(16, 8)
    # of layer(x): x, not the weight; of tanh and square: their result and their input, which is one tensor
    assert saved_bytes(layer, lambda: layer(x).tanh().square().sum()) == 2 * x.nbytes
    assert saved_bytes(layer, lambda: layer(x[:8]).sum()) == x.nbytes  # a view holds all of its storage


def test_free_memory_is_that_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(CPU) > 0
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    6000 kB\n")
    monkeypatch.setattr(auto_batch, "_PROC", proc)
    monkeypatch.setattr(auto_batch, "_CGROUP", groups)
    assert free_memory(CPU) == 6000 * 1024  # no control groups
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    assert free_memory(CPU) == 6000 * 1024  # not mounted
    (groups / "a" / "b").mkdir(parents=True)
    for folder, limit in (("a/b", "max"), ("a", "5000000")):
        (groups / folder / "memory.max").write_text(f"{limit}\n")
        (groups / folder / "memory.current").write_text("3000000\n")
        (groups / folder / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert free_memory(CPU) == 2_500_000
    (proc / "self" / "cgroup").write_text("3:cpu:/\n2:memory:/c\n")
    (groups / "memory" / "c").mkdir(parents=True)
    (groups / "memory" / "c" / "memory.limit_in_bytes").write_text("4000000\n")
    (groups / "memory" / "c" / "memory.usage_in_bytes").write_text("3000000\n")
    (groups / "memory" / "c" / "memory.stat").write_text("total_inactive_file 0\n")
    assert free_memory(CPU) == 1_000_000
    (proc / "meminfo").unlink()
    assert free_memory(CPU) == 1_000_000
