"""Relative paths mean the user's folder, whichever folder a job runs in; a user without a name or a home folder is served."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import chat_cli, lens_audit, memory_eval, recall_eval, recall_ladder
from jobs.runtime import cli, environment
from jobs.runtime.user_paths import CALLER_DIR, base_folder, is_relative, user_path
from megacontext.errors import StorageError, UserError

ROOT = Path(__file__).resolve().parents[1]
NAMELESS = (
    "import os, pwd, runpy, sys\n"
    "def unknown(*key): raise KeyError(f'no such user: {key}')\n"
    "pwd.getpwuid = pwd.getpwnam = unknown\n"
)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the process of a job that `ray job submit` started, by whoever."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv(CALLER_DIR, raising=False)


def test_a_path_begins_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home-of-a")
    monkeypatch.setenv(CALLER_DIR, "/elsewhere")  # counts in submitted jobs alone
    for given, meant in {
        "": "",
        "out": f"{tmp_path}/out",
        "./out/": f"{tmp_path}/out",
        "file://out": f"{tmp_path}/out",
        "file:///a/b": "/a/b",
        "/a/b": "/a/b",
        "~/x": "/home-of-a/x",
        "s3://bucket/x": "s3://bucket/x",
        "a b/é's": f"{tmp_path}/a b/é's",
    }.items():
        assert user_path(given, "--storage") == meant
    tmp_path.joinpath("gone").mkdir()
    monkeypatch.chdir("gone")
    tmp_path.joinpath("gone").rmdir()
    with pytest.raises(UserError, match="does not exist any more"):
        user_path("out", "--storage")


@pytest.mark.parametrize("given", ["out", "./out", "../out", "file://out", "data/x"])
def test_a_submitted_job_begins_paths_at_the_folder_of_its_client(
    given: str, submitted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"--storage is .* a relative path, and this job runs in a temporary folder of Ray"
    ):
        user_path(given, "--storage")
    assert user_path("/a/b", "--storage") == "/a/b"
    assert user_path("s3://b/x", "--storage") == "s3://b/x"
    monkeypatch.setenv(CALLER_DIR, "/folder of $a")
    assert user_path(given, "--storage") == f"/folder of $a/{given.removeprefix('file://').removeprefix('./')}"


@pytest.mark.parametrize("given", ["memory://x", "memory://", "simplecache::memory://x"])
def test_storage_that_vanishes_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="memory:// is gone when a process ends"):
        user_path(given, "--storage")


def test_half_a_uri_and_a_home_that_is_not_known_are_refused() -> None:
    for given in ("file:/a/b", "s3:/bucket/x"):
        with pytest.raises(UserError, match="two slashes"):
            user_path(given, "--storage")
    with pytest.raises(StorageError, match="home folder that is not known"):
        user_path("~nobody-of-this-name/x", "--storage")


@pytest.mark.parametrize("flag", ["storage", "data_dir", "base_dir", "eval_bundle", "init_from"])
def test_every_path_of_a_run_is_the_users(flag: str, submitted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"tier": "cpu", "base_dir": "/base", flag: "a/b"}
    with pytest.raises(UserError, match=f"--{flag} is 'a/b', a relative path"):
        cli.resolve(given)
    with pytest.raises(UserError, match=f"--{flag} is 'memory://a'"):
        cli.resolve({**given, flag: "memory://a"})
    monkeypatch.setenv(CALLER_DIR, "/mine")
    assert cli.absolute_paths(given)[flag] == "/mine/a/b"


def test_the_base_folder_is_one_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "mine/..//base")
    assert base_folder("") == f"{tmp_path}/base"
    assert base_folder("file:///b") == "/b"
    with pytest.raises(UserError, match="--base_dir is 's3://b/x'; it must be a folder of the machine"):
        base_folder("s3://b/x")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "s3://b/x")
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR is"):
        base_folder("")


@pytest.mark.parametrize(
    ("job", "argv", "flag"),
    [
        (recall_eval, ["--checkpoint", "runs/mine"], "checkpoint"),
        (recall_eval, ["--checkpoint", "/a", "--json", "out/mk.json"], "json"),
        (recall_eval, ["--checkpoint", "/a", "--haystack", "x.txt"], "haystack"),
        (memory_eval, ["--checkpoint", "/a", "--docs", "books"], "docs"),
        (lens_audit, ["--checkpoint", "/a", "--docs", "/b", "--json", "out.json"], "json"),
        (recall_ladder, ["--json", "out.json"], "json"),
        (recall_ladder, ["--base_dir", "b"], "base_dir"),
        (chat_cli, ["--checkpoint", "runs/mine"], "checkpoint"),
        (chat_cli, ["--storage", "out"], "storage"),
        (chat_cli, ["--base_dir", "b"], "base_dir"),
    ],
)
def test_jobs_with_flags_of_their_own_lose_no_result(job: object, argv: list[str], flag: str, submitted: None) -> None:
    with pytest.raises(SystemExit, match=f"--{flag} is .* a relative path, and this job runs in a temporary folder"):
        job.main(argv)  # type: ignore[attr-defined]


def test_variables_with_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variables = {"NANOCHAT_BASE_DIR": "base", "HF_HOME": "/hf", "MEGACONTEXT_ENV_FILE": ".env"}
    environment.fix_paths(variables, same_machine=True)
    assert variables == {
        "NANOCHAT_BASE_DIR": f"{tmp_path}/base",
        "HF_HOME": "/hf",
        "MEGACONTEXT_ENV_FILE": f"{tmp_path}/.env",
    }
    environment.fix_paths({"NANOCHAT_BASE_DIR": "~/base", "MEGACONTEXT_ENV_FILE": ".env"}, same_machine=False)
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR is 'base', a relative path, and the job runs on other"):
        environment.fix_paths({"NANOCHAT_BASE_DIR": "base"}, same_machine=False)
    with pytest.raises(UserError, match=r"Ray cannot send a value with a \$"):
        environment.forwarded({"NANOCHAT_BASE_DIR": "/a/$b"})
    assert [is_relative(path) for path in ("a", "/a", "~/a", "s3://a", "")] == [True, False, False, False, False]


def nameless(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code as a user id that the system does not know, without HOME: `env -i` in a container."""
    known = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", NAMELESS + code], cwd=ROOT, env=known, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "argv", [["jobs/runtime/submit.py", "--", "python", "jobs/report.py"], ["jobs/chat_cli.py", "-p", "x"]]
)
def test_without_a_home_folder_one_sentence_names_the_variable(argv: list[str]) -> None:
    done = nameless(f"sys.argv = {argv!r}; runpy.run_path(sys.argv[0], run_name='__main__')")
    assert done.returncode == 1
    assert done.stderr.startswith("UserError: there is no home folder: HOME is not set")
    assert "Set NANOCHAT_BASE_DIR" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_user_without_name_and_home_can_work(tmp_path: Path) -> None:
    code = (
        "import getpass\n"
        "from jobs.runtime import environment\n"
        "from jobs.runtime.user_paths import base_folder\n"
        "environment.load()\n"
        "import torch._dynamo\n"  # every optimizer's first step imports it, and it asks for the name
        "print(getpass.getuser(), os.path.expanduser('~'), base_folder(''))\n"
    )
    done = nameless(code, NANOCHAT_BASE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"uid{os.getuid()}", str(tmp_path), str(tmp_path)]
