"""Metrics of a run: what is written survives crashes and resumes, goes to W&B, and holds no secrets."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext import storage
from megacontext.errors import StorageError, UserError
from megacontext.telemetry import metrics_file, provenance, wandb_run
from megacontext.telemetry import tracker as tracker_module
from megacontext.telemetry.metrics_file import read_metrics
from megacontext.telemetry.tracker import Tracker, format_metrics, format_step, resolve_wandb_mode

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_wandb_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_RUN",
        "WANDB_PROJECT",
        "MEGACONTEXT_ENABLE_WANDB",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)


def record(run_dir: str, steps: range, stage: str = "base", resume_step: int = 0) -> None:
    tracker = Tracker(run_dir, "r", {}, "off", stage, log_every=1000)
    tracker.open(resume_step=resume_step, total_steps=1000)
    for step in steps:
        tracker.log({"train/loss": float(step)}, step)
    tracker.finish()


@pytest.mark.parametrize("remote", [False, True])
def test_a_resumed_stage_leaves_one_clean_curve(tmp_path: Path, remote: bool) -> None:
    run_dir = f"memory://tracker-{tmp_path.name}/run" if remote else str(tmp_path / "run")
    record(run_dir, range(0, 10))
    record(run_dir, range(0, 3), stage="sft")
    record(run_dir, range(6, 12), resume_step=6)
    records = read_metrics(run_dir)
    assert [r["step"] for r in records if r["stage"] == "base"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [r["step"] for r in records if r["stage"] == "sft"] == [0, 1, 2]
    record(run_dir, range(0, 2), resume_step=1)  # nothing restored: the whole stage starts again
    assert [r["step"] for r in read_metrics(run_dir) if r["stage"] == "base"] == [0, 1]


@given(cut=st.integers(min_value=0, max_value=400))
def test_a_file_cut_at_any_byte_is_read_and_continued(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run_dir = str(tmp_path_factory.mktemp("cut"))
    record(run_dir, range(0, 8))
    path = Path(run_dir, "metrics.jsonl")
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = [r["step"] for r in read_metrics(run_dir)]
    assert whole == list(range(len(whole)))
    assert len(whole) in (data.count(b"\n"), data.count(b"\n") + 1)
    record(run_dir, range(len(whole), 8), resume_step=max(2, len(whole)) if whole else 0)
    assert [r["step"] for r in read_metrics(run_dir)] == list(range(8))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "stage": "base"}\nnot json\n{"step": 2, "stage": "base"}\n')
    with pytest.raises(UserError, match="line 2 of"):
        read_metrics(str(tmp_path))


def test_records_survive_a_kill_between_lines(tmp_path: Path) -> None:
    code = (
        "import os, signal; from megacontext.telemetry.tracker import Tracker\n"
        f"t = Tracker({str(tmp_path)!r}, 'r', {{}}, 'off'); t.open()\n"
        "for s in range(50): t.log({'train/loss': 1.0}, s)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert [r["step"] for r in read_metrics(str(tmp_path))] == list(range(50))


def test_numbers_of_any_kind_are_written_and_not_finite_becomes_null(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), "r", {}, "off")
    tracker.open()
    tracker.log({"a": torch.tensor(2.5), "b": math.nan, "c": 7, "d": float("inf")}, 1)  # type: ignore[dict-item]
    tracker.finish()
    assert read_metrics(str(tmp_path)) == [{"step": 1, "stage": "base", "a": 2.5, "b": None, "c": 7, "d": None}]


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(str(tmp_path / "run"), "r", {}, "online", enabled=False)
    tracker.open(total_steps=2)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.log_text(1, [("a", "b")])
    tracker.finish()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = metrics_file.LocalSink(str(tmp_path / "metrics.jsonl"))
    sink.append('{"step": 0}')
    real = metrics_file.os.write
    monkeypatch.setattr(metrics_file.os, "write", lambda file, data: real(file, data[:4]))
    with pytest.raises(StorageError, match="no room left"):
        sink.append('{"step": 1}')
    monkeypatch.undo()
    sink.append('{"step": 2}')
    sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 2}\n'


def test_remote_metrics_are_uploaded_while_the_run_goes_on() -> None:
    run_dir = "memory://tracker-live/run"
    tracker = Tracker(run_dir, "r", {}, "off", upload_every_s=0.01)
    tracker.open()
    tracker.log({"train/loss": 1.0}, 1)
    for _ in range(500):
        if storage.exists(f"{run_dir}/metrics.jsonl"):
            break
        tracker._sink._closing.wait(0.01)  # type: ignore[union-attr]
    assert [r["step"] for r in read_metrics(run_dir)] == [1]
    tracker.finish()


def test_a_failing_upload_is_reported_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker("memory://tracker-fail/run", "r", {}, "off", upload_every_s=60)
    tracker.open()
    tracker.log({"train/loss": 1.0}, 1)

    def refuse(path: str, data: bytes) -> None:
        raise StorageError(f"cannot write {path!r}")

    monkeypatch.setattr(storage, "write_bytes", refuse)
    with pytest.raises(StorageError, match="cannot write"):
        tracker.finish()


def test_lines_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"train/loss": 3.21, "train/lrm": 1.0, "train/dt": 0.401, "train/tok_per_sec": 10211.3, "train/mfu": 12.1}
    assert format_metrics(metrics) == "loss 3.2100 lrm 1.00 dt 401ms tok/s 10,211 mfu 12.1%"
    assert format_step(12, 1000) == "step 00012/01000 (1.2%)"
    assert format_step(12, None) == "step 00012"
    tracker = Tracker(str(tmp_path), "r", {}, "off", log_every=5)
    tracker.open(total_steps=12)
    for step in range(1, 13):
        tracker.log({"train/loss": 1.0}, step)
    tracker.log({"val/bpb": 2.0}, 12)
    tracker.finish()
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown] == [
        "00001/00012",
        "00005/00012",
        "00010/00012",
        "00012/00012",
        "00012/00012",
    ]
    assert shown[-1].endswith("val_bpb 2.0000")


def test_every_training_line_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(str(tmp_path), "r", {}, "off")
    tracker.open(total_steps=60)
    for step, seconds in ((1, 90.0), (2, 30.0), (3, 30.0)):  # the first also compiles
        tracker.log({"train/loss": 1.0, "train/dt": seconds}, step)
    tracker.log({"val/bpb": 2.0}, 3)
    for step in range(4, 61):  # the machine is idle again
        tracker.log({"train/loss": 1.0, "train/dt": 3.0}, step)
    tracker.finish()
    shown = [line.partition(" left ")[2] for line in capsys.readouterr().out.splitlines()]
    assert [shown[0], shown[1], shown[2], shown[3]] == ["88.5 min", "29.0 min", "28.5 min", ""]
    assert (shown[4], shown[5], shown[8]) == ("28.0 min", "15.1 min", "2.6 min")
    assert shown[-1] == "0.0 min"
    assert "left" not in "".join((tmp_path / "metrics.jsonl").read_text())


def test_slow_steps_are_printed_whatever_log_every_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(tracker_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tracker = Tracker(str(tmp_path), "r", {}, "off", log_every=10)
    tracker.open(total_steps=100)
    for step in range(1, 8):
        now[0] += 20
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish()
    assert [line.split()[1][:5] for line in capsys.readouterr().out.splitlines()] == [
        "00001",
        "00003",
        "00005",
        "00007",
    ]


def test_a_terminal_gets_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    tracker = Tracker(str(tmp_path), "r", {}, "off")
    tracker.open(total_steps=4)
    for step in range(1, 5):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish()
    assert "4/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "environment", "resolved"),
    [
        ("auto", {}, "off"),
        ("auto", {"WANDB_API_KEY": "k" * 40}, "online"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": "k" * 40}, "off"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "WANDB_RUN": "dummy"}, "off"),
        ("offline", {}, "offline"),
        ("off", {"WANDB_API_KEY": "k" * 40}, "off"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "MEGACONTEXT_ENABLE_WANDB": "1"}, "online"),
    ],
)
def test_wandb_mode(mode: str, environment: dict[str, str], resolved: str) -> None:
    assert resolve_wandb_mode(mode, environment) == resolved


@pytest.mark.parametrize(
    ("mode", "environment"),
    [("auto", {}), ("off", {"WANDB_API_KEY": "k" * 40}), ("offline", {"WANDB_API_KEY": "k" * 40}), ("online", {})],
)
def test_a_run_that_must_upload_refuses_to_start_without(mode: str, environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="MEGACONTEXT_ENABLE_WANDB=1 refuses"):
        resolve_wandb_mode(mode, {**environment, "MEGACONTEXT_ENABLE_WANDB": "1"})


def test_an_unknown_wandb_mode_is_refused() -> None:
    with pytest.raises(UserError, match="'maybe' is unknown"):
        resolve_wandb_mode("maybe", {})


def test_wandb_offline_records_everything_but_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t" * 7
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = {"run": {"storage": f"s3://key:{secret}@bucket/x", "note": secret}, "train": {"matrix_lr": 0.02}}
    tracker = Tracker(str(tmp_path / "run"), "mine", config, "offline")
    tracker.open(total_steps=3)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1.0 / step}, step)
    assert tracker._wandb is not None
    assert tracker._wandb._run.id == "mine-base"
    assert tracker._wandb._run.config["train"]["matrix_lr"] == 0.02
    tracker.finish()
    files = [path for path in (tmp_path / "run" / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" and path.stat().st_size > 500 for path in files)
    for path in [*files, tmp_path / "run" / "metrics.jsonl"]:
        assert secret.encode() not in path.read_bytes(), path
    assert [r["train/loss"] for r in read_metrics(str(tmp_path / "run"))] == [1.0, 0.5, 1.0 / 3]


class RefusingHandler(http.server.BaseHTTPRequestHandler):
    """Answers every request with 401, as W&B does for a key that it does not know."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(params=["closed port", "silence", "wrong key"])
