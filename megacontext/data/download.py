"""Parquet shards over HTTP: retried, resumed, checked, and visible under their names only when whole.

While a shard arrives it is `.<name>.part`, beside it `.<name>.part.json` with what identifies the remote file. A
broken transfer goes on where it stopped, in this process or a later one, as long as the server vouches (`If-Range`)
that the file is still the same; otherwise it starts again.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megacontext import storage
from megacontext.data import parquet
from megacontext.errors import DataError, StorageError, UserError

# The public web text that nanochat trains on (ClimbMix, shuffled): shards 0 to LAST_SHARD, the last is validation.
BASE_URL = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main"
LAST_SHARD = 6542

CHUNK_BYTES = 1 << 20
MAX_WAIT_S = 60.0
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FetchOptions:
    """How hard to try. Times in seconds."""

    attempts: int = 6
    timeout_s: float = 30.0  # longest silence of the server before the transfer is started again
    backoff_s: float = 1.0  # first pause; doubles each time, up to a minute, give or take half
    token: str = field(default="", repr=False)  # bearer token for the first host; never sent on to where it redirects
    progress: Progress | None = None  # (name, bytes so far, bytes in all or 0), called from the download threads


class _TransientError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _StoppedError(Exception):
    """Another shard failed or the user interrupted."""


def shard_names(train_shards: int, last_shard: int = LAST_SHARD) -> list[str]:
    """Names of the first `train_shards` shards and of the validation shard, the last one of the data set."""
    if not 1 <= train_shards <= last_shard:
        raise UserError(f"data_shards is {train_shards}; it must be 1 to {last_shard}.")
    return [f"shard_{index:05d}.parquet" for index in [*range(train_shards), last_shard]]


def fetch_web_shards(directory: str, train_shards: int) -> list[str]:
    """Download the first shards of the public web text and its validation shard into a local folder; return the paths.

    Prints a line a shard. `HF_TOKEN` of the environment, if set, is shown to the host for higher rate limits.
    Raises what `shard_names` and `fetch_shards` raise.
    """
    names = shard_names(train_shards)
    print(f"download: {len(names)} shards from {BASE_URL} to {directory}", flush=True)

    def report(name: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes == total_bytes:
            print(f"download: {name}, {total_bytes / 1e6:.1f} MB", flush=True)

    options = FetchOptions(token=os.environ.get("HF_TOKEN", ""), progress=report)
    return fetch_shards(BASE_URL, names, directory, options=options)


def fetch_shards(
    base_url: str,
    names: Sequence[str],
    directory: str,
    *,
    num_threads: int = 4,
    sha256: Mapping[str, str] | None = None,
    options: FetchOptions | None = None,
) -> list[str]:
    """Download `<base_url>/<name>` for each name into a local folder, several at a time; return the paths.

    Shards that are there and whole are not fetched again. `sha256` maps names to expected hex digests. One process
    at a time works on a folder, others wait for it.

    Raises UserError for a bad URL, name or folder, StorageError when a shard cannot be had (after all retries, or at
    once when the server says no, the disk is full or the content is wrong). Shards that arrived stay.
    """
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"download address {base_url!r} must begin with http:// or https://.")
    bad = [name for name in names if "/" in name or name.startswith(".") or not name]
    if bad:
        raise UserError(f"{bad[0]!r} is no file name to download; give names without folders.")
    if not storage.is_local(directory):
        raise UserError(f"{directory!r} is not a local folder; download there first, then copy, or use --data_dir.")
    folder = storage.local_path(directory)
    storage.makedirs(str(folder))
    stop = threading.Event()
    expected = sha256 or {}

    def fetch(name: str) -> None:
        target = folder / name
        if not (target.exists() and not content_problem(target, expected.get(name, ""))):
            url = f"{base_url.rstrip('/')}/{name}"
            _Fetch(url, target, expected.get(name, ""), options or FetchOptions(), stop).run()

    with _folder_lock(folder), ThreadPoolExecutor(num_threads) as pool:
        try:
            futures = [pool.submit(fetch, name) for name in names]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [
                error for future in done if (error := future.exception()) and not isinstance(error, _StoppedError)
            ]
            if errors:
                raise errors[0]
        finally:
            stop.set()  # also on Ctrl-C: threads end at their next chunk
            pool.shutdown(wait=False, cancel_futures=True)
    return [str(folder / name) for name in names]


def content_problem(path: Path, sha256: str = "") -> str:
    """Why a downloaded file cannot be right; empty if nothing speaks against it.

    The digest is compared when there is one; parquet files must have a readable footer and a `text` column.
    """
    if sha256:
        actual = storage.sha256_file(str(path))
        if actual != sha256.lower():
            return f"its SHA-256 is {actual}, expected {sha256.lower()}"
    if ".parquet" in path.suffixes:
        try:
            parquet.count_rows(str(path))
        except DataError as error:
            return str(error)
    return ""


class _Fetch:
    """One file on its way: the attempts, and the state on disk between them."""

    def __init__(self, url: str, target: Path, sha256: str, options: FetchOptions, stop: threading.Event) -> None:
        self.url = url
        self.target = target
        self.sha256 = sha256
        self.options = options
        self.stop = stop
        self.part = target.with_name(f".{target.name}.part")
        self.meta = target.with_name(f".{target.name}.part.json")

    def run(self) -> None:
        """Try until the file is whole under its name. Raises StorageError when that fails."""
        jitter = random.Random()
        reason = ""
        for attempt in range(1, self.options.attempts + 1):
            try:
                self._attempt()
                self._publish()
                return
            except _TransientError as error:
                reason = str(error)
                pause = min(
                    MAX_WAIT_S,
                    max(error.wait_s, self.options.backoff_s * 2 ** (attempt - 1) * jitter.uniform(0.5, 1.5)),
                )
            if attempt < self.options.attempts and self.stop.wait(pause):
                raise _StoppedError
        raise StorageError(
            f"cannot download {self.url}: {reason} (after {self.options.attempts} attempts). "
            "Check the network and run again: what has arrived is kept."
        )

    def _attempt(self) -> None:
        """One request; appends to the part file. Returns when all bytes are there."""
        have, validator = self._resume_point()
        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity", "User-Agent": "megacontext"})
        if self.options.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.options.token}")
        if have:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", validator)
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout_s) as response:
                start, total = self._begin(response, have)
                self._receive(response, start, total)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, have)
        except StorageError:
            raise  # an OSError too, but about our disk
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from error

    def _resume_point(self) -> tuple[int, str]:
        """(bytes that can be kept, what identifies the remote file they come from); (0, "") to start anew."""
        try:
            meta = json.loads(self.meta.read_bytes())
            if meta["url"] == self.url and meta["validator"]:
                return self.part.stat().st_size, str(meta["validator"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # nothing to go on from: an ordinary first attempt, or a half-written note
        return 0, ""

    def _begin(self, response: http.client.HTTPResponse, have: int) -> tuple[int, int]:
        """(offset the body starts at, full size or 0 if unknown), from the headers; prepares the part file."""
        validator = _validator(response)
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if match and int(match[1]) == have and validator in ("", self._resume_point()[1]):
                return have, int(match[2])
            self._discard()
            raise _TransientError(
                f"the server answered with another range ({response.headers.get('Content-Range')!r}) or file"
            )
        self._discard()  # also when a range was asked for: the server ignored it or the file has changed
        storage.write_json(str(self.meta), {"url": self.url, "validator": validator})
        return 0, response.length or 0

    def _receive(self, response: http.client.HTTPResponse, start: int, total: int) -> None:
        """Append the body to the part file. Raises _TransientError when it ends early."""
        done = start
        with self._open_part() as sink:
            while chunk := response.read1(CHUNK_BYTES):
                if self.stop.is_set():
                    raise _StoppedError
                try:
                    sink.write(chunk)
                    sink.flush()
                except OSError as error:
                    raise self._disk_error(error) from error
                done += len(chunk)
                if self.options.progress:
                    self.options.progress(self.target.name, done, total)
        if total and done < total:
            raise _TransientError(f"the connection ended after {done} of {total} bytes")
        if total and done > total:
            self._discard()
            raise _TransientError(f"{done} bytes came, {total} were announced")

    def _refused(self, error: urllib.error.HTTPError, have: int) -> None:
        """Act on an HTTP error status: return if the file is complete, else raise."""
        if error.code == 416:
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return  # all bytes had arrived before the process ended
            self._discard()
            raise _TransientError("the remote file is shorter than what was fetched of it")
        if error.code in RETRIED_STATUS:
            after = error.headers.get("Retry-After") or "0"
            raise _TransientError(
                f"HTTP status {error.code} {error.reason}", float(after) if after.isdecimal() else 0.0
            )
        raise StorageError(
            f"cannot download {self.url}: HTTP status {error.code} {error.reason}. Check the address and access rights."
        )

    def _publish(self) -> None:
        """Check the whole part file and give it its name."""
        problem = content_problem(self.part, self.sha256)
        if problem:
            self._discard()
            raise _TransientError(f"what arrived is wrong: {problem}")
        try:
            with open(self.part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self.part, self.target)
            storage.sync_dir(self.target.parent)
            self.meta.unlink(missing_ok=True)
        except OSError as error:
            raise self._disk_error(error) from error

    def _open_part(self) -> IO[bytes]:
        try:
            return open(self.part, "ab")
        except OSError as error:
            raise self._disk_error(error) from error

    def _discard(self) -> None:
        for path in (self.part, self.meta):
            path.unlink(missing_ok=True)

    def _disk_error(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write {str(self.target)!r}: {error}. Free space or choose another --base_dir.")


def _validator(response: http.client.HTTPResponse) -> str:
    """What `If-Range` may carry: a strong ETag, else the modification date, else nothing."""
    etag = response.headers.get("ETag") or ""
    return etag if etag.startswith('"') else response.headers.get("Last-Modified") or ""


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder's download lock; waits while another process has it. Raises StorageError without lock support."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / ".download.lock", "wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise StorageError(
                f"cannot lock {str(folder)!r} for downloading: {error}. Choose a local --base_dir."
            ) from error
        yield
