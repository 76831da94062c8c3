"""Downloads from a local server that fails in every way that servers fail."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from megacontext.data import download, parquet
from megacontext.data.download import FetchOptions, fetch_shards
from megacontext.errors import StorageError, UserError

NAME = "shard_00000.parquet"
FAST = FetchOptions(attempts=4, backoff_s=0.01)


def shard(seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    return parquet.encode_texts([rng.bytes(120).hex() for _ in range(800)])


class Server:
    """Serves `files`; `faults` are taken one a request, `None` or an empty list means a good answer."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[Callable[[Any, bytes], None] | None] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.etags = True
        self.ranges = True
        self.released = threading.Event()  # ends the stalls
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append((self.path, dict(self.headers)))
                fault = server.faults.pop(0) if server.faults else None
                content = server.files.get(self.path.rsplit("/", 1)[-1])
                if fault is not None:
                    self.close_connection = True
                    fault(self, content or b"")
                elif content is None:
                    self.send_error(404)
                else:
                    server.answer(self, content, len(content))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/data"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def answer(self, handler: Any, content: bytes, send: int) -> None:
        """A correct answer, of which only `send` bytes of the body are sent."""
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        wanted = handler.headers.get("Range")
        if wanted and self.ranges and handler.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(content)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            handler.send_response(200)
        if self.etags:
            handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start : start + send])
        handler.wfile.flush()

    def status(self, code: int, **headers: str) -> Callable[[Any, bytes], None]:
        def fault(handler: Any, content: bytes) -> None:
            handler.send_response(code)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        return fault

    def truncate(self, send: int) -> Callable[[Any, bytes], None]:
        return lambda handler, content: self.answer(handler, content, send)

    def stall(self, send: int) -> Callable[[Any, bytes], None]:
        def fault(handler: Any, content: bytes) -> None:
            self.answer(handler, content, send)
            self.released.wait()

        return fault

    def drop(self, handler: Any, content: bytes) -> None:
        handler.connection.close()

    def ranges_asked(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Server()
    yield found
    found.released.set()
    found.http.shutdown()
    found.http.server_close()


def fetch(server: Server, folder: Path, names: list[str] | None = None, **kwargs: Any) -> list[str]:
    return fetch_shards(server.url, names or [NAME], str(folder), **{"options": FAST, **kwargs})


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".download.lock"}


def test_several_shards_in_parallel(server: Server, tmp_path: Path) -> None:
    names = [f"shard_{i:05d}.parquet" for i in range(6)]
    server.files = {name: shard(i) for i, name in enumerate(names)}
    seen: dict[str, tuple[int, int]] = {}
    options = FetchOptions(progress=lambda name, done, total: seen.__setitem__(name, (done, total)))
    paths = fetch(server, tmp_path / "new", names, options=options)
    assert [Path(path).read_bytes() for path in paths] == [server.files[name] for name in names]
    assert left(tmp_path / "new") == set(names)
    assert seen == {name: (len(data), len(data)) for name, data in server.files.items()}
    fetch(server, tmp_path / "new", names)
    assert len(server.requests) == 6, "what is there and whole is not fetched again"


