"""nanochat's own numbers on its own checkpoint, and its layout read and written byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megacontext.config import GPTConfig
from megacontext.errors import CheckpointError
from megacontext.model.gpt import GPT
from megacontext.model.nanochat import find_checkpoint, load_nanochat, load_weights, save_nanochat_model

CONFIG = GPTConfig(sequence_len=16, vocab_size=40, n_layer=2, n_head=2, n_kv_head=1, n_embd=16)


@pytest.fixture(scope="module")
def parity(shared_data: Path) -> Path:
    return shared_data / "nanochat_parity"


def random_model(seed: int = 0) -> GPT:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_logits_loss_and_greedy_tokens_are_nanochats(parity: Path) -> None:
    folder, step = find_checkpoint(str(parity))
    model, meta = load_nanochat(folder, step)
    expected = np.load(parity / "expected.npz")
    ids = torch.from_numpy(expected["ids"])
    assert meta["step"] == step == 7
    with torch.no_grad():
        difference = (model(ids[:, :-1]) - torch.from_numpy(expected["logits"])).abs().max().item()
        loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
        assert difference <= 1e-4
        assert abs(loss - float(expected["loss"])) <= 1e-5
        model.prepare_inference()
        prompt, greedy = expected["prompt"].tolist(), expected["greedy"].tolist()
        cache, said = model.make_cache(1, 64), list(prompt)
        logits = model(torch.tensor([prompt]), cache)
        while len(said) < len(greedy):
            said.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([said[-1:]]), cache)
    assert said == greedy


def test_export_and_reimport_keep_every_byte(parity: Path, tmp_path: Path) -> None:
    folder, step = find_checkpoint(str(parity))
    model, meta = load_nanochat(folder, step)
    out = save_nanochat_model(model, str(tmp_path), step=step, meta=meta)
    assert Path(out).name == Path(folder).name
    original = torch.load(Path(folder) / f"model_{step:06d}.pt", weights_only=True)
    written = torch.load(Path(out) / f"model_{step:06d}.pt", weights_only=True)
    assert list(written) == list(original)
    for key, value in original.items():
        assert written[key].dtype == value.dtype
        assert written[key].numpy().tobytes() == value.numpy().tobytes()
    assert json.loads((Path(out) / f"meta_{step:06d}.json").read_text()) == meta


def test_gpu_checkpoints_keep_their_bf16_embedding(tmp_path: Path) -> None:
    model = random_model()
    model.transformer["wte"].to(torch.bfloat16)
    again, _ = load_nanochat(save_nanochat_model(model, str(tmp_path)))
    assert again.state_dict()["transformer.wte.weight"].dtype == torch.bfloat16
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids))
    twice, _ = load_nanochat(save_nanochat_model(again, str(tmp_path / "second")))
    for key, value in model.state_dict().items():
        assert torch.equal(twice.state_dict()[key], value)
        assert twice.state_dict()[key].dtype == value.dtype


def test_keys_of_a_compiled_model_load(tmp_path: Path) -> None:
    model, fresh = random_model(), GPT(CONFIG)
    load_weights(fresh, {f"_orig_mod.{key}": value for key, value in model.state_dict().items()}, "x")
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)


def test_latest_stage_deepest_model_and_last_step_are_found(tmp_path: Path) -> None:
    model = random_model()
    for kind, tag, step in (("base", "d4", 5), ("base", "d12", 3), ("base", "d12", 20), ("mid", "d4", 7)):
        save_nanochat_model(model, str(tmp_path), kind=kind, tag=tag, step=step)
    base = str(tmp_path)
    assert find_checkpoint(base) == (f"{base}/mid_checkpoints/d4", 7)
    assert find_checkpoint(base, kind="base") == (f"{base}/base_checkpoints/d12", 20)
    assert find_checkpoint(base, kind="base", tag="d4") == (f"{base}/base_checkpoints/d4", 5)
    assert find_checkpoint(f"{base}/base_checkpoints/d12", step=3) == (f"{base}/base_checkpoints/d12", 3)


def test_layout_works_on_a_uri() -> None:
    base = "memory://nanochat-layout"
    folder = save_nanochat_model(random_model(), base, step=4)
    again, meta = load_nanochat(*find_checkpoint(base))
    assert folder.startswith(base)
    assert meta["step"] == 4
    assert torch.equal(again.state_dict()["lm_head.weight"], random_model().state_dict()["lm_head.weight"])


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no nanochat checkpoint"):
        find_checkpoint(str(tmp_path))
    folder = save_nanochat_model(random_model(), str(tmp_path), step=1)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 .* there are: \[1\]"):
        load_nanochat(folder, 2)
    model_file, meta_file = Path(folder) / "model_000001.pt", Path(folder) / "meta_000001.json"
    meta = json.loads(meta_file.read_text())
    meta_file.write_text(json.dumps({**meta, "model_config": {**meta["model_config"], "n_layer": 3}}))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.2\.attn\.c_k\.weight is missing"):
        load_nanochat(folder)
    meta_file.write_text(json.dumps({**meta, "model_config": {**meta["model_config"], "window_pattern": "SSSL"}}))
    with pytest.raises(CheckpointError, match="newer models are not supported"):
        load_nanochat(folder)
    meta_file.write_text(json.dumps(meta))
    model_file.write_bytes(model_file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_nanochat(folder)
    meta_file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_nanochat(folder)
