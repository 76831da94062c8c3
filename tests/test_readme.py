"""Every command of the README is run by a test, and its Python runs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import plain_shell
import pytest
from patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

PYTHON = ".venv/bin/python"
# command of the README -> what it starts, where that is too much for a test; the test named runs it in earnest
LARGE = {
    "make speedrun": ("python -m jobs.runtime.submit -- python jobs/speedrun.py", "test_speedrun.py"),
    "make test": ("python tests/side_by_side.py", ""),
    'make speedrun ARGS="--run mine --depth 6"': (
        "python -m jobs.runtime.submit -- python jobs/speedrun.py --run mine --depth 6",
        "test_speedrun.py",
    ),
    'make speedrun ARGS="--run memory --mc"': (
        "python -m jobs.runtime.submit -- python jobs/speedrun.py --run memory --mc",
        "test_speedrun.py",
    ),
}
# command of the README -> the test that runs it as it is written
ELSEWHERE = {
    f'{PYTHON} jobs/chat_cli.py --run mine -p "Why is the sky blue?"': "test_speedrun.py",
    f"{PYTHON} jobs/chat_cli.py --run memory --session ada": "test_speedrun.py",
    ".venv/bin/ray job submit --working-dir . -- python jobs/speedrun.py": "test_submit.py",
}
# command of the README -> what it shows
SMALL = {
    f"{PYTHON} jobs/recall_eval.py --help": "usage: recall_eval.py",
    f"{PYTHON} jobs/memory_eval.py --help": "usage: memory_eval.py",
    f"{PYTHON} jobs/recall_ladder.py --help": "usage: recall_ladder.py",
    f"{PYTHON} jobs/base_train.py --help": "usage: base_train.py",
    f"{PYTHON} jobs/report.py --run mine": "report card: mine",
    "cluster/setup.sh --help": "cluster/setup.sh --yes",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.S | re.M)


def commands() -> list[str]:
    return [
        line.strip()
        for block in blocks("bash")
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


def run(command: list[str], cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def texts_of_code(test: str) -> list[str]:
    """The texts that the calls and assignments of a test file hold; comments and docstrings are none."""
    parts = [
        part
        for node in ast.walk(ast.parse((ROOT / "tests" / test).read_text()))
        if isinstance(node, ast.Call | ast.Assign)
        for part in ast.walk(node)
    ]
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def test_every_command_has_a_test() -> None:
    assert set(commands()) == {*LARGE, *ELSEWHERE, *SMALL}
    for command, where in {**ELSEWHERE, **{command: where for command, (_, where) in LARGE.items() if where}}.items():
        started = command if command in ELSEWHERE else "jobs/speedrun.py"
        assert any(text.startswith(started) for text in texts_of_code(where)), f"{where} does not run {command!r}"


@pytest.mark.parametrize("command", SMALL)
def test_small_commands_run_as_written(command: str, tmp_path: Path) -> None:
    if "report.py" in command:
        from megacontext.telemetry.report import write_stage

        write_stage(str(tmp_path / "runs" / "mine"), "tok_train", 1.5, 0.0, {"vocab_size": 300})
    done = plain_shell.run(command, plain_shell.checkout(tmp_path / "plain"), NANOCHAT_BASE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert SMALL[command] in done.stdout


@pytest.mark.parametrize("command", LARGE)
def test_large_commands_start_as_written(command: str, tmp_path: Path) -> None:
    from jobs import speedrun
    from jobs.runtime import cli

    done = plain_shell.run(command, plain_shell.checkout(tmp_path / "plain", tmp_path / "started"))
    assert done.returncode == 0, done.stdout + done.stderr
    words = (tmp_path / "started").read_text().splitlines()
    assert words == shlex.split(LARGE[command][0])
    if "jobs/speedrun.py" in words:
        flags = words[words.index("jobs/speedrun.py") + 1 :]
        cli.parse(speedrun.SECTIONS, None, ["--base_dir", str(tmp_path), *flags])


JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("name", JOBS)
def test_every_job_explains_itself_and_refuses_unknown_flags(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"jobs.{name}").main
    for flag, code in (("--help", 0), ("--no-such-flag", 2)):
        monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", flag])
        with pytest.raises(SystemExit) as caught:
            main()
        assert (caught.value.code or 0) == code
    shown = capsys.readouterr()
    assert "usage:" in shown.out
    assert "no-such-flag" in shown.err or "required" in shown.err


def test_make_lists_its_targets_and_needs_no_installation() -> None:
    done = run(["make"])
    assert done.returncode == 0
    for target in ("speedrun", "test", "lint", "types", "format", "clean"):
        assert f"make {target} " in done.stdout


def test_make_names_the_remedy_when_python_is_too_old_or_has_no_venv(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "make", "sed", "awk", "rm", "touch", "git"):
        found = next(
            (Path(folder, tool) for folder in os.environ["PATH"].split(os.pathsep) if Path(folder, tool).exists()), None
        )
        if found:
            (tmp_path / "bin" / tool).symlink_to(found)
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / "bin" / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1"\nexit 1\n')
    python.chmod(0o755)
    done = run(["make", "install"], cwd=tmp_path, PATH=str(tmp_path / "bin"))
    assert done.returncode != 0
    assert "No Python 3.11" in done.stdout
    assert "python3 is: Python 3.8.1" in done.stdout
    python.write_text('#!/bin/sh\ncase "$1" in -c) exit 0;; --version) echo "Python 3.12.0";; *) exit 1;; esac\n')
    done = run(["make", "install"], cwd=tmp_path, PATH=str(tmp_path / "bin"))
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stdout


def test_the_library_example_runs(tmp_path: Path, shared_data: Path) -> None:
    (code,) = blocks("python")
    code = code.replace("path/to/checkpoint", str(shared_data / "nanochat_parity")).replace(
        "path/to/export", str(tmp_path / "export")
    )
    code = code.replace("path/to/session", str(tmp_path / "session"))
    space: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert space["logits"].shape[:2] == (1, len(space["ids"]))  # type: ignore[attr-defined,arg-type]
    assert any((tmp_path / "export").rglob("model_*.pt"))


def test_links_and_paths_of_the_index_exist() -> None:
    index = README.read_text().split("## In ten seconds")[1].split("## Architecture")[0]
    paths = re.findall(r"`([\w./]+)`", index)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
