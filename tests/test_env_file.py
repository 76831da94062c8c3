"""`.mc_env` is read as a shell reads it, and what cannot be read is named without showing it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.runtime import environment
from jobs.runtime.env_file import parse_env_file, read_env_file
from megacontext.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {"HOME": "/home-of-a", "X": "x x", "EMPTY": ""}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("abc#def", "abc#def"),
        ("abc # note", "abc"),
        ("#abc", "#abc"),
        ("'a # b'  # note", "a # b"),
        ("$HOME/data", "/home-of-a/data"),
        ("${HOME}/data", "/home-of-a/data"),
        ('"$HOME/my data"', "/home-of-a/my data"),
        ("'$HOME'", "$HOME"),
        ("\\$HOME", "$HOME"),
        ("${MISSING:-plan b}", "plan b"),
        ("$EMPTY", ""),
        ("$FIRST/more", "1/more"),
        ("costs5$", "costs5$"),
        ("'it'\\''s'", "it's"),
        ('"say \\"hi\\" \\\\ \\n"', 'say "hi" \\ \\n'),
        ("'two\nlines'", "two\nlines"),
        ("a\\\nb", "ab"),
        ("é", "é"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_values_are_those_of_a_shell(written: str, value: str) -> None:
    text = f"# settings\n\nFIRST=1\nexport NAME={written}\nLAST=2\n"
    assert parse_env_file(text, environment=KNOWN) == {"FIRST": "1", "NAME": value, "LAST": "2"}
    assert parse_env_file(text.replace("\n", "\r\n"), environment=KNOWN)["NAME"] == value
    script = f'set -a\n{text}\nprintf %s "$NAME"'
    shell = subprocess.run(["sh", "-c", script], env=KNOWN, capture_output=True, text=True, check=True)
    assert shell.stdout == value


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("NAME", "not NAME=value"),
        ("NAME = b", "not NAME=value"),
        ("1A=b", "not NAME=value"),
        ("É=b", "not NAME=value"),
        ("A=b s3cret", "space outside quotation marks"),
        ("A='s3cret", "not closed"),
        ('A="s3cret', "not closed"),
        ("A=pa$s3cret", "not set"),
        ('A="pa$s3cret"', "not set"),
        ("A=$(s3cret)", "only a shell can do"),
        ('A="`s3cret`"', "only a shell can do"),
        ("A=s3cret$1", "only a shell can do"),
        ("A=s3cret\0", "zero byte"),
    ],
)
def test_a_bad_line_is_named_and_not_shown(line: str, reason: str) -> None:
    with pytest.raises(UserError, match=r"line 3 of \.mc_env") as caught:
        parse_env_file(f"FIRST='1\n1'\n{line}\n")
    assert reason in str(caught.value)
    assert "s3cret" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12))
def test_any_value_that_is_quoted_comes_back(value: str) -> None:
    assert parse_env_file(f"A={shlex.quote(value)}\nB=1\n") == {"A": value, "B": "1"}


def test_setup_writes_what_jobs_and_shells_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a b" / ".mc_env"
    file.parent.mkdir()
    file.write_text("A=1\n")
    told = {"HF_TOKEN": 'it\'s $HOME `x` "q" \\ #1\n=two', "WANDB_PROJECT": "p q", "NANOCHAT_BASE_DIR": "/a & b/é"}
    done = subprocess.run(
        ["cluster/setup.sh", "--yes", "--no-install", "--file", str(file)],
        cwd=ROOT, env={"PATH": os.environ["PATH"], **told}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(3 settings" in done.stdout
    assert told["HF_TOKEN"] not in done.stdout + done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.with_name(".mc_env.before").read_text() == "A=1\n"
    monkeypatch.setenv("MEGACONTEXT_ENV_FILE", str(file))
    read: dict[str, str] = {}
    environment.load(read)
    assert read == told
    script = f'. {shlex.quote(str(file))}; printf \'%s|%s|%s\' "$HF_TOKEN" "$WANDB_PROJECT" "$NANOCHAT_BASE_DIR"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == "|".join(told.values())


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".mc_env"
    file.write_bytes("\ufeffA=1\nB=é\n".encode())
    assert read_env_file(file, {}) == {"A": "1", "B": "é"}
    file.write_bytes(b"A=1\nB=\xe9\n")
    with pytest.raises(UserError, match=r"line 2 of .*not UTF-8"):
        read_env_file(file, {})
    with pytest.raises(UserError, match="cannot read"):
        read_env_file(tmp_path, {})


def test_values_of_the_environment_win_also_in_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".mc_env"
    file.write_text("HF_TOKEN=file\nWANDB_RUN=run-$HF_TOKEN\nMC_OTEL_ENDPOINT=\n")
    file.chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGACONTEXT_ENV_FILE", ".mc_env")
    known = {"HF_TOKEN": "mine"}
    assert environment.load(known) == file
    assert known == {"HF_TOKEN": "mine", "WANDB_RUN": "run-mine"}
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        environment.load({})


def test_what_a_developer_has_set_does_not_reach_the_tests() -> None:
    """The variables are set here, and are gone where pytest runs this test again."""
    if "RERUN" not in os.environ:
        set_here = {"WANDB_API_KEY": "k", "MC_OTEL_ENDPOINT": "h:1", "OTEL_SDK_DISABLED": "true", "RAY_ADDRESS": "x",
                    "NANOCHAT_BASE_DIR": "/b", "MEGACONTEXT_ENABLE_WANDB": "1", "RERUN": "1"}  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"{__file__}::test_what_a_developer_has_set_does_not_reach_the_tests",
        ]
        done = subprocess.run(command, env={**os.environ, **set_here}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return
    names = ("WANDB_API_KEY", "MC_OTEL_ENDPOINT", "OTEL_SDK_DISABLED", "RAY_ADDRESS", "NANOCHAT_BASE_DIR",
             "MEGACONTEXT_ENABLE_WANDB")  # fmt: skip
    assert [name for name in names if name in os.environ] == []
