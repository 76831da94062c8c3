"""The right to write, for one process at a time: a lock of the operating system, or a lease where there is none.

A lock on a local file is the kernel's: it ends with its process, so it cannot go stale. Object stores have no locks.
There a lease is a small file that its holder writes anew every few seconds; a lease that is not written any more is
free. A lease is best effort: it refuses a second process that starts while the first runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megacontext import storage
from megacontext.errors import StorageError, UserError

Refusal = Callable[[str], UserError]
"""From the name of the holder ("process 12 on host since …") to the error that says what it holds."""

BEAT_S = 5.0  # between two writes of a lease
WATCH_S = 30.0  # a lease of unknown fate that is not written for so long is free
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system says that has none
_mine: set[str] = set()  # leases that this process holds


class Lock(Protocol):
    """The right to write, until `release`."""

    def check(self) -> None:
        """Raise StorageError when the right was lost to another process."""

    def release(self) -> None:
        """Give it back; safe to call twice."""


def exclusive(path: str, refusal: Refusal, wait_s: float = 0.0) -> Lock:
    """The right that the file `path` (local or a URI; its folder must be there) stands for.

    A process that holds it and may be about to end is given `wait_s` seconds. The file is removed at the end. Raises
    `refusal(holder)` when another process keeps it, StorageError when the file cannot be written.
    """
    if storage.is_local(path):
        try:
            return FileLock(storage.local_path(path), refusal, wait_s, keep_file=False)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise StorageError(f"cannot write {path!r}: {error}. {storage.remedy(error)}") from error
    return Lease(path, refusal, wait_s)


def this_process() -> str:
    """Name of this process for messages."""
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


class FileLock:
    """An exclusive lock on a local file. The kernel drops it when its process dies.

    Raises `refusal(holder)` when another has it for longer than `wait_s` seconds. OSError passes through.
    """

    def __init__(self, path: Path, refusal: Refusal, wait_s: float = 0.0, keep_file: bool = True) -> None:
        self._path, self._keep_file = path, keep_file
        deadline, said = time.monotonic() + wait_s, False
        while True:
            file, holder = _lock(path)
            if file is not None:
                break
            if time.monotonic() >= deadline:
                raise refusal(holder)
            said = said or _say(holder, wait_s)
            time.sleep(0.1)
        self._file = file
        with contextlib.suppress(OSError):  # the name in the file is for messages; the lock is what counts
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), this_process().encode(), 0)

    def check(self) -> None:
        """Nothing can take it away."""

    def release(self) -> None:
        if not self._file.closed:
            if not self._keep_file:
                self._path.unlink(missing_ok=True)  # while it is held; who waits for it sees that and makes a new one
            self._file.close()

    close = release


def _lock(path: Path) -> tuple[io.FileIO | None, str]:
    """The locked file, or None and who has it."""
    while True:
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, ""
        except BlockingIOError:
            holder = os.pread(file.fileno(), 200, 0).decode(errors="replace").strip()
            file.close()
            return None, holder or "another process"
        except FileNotFoundError:
            pass  # its last holder removed it after it was opened here
        except OSError:
            file.close()
            raise
        file.close()


class Lease:
    """The right to write on storage without locks, held by writing `path` every `BEAT_S` seconds.

    Raises `refusal(holder)` when another holds it for longer than `wait_s` seconds, StorageError when the file cannot
    be written. A holder on this machine whose process is gone is replaced at once. One whose fate cannot be seen from
    here is watched for `WATCH_S` seconds.
    """

    def __init__(self, path: str, refusal: Refusal, wait_s: float = 0.0) -> None:
        self._path, self._id, self._holder = path, uuid.uuid4().hex, this_process()
        self._lost_to, self._beats, self._end = "", 0, threading.Event()
        self._wait_until_free(refusal, wait_s)
        self._write()
        _mine.add(self._id)
        self._thread = threading.Thread(target=self._keep, name="writer-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StorageError when another process took it, because this one did not write it for too long."""
        if self._lost_to:
            raise StorageError(
                f"{self._lost_to} writes here now ({self._path!r}): this process had stood still for too long. "
                "Nothing more is written by it. Let the other go on, or stop it and run the same command again."
            )

    def release(self) -> None:
        if not self._end.is_set():
            self._end.set()
            self._thread.join()
            _mine.discard(self._id)
            if not self._lost_to:
                with contextlib.suppress(OSError):  # without it the next process waits a little longer
                    storage.remove_tree(self._path)

    def _wait_until_free(self, refusal: Refusal, wait_s: float) -> None:
        began, first, said = time.monotonic(), self._read(), False
        while True:
            now = self._read()
            if now is None or _is_over(now):
                return
            alive = now != first or str(now.get("id")) in _mine
            if time.monotonic() - began >= (wait_s if alive else WATCH_S):
                if alive:
                    raise refusal(str(now.get("holder", "another process")))
                return
            said = said or _say(str(now.get("holder", "another process")), max(wait_s, WATCH_S))
            time.sleep(0.2)

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None when it is absent, an empty record when it is damaged."""
        try:
            storage.filesystem(self._path)[0].invalidate_cache()
            raw = storage.read_bytes(self._path)
            said = json.loads(raw or b"null")
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            return {}
        if not raw:
            return None  # what trying to lock the file has left
        return said if isinstance(said, dict) else {}

    def _write(self) -> None:
        said = {"id": self._id, "holder": self._holder, "place": _place(), "pid": os.getpid(), "beat": self._beats}
        storage.write_bytes(self._path, json.dumps(said).encode())
        self._beats += 1

    def _keep(self) -> None:
        while not self._end.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a network that fails for a moment; the next beat tries again
                now = self._read()
                if now is not None and now.get("id") != self._id:
                    self._lost_to = str(now.get("holder", "another process"))
                    return
                self._write()


def _say(holder: str, seconds: float) -> bool:
    print(f"waiting up to {seconds:g} s for the end of {holder}, which writes here", flush=True)
    return True


def _place() -> str:
    """Where a process id means the same process: host and process namespace."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_over(said: dict[str, Any]) -> bool:
    """Whether the holder is known to be gone."""
    pid = said.get("pid")
    if said.get("place") != _place() or not isinstance(pid, int) or pid < 1:
        return False
    if pid == os.getpid():
        return str(said.get("id")) not in _mine
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