def test_server_errors_are_retried(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard()
    server.faults = [server.status(500), server.drop, server.status(503, Retry_After="0")]
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard()
    assert len(server.requests) == 4


def test_giving_up_names_address_attempts_and_remedy(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard()
    server.faults = [server.status(500)] * 10
    with pytest.raises(StorageError) as caught:
        fetch(server, tmp_path)
    for words in (f"{server.url}/{NAME}", "500", "after 4 attempts", "run again"):
        assert words in str(caught.value)
    assert len(server.requests) == 4
    assert NAME not in left(tmp_path)


def test_missing_file_is_not_retried(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="404 Not Found"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_truncated_transfers_are_resumed(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard()
    server.faults = [server.truncate(1000), server.truncate(500), server.drop]
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard()
    assert server.ranges_asked() == [None, "bytes=1000-", "bytes=1500-", "bytes=1500-"]


def test_stalled_transfer_is_resumed(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard()
    server.faults = [server.stall(2000)]
    options = FetchOptions(attempts=100, timeout_s=1.0, backoff_s=0.01)  # a busy machine may stall the others, too
    assert Path(fetch(server, tmp_path, options=options)[0]).read_bytes() == shard()
    assert server.ranges_asked()[0] is None
    assert int(str(server.ranges_asked()[-1]).removeprefix("bytes=").removesuffix("-")) >= 2000


def test_resume_in_a_later_process(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard()
    server.faults = [server.truncate(3000)]
    with pytest.raises(StorageError, match="ended after 3000 of"):
        fetch(server, tmp_path, options=FetchOptions(attempts=1))
    assert left(tmp_path) == {f".{NAME}.part", f".{NAME}.part.json"}
    assert parquet_names(tmp_path) == []
    fetch(server, tmp_path)
    assert server.ranges_asked() == [None, "bytes=3000-"]
    assert left(tmp_path) == {NAME}


def parquet_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet") if not path.name.startswith("."))


def test_killed_between_last_byte_and_rename(server: Server, tmp_path: Path) -> None:
    """All bytes are in the part file: the server answers 416, and the file is taken."""
    server.files[NAME] = shard()
    server.faults = [server.truncate(3000)]
    with pytest.raises(StorageError):
        fetch(server, tmp_path, options=FetchOptions(attempts=1))
    (tmp_path / f".{NAME}.part").write_bytes(shard())
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard()


def test_part_longer_than_the_file(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard()
    server.faults = [server.truncate(3000)]
    with pytest.raises(StorageError):
        fetch(server, tmp_path, options=FetchOptions(attempts=1))
    (tmp_path / f".{NAME}.part").write_bytes(shard() + b"more")
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard()


@pytest.mark.parametrize("attribute", ["ranges", "etags"])
def test_servers_without_ranges_or_identity(server: Server, tmp_path: Path, attribute: str) -> None:
    """Without ranges the whole file comes again; without an ETag nobody can vouch for the first half."""
    setattr(server, attribute, False)
    server.files[NAME] = shard()
    server.faults = [server.truncate(1000), server.truncate(2000)]
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard()
    if attribute == "etags":
        assert server.ranges_asked() == [None, None, None]


def test_file_changed_between_attempts(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard(1)

    def change(handler: Any, content: bytes) -> None:
        server.answer(handler, content, 1500)
        server.files[NAME] = shard(2)

    server.faults = [change]
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard(2)
    assert server.ranges_asked() == [None, "bytes=1500-"]


def test_range_of_another_file_is_refused(server: Server, tmp_path: Path) -> None:
    """A server that ignores If-Range and sends the tail of a new file must not make a chimera."""
    server.files[NAME] = shard(1)

    def wrong(handler: Any, content: bytes) -> None:
        server.files[NAME] = other = shard(2)
        handler.send_response(206)
        handler.send_header("ETag", '"other"')
        handler.send_header("Content-Range", f"bytes 1500-{len(other) - 1}/{len(other)}")
        handler.send_header("Content-Length", str(len(other) - 1500))
        handler.end_headers()
        handler.wfile.write(other[1500:])

    server.faults = [server.truncate(1500), wrong]
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard(2)


def test_content_is_checked(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = b"<html>log in first</html>"
    with pytest.raises(StorageError, match=r"what arrived is wrong: .*not a whole parquet file"):
        fetch(server, tmp_path)
    assert left(tmp_path) == set()
    server.files[NAME] = shard(1)
    with pytest.raises(StorageError, match=r"SHA-256 is [0-9a-f]{64}, expected 000"):
        fetch(server, tmp_path, sha256={NAME: "0" * 64})
    good = hashlib.sha256(shard(1)).hexdigest()
    assert Path(fetch(server, tmp_path, sha256={NAME: good.upper()})[0]).exists()


def test_damaged_local_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    server.files[NAME] = shard()
    (tmp_path / NAME).write_bytes(shard()[:-50])
    assert Path(fetch(server, tmp_path)[0]).read_bytes() == shard()


def test_one_failure_stops_the_others_and_keeps_what_came(server: Server, tmp_path: Path) -> None:
    names = [f"shard_{i:05d}.parquet" for i in range(3)]
    server.files = {names[0]: shard(0), names[2]: shard(2)}
    with pytest.raises(StorageError, match="shard_00001"):
        fetch(server, tmp_path, names, num_threads=1)
    assert names[0] in left(tmp_path)
    server.files[names[1]] = shard(1)
    fetch(server, tmp_path, names)
    assert left(tmp_path) == set(names)


def test_nothing_listens(tmp_path: Path, server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(StorageError, match=r"refused.*after 4 attempts"):
        fetch(server, tmp_path)


def test_token_goes_to_the_first_host_only(server: Server, tmp_path: Path) -> None:
    other = Server()
    other.files[NAME] = shard()
    server.faults = [server.status(302, Location=f"{other.url}/{NAME}")]
    options = FetchOptions(token="secret-token")
    assert "secret-token" not in repr(options)
    fetch(server, tmp_path, options=options)
    other.http.shutdown()
    other.http.server_close()
    assert server.requests[0][1]["Authorization"] == "Bearer secret-token"
    assert "Authorization" not in other.requests[0][1]


def test_two_downloads_into_one_folder(server: Server, tmp_path: Path) -> None:
    """The second waits for the first and finds everything there."""
    names = [f"shard_{i:05d}.parquet" for i in range(4)]
    server.files = {name: shard(i) for i, name in enumerate(names)}
    threads = [threading.Thread(target=fetch, args=(server, tmp_path, names)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 4
    assert {name: (tmp_path / name).read_bytes() for name in names} == server.files


def test_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files[NAME] = shard()

    def full(self: object) -> IO[bytes]:
        return open("/dev/full", "wb")

    monkeypatch.setattr(download._Fetch, "_open_part", full)
    with pytest.raises(StorageError, match=r"No space left on device.*Free space"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1, "a full disk is not retried"


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must begin with http"):
        fetch_shards("file:///etc", [NAME], str(tmp_path))
    with pytest.raises(UserError, match="no file name"):
        fetch_shards("http://host/x", ["../x.parquet"], str(tmp_path))
    with pytest.raises(UserError, match="not a local folder"):
        fetch_shards("http://host/x", [NAME], "memory://x")
    with pytest.raises(UserError, match="data_shards is 0"):
        download.shard_names(0)


def test_shard_names_and_web_shards(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert download.shard_names(2, 9) == ["shard_00000.parquet", "shard_00001.parquet", "shard_00009.parquet"]
    names = download.shard_names(2)
    assert names[-1] == "shard_06542.parquet"
    server.files = {name: shard(i) for i, name in enumerate(names)}
    monkeypatch.setattr(download, "BASE_URL", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    paths = download.fetch_web_shards(str(tmp_path), 2)
    assert parquet.split_parquet(paths) == (paths[:2], paths[2:])
