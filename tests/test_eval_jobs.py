"""base_eval and chat_cli on a run that trained for a second."""

import io
import math
from pathlib import Path

import pytest
import torch
from tiny import make_task

import megacontext as mc
from jobs import base_eval, chat_cli, prepare_data
from jobs.runtime import cli
from megacontext.config import DataConfig, EvalConfig, RunConfig
from megacontext.errors import CheckpointError, DataError, UserError
from megacontext.inference.engine import naive_generate
from megacontext.telemetry.tracker import Tracker
from megacontext.train import loop
from megacontext.train.worker import LocalWorker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run `run` in it."""
    folder = tmp_path_factory.mktemp("tiny")
    task = make_task(folder)
    tracker = Tracker(run_dir=task.run_dir, run_name="run", config={}, wandb_mode="off", enabled=True)
    loop.train(task, LocalWorker.start(task.run_dir, "cpu"), tracker)
    return folder


def arguments(folder: Path, *flags: str) -> cli.Args:
    common = [
        "--tier",
        "cpu",
        "--base_dir",
        str(folder),
        "--storage",
        str(folder),
        "--device",
        "cpu",
        "--dtype",
        "fp32",
    ]
    return cli.parse([RunConfig, DataConfig, EvalConfig], None, [*common, *flags])


def test_base_eval(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prepare_data, "token_dirs", lambda args: (str(folder / "train"), str(folder / "val")))
    metrics = base_eval.run(arguments(folder, "--run", "run", "--sample_tokens", "5"))
    model, tokenizer = mc.load(str(folder / "run"))
    from megacontext.data.shards import ShardSet

    val = ShardSet.open(str(folder / "val"))
    ids = torch.from_numpy(val.read(torch.arange(val.num_rows).numpy())["ids"].astype("int64"))
    with torch.no_grad():
        logs = model(ids[:, :-1]).double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sizes = tokenizer.token_bytes()[ids[:, 1:]]
    nats = -logs[sizes > 0].sum().item()
    assert metrics["base_eval/val_bpb"] == pytest.approx(nats / math.log(2) / sizes.sum().item(), rel=1e-5)
    assert metrics["base_eval/val_tokens"] == int((sizes > 0).sum())
    assert metrics["base_eval/bigram_bpb"] < metrics["base_eval/unigram_bpb"]
    assert metrics["base_eval/ngram_train_tokens"] == 96 * 32
    prompt, continuation = metrics["base_eval/samples"][0]
    assert continuation == tokenizer.decode(naive_generate(model, tokenizer.encode(prompt, bos=True), 5))
    assert "base_eval/core" not in metrics
    assert "CORE: skipped" in capsys.readouterr().out


def test_base_eval_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "token_dirs", lambda args: (str(folder / "train"), str(folder / "val")))
    with pytest.raises(CheckpointError, match="'other' has no base checkpoint"):
        base_eval.run(arguments(folder, "--run", "other"))
    with pytest.raises(DataError, match=r"nowhere/core\.yaml does not exist"):
        base_eval.run(arguments(folder, "--run", "run", "--eval_bundle", str(folder / "nowhere")))


def test_one_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--storage", str(folder), "--run", "run", "--temperature", "0", "--max_tokens", "6", "--device", "cpu"]
    chat_cli.main([*flags, "--dtype", "fp32", "-p", "the quick"])
    out, err = capsys.readouterr()
    model, tokenizer = mc.load(str(folder / "run"))
    assert out == tokenizer.decode(naive_generate(model, tokenizer.encode("the quick", bos=True), 6)) + "\n"
    assert "a base model" in err


def test_a_conversation_at_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n\nand runs\nclear\nthe fox\nquit\nnever read\n"))
    path = str(folder / "run/checkpoints")
    chat_cli.main(["--checkpoint", path, "--max_tokens", "4", "--temperature", "0", "--device", "cpu"])
    answers = capsys.readouterr().out.split("Model: ")[1:]
    assert len(answers) == 3
    assert answers[0].split("\n")[0] == answers[2].split("\n")[0]


@pytest.mark.parametrize(
    ("path", "chat"),
    [
        ("x/megacontext_base_000001", False),
        ("x/megacontext_sft_000001", True),
        ("x/mid_checkpoints/d2", True),
        ("x/base_checkpoints/d2/", False),
    ],
)
def test_what_has_learned_to_chat(path: str, chat: bool) -> None:
    assert chat_cli.locate(path) == (path, chat)


def test_a_directory_with_a_chat_model_has_learned_to_chat(tmp_path: Path) -> None:
    (tmp_path / "base_checkpoints").mkdir()
    assert not chat_cli.locate(str(tmp_path))[1]
    (tmp_path / "chatsft_checkpoints").mkdir()
    assert chat_cli.locate(str(tmp_path))[1]


def test_bad_requests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"CheckpointError: run .* has no checkpoint"):
        chat_cli.main(["--storage", str(folder), "--run", "none", "-p", "x"])
    for flags in (["--temperature", "-1"], ["--tempo", "3"]):
        with pytest.raises(SystemExit) as refused:
            chat_cli.main(["--storage", str(folder), "--run", "run", "-p", "x", *flags])
        assert refused.value.code == 2
    assert "--temperature: -1 is not allowed, it must be at least 0" in capsys.readouterr().err
    assert issubclass(CheckpointError, UserError)
