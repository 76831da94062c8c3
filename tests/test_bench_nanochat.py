"""Decoding beside nanochat's engine, with a small stand-in for a checkout of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megacontext.bench import decode
from megacontext.errors import UserError

GPT = """
from dataclasses import asdict, dataclass

import torch
from megacontext.config import GPTConfig as Shape
from megacontext.model.gpt import GPT as Ours


@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str


class GPT(Ours):
    def __init__(self, config):
        assert config.window_pattern == "L"
        super().__init__(Shape(**{k: v for k, v in asdict(config).items() if k != "window_pattern"}))
"""
ENGINE = """
from megacontext.inference.engine import naive_generate

calls = []


class Engine:
    def __init__(self, model, tokenizer):
        assert tokenizer.encode_special("<|bos|>") == tokenizer.get_bos_token_id() == -2
        self.model = model

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42):
        calls.append((len(tokens), num_samples, max_tokens, temperature, top_k))
        ids = list(tokens)
        for _ in range(max_tokens):
            ids += naive_generate(self.model, ids, 1, temperature, top_k)
            yield [ids[-1]] * num_samples, [1] * num_samples
"""
SHAPE = [
    "--depth",
    "1",
    "--width",
    "64",
    "--vocab",
    "64",
    "--prompt",
    "20",
    "--new",
    "4",
    "--batches",
    "1,3",
    "--repeats",
    "1",
    "--device",
    "cpu",
    "--threads",
    "1",
]


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "nanochat").mkdir()
    for name, text in (("__init__", ""), ("gpt", GPT), ("engine", ENGINE)):
        (tmp_path / "nanochat" / f"{name}.py").write_text(text)
    yield tmp_path
    assert not any(name.split(".")[0] == "nanochat" for name in sys.modules)
    assert str(tmp_path) not in sys.path


def test_both_engines_generate_by_turns(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    timed = decode._time
    monkeypatch.setattr(
        decode,
        "_time",
        lambda engine, *rest: (seen.append((type(engine).__module__, rest[1])), timed(engine, *rest))[1],
    )
    result = decode.main([*SHAPE, "--dtypes", "fp32", "--nanochat", str(checkout), "--head_dim", "32"])
    ours, theirs = "megacontext.inference.engine", "nanochat.engine"
    assert seen == [(ours, 1), (ours, 3), (theirs, 1), (theirs, 3)] * 2
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["speed_over_nanochat"] == pytest.approx(row["nanochat_cpu_step_ms"] / row["cpu_step_ms"])
    assert "vs nanochat" in capsys.readouterr().out


def test_without_a_checkout_there_is_no_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    result = decode.main([*SHAPE, "--dtypes", "fp32"])
    assert all("speed_over_nanochat" not in row for row in result["rows"])
    with pytest.raises(SystemExit):
        decode.main(["--help"])
    assert "--nanochat nanochat --dtypes fp32 --batches 1,8 --threads 1" in capsys.readouterr().out


def test_a_comparison_that_cannot_be_is_said(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match=r"has no nanochat/engine.py; give the folder of a nanochat checkout"):
        decode.main([*SHAPE, "--dtypes", "fp32", "--nanochat", str(tmp_path_factory.mktemp("empty"))])
    with pytest.raises(UserError, match="compares in fp32 on the CPU"):
        decode.main([*SHAPE, "--dtypes", "bf16", "--nanochat", str(checkout)])
    (checkout / "nanochat" / "engine.py").write_text("import surely_not_installed")
    with pytest.raises(UserError, match=r"cannot be imported: .*surely_not_installed.*Install what it needs"):
        decode.main([*SHAPE, "--dtypes", "fp32", "--nanochat", str(checkout)])
