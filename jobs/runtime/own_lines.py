"""The run's own lines on the terminal; what Ray's own processes say stays in Ray's log files.

Ray prints the output of every process of a job in the driver, each line behind `(name pid=…)`. Lines on stdout are
the run's own: they lose the prefix. Lines on stderr are shown when they come from a process that runs our code, and
dropped when they come from Ray's helpers (controller, cleaner, dataset manager). Lines of the node manager and of the
autoscaler have no pid and pass.

A reader may go away: `| tee log` is ended by the same Ctrl-C, a terminal is closed. The next line is then no error in
the middle of a step. It counts as a hang-up (SIGHUP), which stops the job as any other stop signal does.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_PREFIX = re.compile(r"(?:\x1b\[\d+m)?\((?P<who>[^()]*?) ?pid=\d+(?:, ip=[^)]*)?\)(?:\x1b\[0m)? ")
_COLOURED = re.compile(r"\x1b\[\d+m(\([^()]*\))\x1b\[0m")  # `(raylet)` and `(autoscaler +5s)`
# Ray's own processes: their names in the prefix.
HELPERS = (
    "TrainController", "PlacementGroupCleaner", "DatasetManager", "StatsActor", "AutoscalingCoordinator",
)  # fmt: skip
# What Ray says in our own processes, of settings that are meant.
HARMLESS = ("Progress bars disabled.", "Reporting training result ", "Failed to convert column ")
_LOGGED = re.compile(
    r"\d{4}-\d\d-\d\d [\d:,]+\t(?:INFO|WARNING) \S+ -- (?P<message>.*)", re.DOTALL
)  # by Ray in this process


class Lasting:
    """A text stream that outlives its reader: when that goes away, the process gets one SIGHUP and writes to nowhere."""

    hung_up = False  # of the process: stdout and stderr have one reader

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass on one piece of output."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Raises the error where it is another one, or where a hang-up is not handled and would kill the process."""
        if error.errno not in (errno.EPIPE, errno.EIO) or signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if not Lasting.hung_up:
            Lasting.hung_up = True
            os.kill(os.getpid(), signal.SIGHUP)  # the main thread runs the handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OwnLines(Lasting):
    """A lasting text stream without Ray's prefixes, and without lines of Ray's helpers where those are to be dropped."""

    def __init__(self, stream: TextIO, drop_helpers: bool) -> None:
        super().__init__(stream)
        self._drop_helpers = drop_helpers
        self._begun = threading.local()  # `print` writes a line in pieces, and several threads print

    def write(self, text: str) -> int:
        """Pass on one piece of output; a line with Ray's prefix is held until its newline."""
        begun = getattr(self._begun, "line", "")
        logged = None if begun else _LOGGED.match(text)
        if logged and self._drop_helpers and logged["message"].startswith(HARMLESS):
            return len(text)
        if not begun and not _PREFIX.match(text) and not _COLOURED.match(text):
            return super().write(text)
        *lines, self._begun.line = (begun + text).split("\n")
        for line in lines:
            self._pass(line)
        return len(text)

    def _pass(self, line: str) -> None:
        prefix = _PREFIX.match(line)
        if prefix is None:
            super().write(_COLOURED.sub(r"\1", line, count=1) + "\n")
            return
        message = line[prefix.end() :]
        of_ray = any(name in prefix["who"] for name in HELPERS) or message.startswith(HARMLESS)
        if not (of_ray and self._drop_helpers):
            super().write(message + "\n")


@contextmanager
def own_lines() -> Iterator[None]:
    """Inside, `sys.stdout` and `sys.stderr` carry the run's own lines."""
    with _streams(OwnLines(sys.stdout, False), OwnLines(sys.stderr, True)):
        yield


@contextmanager
def lasting_lines() -> Iterator[None]:
    """Inside, `sys.stdout` and `sys.stderr` outlive their reader."""
    with _streams(Lasting(sys.stdout), Lasting(sys.stderr)):
        yield


@contextmanager
def _streams(out: Any, err: Any) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