def bad_wandb(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a W&B server that is of no use says, in our words; the environment names the server."""
    import wandb

    wandb.teardown()  # the settings of tests before
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_run, "REACH_S", 0.5)
    with contextlib.ExitStack() as stack:
        if request.param == "wrong key":
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), RefusingHandler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            port = server.server_port
        else:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = listening.getsockname()[1]
            if request.param == "closed port":
                listening.close()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        yield {"closed port": "Connection refused", "silence": "0.5 s", "wrong key": "401"}[request.param]


def test_training_starts_without_a_wandb_that_answers(
    bad_wandb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def record_one() -> None:
        tracker = Tracker(str(tmp_path), "mine", {}, "auto")
        tracker.open(total_steps=1)
        tracker.log({"train/loss": 1.0}, 1)
        tracker.finish()

    record_one()
    said = capsys.readouterr().out
    assert "W&B cannot start online" in said
    assert bad_wandb in said
    assert "recording offline in" in said
    assert "0" * 40 not in said
    assert [r["train/loss"] for r in read_metrics(str(tmp_path))] == [1.0]
    (offline,) = (tmp_path / "wandb").glob("offline-run-*/run-mine-base.wandb")
    assert offline.stat().st_size > 200
    monkeypatch.setenv("MEGACONTEXT_ENABLE_WANDB", "1")
    with pytest.raises(UserError, match="cannot start W&B online") as caught:
        record_one()
    assert bad_wandb in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_wandb_that_fails_later_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Dead:
        starting_step = 0

        def log(self, *arguments: object, **more: object) -> None:
            raise ConnectionResetError("Connection lost")

        finish = log

    for at_once in (True, False):
        tracker = Tracker(str(tmp_path), "mine", {}, "off")
        tracker.open()
        tracker._wandb = wandb_run.WandbRun(Dead(), str(tmp_path))
        for step in (1, 2) if at_once else ():
            tracker.log({"train/loss": 1.0}, step)
        tracker.finish()
        said = capsys.readouterr().out
        assert said.count("W&B failed (Connection lost)") == 1
    assert "`wandb sync`" in said


def test_redact_removes_values_of_secret_variables_and_passwords_in_uris(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a1b2c3d4e5f6")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/some/where/token")
    value = {"a": ["key a1b2c3d4e5f6", ("x", 1)], "b": "gs://user:pw@bucket/p", "c": "/some/where/token", "d": 1.5}
    assert provenance.redact(value) == {
        "a": ["key ***", ["x", 1]],
        "b": "gs://***@bucket/p",
        "c": "/some/where/token",
        "d": 1.5,
    }


@pytest.mark.parametrize(
    ("name", "secret"),
    [("WANDB_API_KEY", True), ("HF_TOKEN", True), ("AWS_SECRET_ACCESS_KEY", True), ("OTEL_EXPORTER_OTLP_HEADERS", True),
     ("RAY_AUTH_TOKEN_PATH", False), ("WANDB_PROJECT", False), ("MC_OTEL_ENDPOINT", False), ("PATH", False)],
)  # fmt: skip
def test_which_names_are_secret(name: str, secret: bool) -> None:
    assert provenance.is_secret_name(name) is secret


def test_revision_from_the_environment_git_or_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACONTEXT_REVISION", "abc123-dirty")
    assert provenance.source_revision() == "abc123-dirty"
    monkeypatch.delenv("MEGACONTEXT_REVISION")
    monkeypatch.setattr(provenance, "_git", lambda root, *a: {"rev-parse": "abc", "status": " M x"}[a[0]])
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert provenance.source_revision() == "abc-dirty"
    monkeypatch.setattr(provenance, "_git", lambda root, *a: None)
    revision = provenance.source_revision()
    assert revision.startswith("files-")
    assert revision == provenance.source_revision()


def test_provenance_keeps_the_first_start(tmp_path: Path) -> None:
    first = provenance.record(str(tmp_path))
    storage.write_json(str(tmp_path / "provenance.json"), {**first, "started": "2020-01-01T00:00:00+00:00"})
    again = provenance.record(str(tmp_path))
    assert again["started"] == "2020-01-01T00:00:00+00:00"
    assert again["versions"]["torch"] == torch.__version__
    assert again["hardware"]["cpu_cores"] >= 1
    assert again["hardware"]["ram_bytes"] > 0
