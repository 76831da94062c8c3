"""`mc.load` finds every layout, and what it gives back computes what was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import train_here
from tiny import make_task, make_tokenizer
from tiny_memory import make_model

import megacontext as mc
from megacontext import api, storage
from megacontext.checkpoint import latest_checkpoint, load_checkpoint
from megacontext.config import MemoryConfig
from megacontext.errors import CheckpointError, DataError, UserError
from megacontext.model.gpt import GPT


def test_nanochat_base_directory(shared_data: Path) -> None:
    expected = np.load(shared_data / "nanochat_parity" / "expected.npz")
    model, tokenizer = mc.load(str(shared_data / "nanochat_parity"))
    ids = torch.from_numpy(expected["ids"])
    with torch.no_grad():
        logits = model(ids[:, :-1])
    assert logits.dtype == torch.float32
    assert (logits - torch.from_numpy(expected["logits"])).abs().max() <= 1e-4
    assert abs(model.loss(ids[:, :-1], ids[:, 1:]).item() - float(expected["loss"])) <= 1e-5
    assert tokenizer.vocab_size == 1024


def test_own_checkpoint_run_folder_and_nanochat_export_agree(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    result = train_here(task)
    saved = load_checkpoint(result.checkpoint, with_optimizer=False).model
    for path in (result.checkpoint, task.run_dir, f"{task.run_dir}/checkpoints"):
        model, tokenizer = mc.load(path)
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    out = mc.save_nanochat(model, tokenizer, str(tmp_path / "export"), step=12)
    assert Path(out).relative_to(tmp_path / "export") == Path("base_checkpoints/d2")
    again, its_tokenizer = mc.load(str(tmp_path / "export"))
    assert its_tokenizer.digest == tokenizer.digest
    for name, value in again.state_dict().items():
        assert value.numpy().tobytes() == saved[name].numpy().tobytes(), name


def test_chosen_step_and_newest(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train_here(task)
    early, _ = mc.load(task.run_dir, step=9)
    late, _ = mc.load(task.run_dir)
    assert not torch.equal(early.lm_head.weight, late.lm_head.weight)


@pytest.mark.parametrize("section", ["model_config", "memory_config"])
def test_a_setting_that_this_version_does_not_have_is_named(
    tmp_path: Path, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train_here(make_task(tmp_path))
    loaded = load_checkpoint(result.checkpoint, with_optimizer=False)
    newer = {**loaded.meta, section: {**loaded.meta.get(section, {}), "wings": 2}}
    monkeypatch.setattr("megacontext.api.load_checkpoint", lambda *_, **__: replace(loaded, meta=newer))
    with pytest.raises(CheckpointError, match=r"another version of megacontext: there is no setting wings"):
        mc.load(result.checkpoint)


def test_remote_checkpoint(tmp_path: Path) -> None:
    result = train_here(make_task(tmp_path))
    remote = f"memory://{tmp_path.name}/megacontext_base_000012"
    for file in Path(result.checkpoint).rglob("*"):
        if file.is_file():
            storage.write_bytes(storage.join(remote, str(file.relative_to(result.checkpoint))), file.read_bytes())
    model, _ = mc.load(remote)
    assert model.config.n_layer == 2


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for read in (mc.load, api.shape_of):
        with pytest.raises(CheckpointError, match=r"there is nothing at .*nothing'; give a run"):
            read(str(tmp_path / "nothing"))
    with pytest.raises(
        CheckpointError,
        match=r"no nanochat checkpoint in .*; looked for model_<step>.pt there and in .*"
        r"A checkpoint of ours was looked for as well: megacontext_<stage>_<step>/",
    ):
        mc.load(str(tmp_path))
    with pytest.raises(UserError, match="stage 'chat' is unknown"):
        mc.load(str(tmp_path), stage="chat")
    task = make_task(tmp_path)
    train_here(task)
    with pytest.raises(
        CheckpointError, match=r"has no checkpoint of stage rl or .* and step 5; there are: .*base_000012"
    ):
        mc.load(task.run_dir, step=5)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of stage mid; there are: megacontext_base_"):
        mc.load(task.run_dir, stage="mid")
    newest = latest_checkpoint(f"{task.run_dir}/checkpoints", "base")
    assert newest is not None
    with pytest.raises(CheckpointError, match="is of step 12, not 9"):
        mc.load(newest, step=9)
    with pytest.raises(CheckpointError, match="is of stage base, not sft"):
        mc.load(newest, stage="sft")
    with pytest.raises(CheckpointError, match="no nanochat checkpoint tag 'd2'"):
        mc.load(task.run_dir, tag="d2")
    Path(newest, "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="it has no manifest"):
        mc.load(newest)
    for path in Path(task.run_dir, "checkpoints").iterdir():
        (path / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint of stage base .* is damaged"):
        mc.load(task.run_dir)


def test_paths_and_gradients(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train_here(task)
    ids = torch.tensor([[1, 2, 3]])
    for path in (Path(task.run_dir), Path(task.run_dir, "checkpoints"), f"file://{task.run_dir}"):
        model, tokenizer = mc.load(path)
        assert not model(ids).requires_grad
        assert not model.training
    out = mc.save_nanochat(model, tokenizer, tmp_path / "export")
    logits = model(ids)
    for again, _ in (mc.load(tmp_path / "export"), mc.load(Path(out))):
        assert torch.equal(again(ids), logits)
        assert not logits.requires_grad
    trainable, _ = mc.load(Path(task.run_dir), trainable=True)
    trainable.loss(ids, ids).backward()
    assert all(parameter.grad is not None for parameter in trainable.parameters())


def test_what_nanochat_has_no_room_for_is_not_dropped_silently(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    model = make_model(vocab_size=300)
    with pytest.raises(UserError, match="no token shift"):
        mc.save_nanochat(model, tokenizer, tmp_path / "out", drop_memory=True)
    plain = GPT(replace(model.config, token_shift=False))
    plain.init_weights(torch.Generator().manual_seed(0))
    plain.attach_memory(MemoryConfig(mc=1)).init_weights(torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"no room for this model's memory .* drop_memory=True"):
        mc.save_nanochat(plain, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mc.save_nanochat(plain, tokenizer, tmp_path / "out", drop_memory=True)
    again, _ = mc.load(tmp_path / "out")
    assert again.memory is None
    assert torch.equal(again(torch.tensor([[1, 2]])), plain(torch.tensor([[1, 2]])))


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    from megacontext.data.tokenizer import Tokenizer

    task = make_task(tmp_path)
    train_here(task)
    model, tokenizer = mc.load(task.run_dir)
    mc.save_nanochat(model, tokenizer, str(tmp_path / "export"))
    Tokenizer.train(["other words entirely, among many more that differ " * 50], 280).save(
        str(tmp_path / "export" / "tokenizer")
    )
    with pytest.raises((CheckpointError, DataError), match="has 280 tokens, the model"):
        mc.load(str(tmp_path / "export"))


def test_importing_is_free() -> None:
    import subprocess
    import sys

    code = "import sys, megacontext; assert 'torch' not in sys.modules; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
