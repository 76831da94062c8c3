"""The main job end to end, as `make speedrun` runs it: submitted to Ray, from text to report card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import plain_shell
import pytest
from patience import PATIENCE_S

import megacontext as mc

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--run", "mine", "--depth", "2", "--width", "64", "--max_seq_len", "256", "--vocab_size", "1024",
    "--tok_max_chars", "3000000", "--num_iterations", "30", "--device_batch_size", "4", "--total_batch_size", "1024",
    "--eval_tokens", "8192", "--save_every", "10", "--wandb", "off",
    "--min_doc_chars", "5000",  # of the Python library's text, less than all: it is tokenized for the test alone
]  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def run(command: list[str], base: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base folder of a finished tiny run."""
    base = tmp_path_factory.mktemp("base")
    done = run([sys.executable, "-m", "jobs.runtime.submit", "--", "python", "jobs/speedrun.py", *TINY], base)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "report card: mine" in done.stdout
    return base


def test_make_speedrun_runs_exactly_this() -> None:
    recipe = subprocess.run(
        ["make", "-n", "speedrun", "ARGS=--run mine"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python -m jobs.runtime.submit -- python jobs/speedrun.py --run mine" in recipe.stdout


def test_report_holds_every_stage_and_its_baselines(finished: Path) -> None:
    report = finished / "runs" / "mine" / "report"
    numbers = json.loads((report / "report.json").read_text())
    for stage in ("prepare_text", "tok_train", "tok_eval", "prepare_data", "base_train", "base_eval"):
        assert numbers[f"{stage}/seconds"] >= 0, stage
    assert numbers["base_eval/bigram_bpb"] < numbers["base_eval/unigram_bpb"]
    assert numbers["base_eval/val_bpb"] < 4.0
    assert numbers["base_train/steps"] == 30
    assert numbers["prepare_data/tokens_kept_share"] > 0.99
    card = (report / "report.md").read_text()
    assert "unigram" in card
    assert {path.name for path in report.glob("*.png")} == {"train_loss.png", "val_bpb.png"}


def test_the_same_command_does_nothing_twice(finished: Path) -> None:
    checkpoints = finished / "runs" / "mine" / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    done = run([sys.executable, "jobs/speedrun.py", *TINY], finished)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("complete, skipped") == 6
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_the_model_of_the_run_loads_and_talks(finished: Path) -> None:
    model, tokenizer = mc.load(str(finished / "runs" / "mine"))
    assert model.config.n_layer == 2
    assert tokenizer.vocab_size == 1024
    command = '.venv/bin/python jobs/chat_cli.py --run mine -p "Why is the sky blue?"'  # as the README writes it
    said = plain_shell.run(command, plain_shell.checkout(finished / "plain"), NANOCHAT_BASE_DIR=str(finished))
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.strip()


def test_the_pipeline_with_a_memory(finished: Path) -> None:
    """`make speedrun ARGS="--run memory --mc"` without Ray: trained, asked for facts, and talked to in a session. And
    `--init_from`: the run without a memory is given one."""
    memory = [*TINY, "--run", "memory", "--max_seq_len", "256", "--num_iterations", "6", "--launcher", "local",
              "--mc"]  # fmt: skip
    done = run([sys.executable, "jobs/speedrun.py", *memory], finished)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    run_dir = finished / "runs" / "memory"
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(step["mc/route_loss"] > 0 for step in steps if "train/loss" in step)
    model, tokenizer = mc.load(str(run_dir))
    assert model.memory is not None
    with mc.Session(model, tokenizer, budget=128, path=str(finished / "session")) as session:
        session.append("a long story " * 300)
        assert len(list(session.generate(max_tokens=4, stop=()))) == 4
        assert len(session.entries) <= 128 < session.tokens
    command = ".venv/bin/python jobs/chat_cli.py --run memory --session ada"  # as the README writes it
    root = plain_shell.checkout(finished / "chat")
    for _ in range(2):
        said = plain_shell.run(f"{command} <<<'Why is the sky blue?'", root, NANOCHAT_BASE_DIR=str(finished))
        assert said.returncode == 0, said.stderr[-3000:]
        assert "Model: " in said.stdout
    with mc.Session(model, tokenizer, path=run_dir / "sessions" / "ada", read_only=True) as ada:
        assert tokenizer.decode(ada.tree.ids(0, ada.tokens).tolist()).count("Why is the sky blue?") == 2
    asked = run(
        [sys.executable, "jobs/recall_eval.py", "--checkpoint", str(run_dir), "--budget", "128", "--history", "1024",
         "--items", "2", "--json", str(finished / "recall.json")], finished,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert {"window", "ours", "oracle"} <= set(json.loads((finished / "recall.json").read_text())["methods"])
    grown = [*memory, "--run", "grown", "--num_iterations", "2", "--init_from", str(finished / "runs" / "mine")]
    refused = run([sys.executable, "jobs/base_train.py", *grown, "--token_shift", "1"], finished)  # given, not implied
    assert "--token_shift is 1, and the model of --init_from" in refused.stderr
    done = run([sys.executable, "jobs/base_train.py", *grown], finished)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    model, tokenizer = mc.load(str(finished / "runs" / "grown"))
    assert model.memory is not None
    assert not model.config.token_shift  # as in the model that it was
    assert tokenizer.digest == mc.load(str(finished / "runs" / "mine"))[1].digest


def test_other_settings_under_the_same_name_are_refused(finished: Path) -> None:
    (finished / "runs" / "mine" / "stages" / "base_train.json").unlink()
    done = run([sys.executable, "jobs/base_train.py", *TINY, "--launcher", "local", "--matrix_lr", "0.3"], finished)
    assert done.returncode == 1
    assert "matrix_lr was 0.02, is 0.3" in done.stderr


def test_unknown_flags_are_refused(finished: Path) -> None:
    done = run([sys.executable, "jobs/speedrun.py", *TINY, "--no_such_flag", "1"], finished)
    assert done.returncode == 2
    assert "--no_such_flag" in done.stderr
