"""Follow the log of a Ray job: every line once, progress in place on a terminal, through broken connections."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sys
import threading
import time
from typing import Any, TextIO

_STEP = re.compile(r"step (\d+)/(\d+) \(")
_RUN_DIR = re.compile(r"run folder: (.+)")
_PROGRESS = re.compile(r"loss ")
_OF_RAY = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\tINFO job_manager\.py")  # about the start of the job
_BAR_CELLS = 20


class LogPrinter:
    """Prints a job's log. On a terminal, training steps rewrite one line with a bar; elsewhere every line is kept.

    `run_dir` is the run folder that the job named in its log, or "".
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.run_dir = ""
        self._partial = ""
        self._in_place = False

    def feed(self, text: str) -> None:
        """Take the next piece of the log, which may end inside a line."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(line.rstrip("\r"))
        self.out.flush()

    def close(self) -> None:
        """Print an unfinished last line and leave the cursor on a fresh one."""
        if self._partial:
            self._line(self._partial)
            self._partial = ""
        self._end_bar()
        self.out.flush()

    def _line(self, line: str) -> None:
        if _OF_RAY.match(line):
            return
        named = _RUN_DIR.fullmatch(line.strip())
        if named:
            self.run_dir = named.group(1)
        step = _STEP.search(line)
        if step and _PROGRESS.search(line) and self.out.isatty():
            width = shutil.get_terminal_size().columns - 1
            self.out.write("\r\x1b[K" + f"{progress_bar(int(step.group(1)), int(step.group(2)))} {line}"[:width])
            self._in_place = True
            return
        self._end_bar()
        self.out.write(line + "\n")

    def _end_bar(self) -> None:
        if self._in_place:
            self.out.write("\n")
            self._in_place = False


def progress_bar(done: int, total: int) -> str:
    """`[#####---------------]` of twenty cells."""
    cells = min(_BAR_CELLS, _BAR_CELLS * done // max(total, 1))
    return "[" + "#" * cells + "-" * (_BAR_CELLS - cells) + "]"


class Follower:
    """Streams a job's log to a printer from a thread; `finish` prints whatever the stream missed."""

    def __init__(self, address: str, job_id: str, printer: LogPrinter) -> None:
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.job.sdk"):  # notes about sockets are not the job's log
            logging.getLogger(name).setLevel(logging.WARNING)
        self.client = JobSubmissionClient(address)
        self.job_id, self.printer = job_id, printer
        self._printed = 0  # characters of the log; a new stream starts at its beginning again
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-log", daemon=True)
        self._failures = 0

    def start(self) -> None:
        """Begin to print."""
        self._thread.start()

    def info(self) -> Any:
        """Ray's details of the job; a few failed requests in a row are waited out."""
        while True:
            try:
                info = self.client.get_job_info(self.job_id)
                self._failures = 0
                return info
            except (RuntimeError, ConnectionError, OSError):
                self._failures += 1
                if self._failures > 20:
                    raise
                time.sleep(1.0)

    def finish(self) -> None:
        """Call when the job has ended: wait for the stream's end, then print the rest of the log."""
        self._ended.set()
        self._thread.join(timeout=10)
        if not self._thread.is_alive():  # a hung stream could print at the same time
            rest = self.client.get_job_logs(self.job_id)[self._printed :]
            self.printer.feed(rest)
        self.printer.close()

    def _run(self) -> None:
        while True:
            try:
                asyncio.run(self._stream())
                return  # Ray closes the stream when the job has ended
            except Exception as error:  # the network may raise anything; what is lost is printed by the next stream
                if self._ended.wait(1.0):
                    return
                print(
                    f"[submit] log stream broke ({type(error).__name__}), connecting again", file=sys.stderr, flush=True
                )

    async def _stream(self) -> None:
        seen = 0
        async for text in self.client.tail_job_logs(self.job_id):
            seen += len(text)
            fresh = seen - self._printed
            if fresh > 0:
                self.printer.feed(text[-fresh:])
                self._printed = seen
