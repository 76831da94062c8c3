"""A wrong RAY_ADDRESS is told in one sentence with its remedy, before anything is sent, and nothing waits for ever."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.runtime import address, cluster
from megacontext import reach
from megacontext.errors import UserError

TOKEN = "t0ken" * 8


@contextmanager
def server(status: int = 200, body: object = None, token: str = "") -> Iterator[str]:
    """The address of a server that answers every GET; with a token it answers 401 and 403 as Ray does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            refused = token and (401 if not given else 403 if given != f"Bearer {token}" else 0)
            data = json.dumps({"ray_version": "2.60.0"} if body is None else body).encode()
            self.send_response(refused or status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@contextmanager
def silent(reply: bytes = b"") -> Iterator[str]:
    """The address of a socket that takes connections and says nothing, or one thing that is not HTTP."""

    def answer() -> None:
        with made.accept()[0] as connection:
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as made:
        if reply:
            threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{made.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return f"127.0.0.1:{made.getsockname()[1]}"


def test_a_dashboard_that_answers_is_taken() -> None:
    with server() as found:
        address.check_dashboard(f"http://{found}", {})
        address.check_dashboard(f"http://{found}/", {})
        address.check_dashboard(found, {})
    address.check_dashboard("auto", {})  # Ray finds it


@pytest.mark.parametrize(
    "wrong",
    ["ray://head:10001", "htp://head:8265", "http://", "http://head:82x65", "http://head:99999", "http:///x", "tcp"],
)
def test_what_is_no_address_of_a_dashboard_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object, **more: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(address, "reply_of", unknown)  # no name is looked up in a test
    with pytest.raises(UserError, match="URL of a Ray dashboard, for example http://localhost:8265") as caught:
        address.check_dashboard(wrong, {})
    assert repr(wrong) in str(caught.value) or f"at {wrong} (Name or service not known)" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "_TIMEOUT_S", 0.3)
    with pytest.raises(UserError, match=r"no Ray dashboard answers at .* \(Connection refused\)"):
        address.check_dashboard(f"http://{closed_port()}", {})
    with silent() as found, pytest.raises(UserError, match=r"no answer within 0\.3 s"):
        address.check_dashboard(f"http://{found}", {})
    with silent(b"SSH-2.0\r\n") as found, pytest.raises(UserError, match="the reply is not HTTP"):
        address.check_dashboard(f"http://{found}", {})
    with silent(b"SSH-2.0\r\n") as found:
        address.check_dashboard(found, {})  # a control store: Ray finds the dashboard of its cluster
    for status, body in ((404, None), (200, []), (200, {"other": 1})):
        with server(status, body) as found, pytest.raises(UserError, match="is no Ray dashboard"):
            address.check_dashboard(f"http://{found}", {})
    with server() as found, pytest.raises(UserError, match="no Ray dashboard answers at https"):
        address.check_dashboard(f"https://{found}", {})


def test_a_missing_token_and_a_wrong_one_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with server(token=TOKEN) as found:
        with pytest.raises(UserError, match=r"asks for a token. Set RAY_AUTH_MODE=token"):
            address.check_dashboard(found, address.client_settings({}))
        with pytest.raises(UserError, match="does not accept this token"):
            address.check_dashboard(found, address.client_settings({"RAY_AUTH_TOKEN": "x" * 40}))
        address.check_dashboard(found, address.client_settings({"RAY_AUTH_TOKEN": TOKEN}))
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
        address.check_dashboard(found, address.client_settings({}))


def test_the_flag_counts_more_than_the_variables_for_ray_too() -> None:
    known = {"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": " http://b:2 "}
    assert address.address_of("http://c:3", known) == "http://c:3"
    assert address.address_of("", known) == "http://a:1"
    assert address.address_of("", {"RAY_ADDRESS": known["RAY_ADDRESS"]}) == "http://b:2"
    assert address.address_of("", {"RAY_ADDRESS": " "}) == ""
    assert not set(address.client_settings(known)) & set(known)


@pytest.mark.parametrize("given", ["http://head:8265", "ray://head:10001", closed_port(), "auto"])
def test_a_job_that_cannot_join_says_so(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", given)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def init(**settings: object) -> None:
        assert given == "auto"
        raise ConnectionError("Could not find any running Ray instance.\nAnd more\n")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        UserError, match=r"RAY_ADDRESS .*Unset RAY_ADDRESS to start Ray here, or submit the job"
    ) as caught:
        cluster.start_ray()
    assert len(str(caught.value).splitlines()) == 1


def test_a_reply_is_waited_for_no_longer_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the look-up of the name hangs, for which a socket has no timeout."""
    waiting = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [][: waiting.wait()])
    with pytest.raises(TimeoutError, match=r"no answer within 0.05 s"):
        reach.reply_of("http://a.invalid/", timeout_s=0.05)
    waiting.set()
    for thread in threading.enumerate():
        if thread.name == "reach":
            thread.join()
