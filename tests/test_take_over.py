"""`--init_from`: a run that starts from a trained model has its weights, shape and tokenizer, and stands by itself."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from test_mc_training import MEMORY, make_mc_task
from test_resume import train_here
from tiny import make_task

import megacontext as mc
from jobs import tok_train, training
from jobs.runtime import cli
from jobs.runtime.take_over import take_over
from megacontext.errors import CheckpointError, UserError
from megacontext.stages import BASE
from megacontext.train.setup import fresh


def arguments(folder: Path, source: Path | str, **flags: Any) -> cli.Args:
    return cli.resolve(
        {"tier": "cpu", "base_dir": str(folder / "base"), "init_from": str(source), "run": "next"} | flags
    )


def start_of(args: cli.Args) -> dict[str, torch.Tensor]:
    """Weights that the run would train from."""
    model, _ = fresh(training.task_of(BASE, args), torch.device("cpu"), torch.float32)
    return model.state_dict()


def test_a_run_starts_from_our_checkpoint_and_needs_it_only_once(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train_here(task)
    before, tokenizer = mc.load(task.run_dir)
    args = arguments(tmp_path, task.run_dir, max_seq_len=64)
    assert tok_train.run(args) == {"tok_train/vocab_size": 300, "tok_train/digest": tokenizer.digest}
    shutil.rmtree(task.run_dir)
    made = training.task_of(BASE, args)
    assert made.gpt == replace(before.config, sequence_len=64)
    assert made.init_from == take_over(args)
    state = start_of(args)
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())


def test_under_torchrun_the_first_process_makes_the_copy_and_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path)
    train_here(task)
    args = arguments(tmp_path, task.run_dir)
    monkeypatch.setenv("RANK", "1")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(take_over, args)
        time.sleep(0.5)
        assert not second.done()
        monkeypatch.setenv("RANK", "0")
        try:
            first = take_over(args)
        finally:
            pool.shutdown(wait=False)
        assert second.result(timeout=PATIENCE_S) == first


def test_a_nanochat_model_gets_a_memory(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train_here(task)
    model, tokenizer = mc.load(task.run_dir)
    model.transformer.wte.to(torch.bfloat16)  # as nanochat stores it after training on a GPU
    mc.save_nanochat(model, tokenizer, str(tmp_path / "nanochat"))
    state = start_of(arguments(tmp_path, tmp_path / "nanochat", mc=1))
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
    assert all(torch.equal(value.float(), state[name]) for name, value in model.state_dict().items())
    assert any(name.startswith("memory.") for name in state)


def test_a_memory_is_taken_over_or_left_behind_and_must_fit(tmp_path: Path) -> None:
    task = make_mc_task(tmp_path, "run", num_iterations=1)
    train_here(task)
    before = mc.load(task.run_dir)[0].state_dict()
    memory = {name: getattr(MEMORY, name) for name in ("mc", "block_size", "routing_slots", "routing_width")}
    same = start_of(arguments(tmp_path, task.run_dir, **memory))
    assert all(torch.equal(value, same[name]) for name, value in before.items())
    without = start_of(arguments(tmp_path, task.run_dir))
    assert without.keys() == {name for name in before if not name.startswith("memory.")}
    with pytest.raises(UserError, match=r"--routing_width is 24, and the model of --init_from .* has 8"):
        start_of(arguments(tmp_path, task.run_dir, **memory | {"routing_width": 24}))


def test_what_cannot_be_started_from_is_refused(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train_here(task)
    take_over(arguments(tmp_path, task.run_dir))
    shutil.copytree(task.run_dir, tmp_path / "other")
    with pytest.raises(UserError, match=r"was started from .*run.*other.*another --run"):
        take_over(arguments(tmp_path, tmp_path / "other"))
    with pytest.raises(CheckpointError, match="there is nothing at"):
        take_over(arguments(tmp_path, tmp_path / "nothing", run="third"))
    assert take_over(cli.resolve({"tier": "cpu", "base_dir": str(tmp_path)})) is None
