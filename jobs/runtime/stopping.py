"""Stop signals of a job: Ctrl-C (SIGINT), SIGTERM, and SIGHUP of a terminal that went away.

While steps are trained, a signal asks for a checkpoint and the job ends when it is written. At any other time the job
ends at once: finished stages, finished shards and written checkpoints are kept, and nothing else exists yet.

`ray.init` and Ray's C++ library put handlers of their own over those of the process. `StopSignals.keep` puts ours back.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar

from jobs.runtime.user_paths import SUBMITTED
from megacontext import storage
from megacontext.errors import StorageError, UserError
from megacontext.train.worker import stop_file

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GIVE_UP_AT = 3  # the signal that no longer waits for a checkpoint
RAY_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
WAIT_S = 120  # what our client asks for
_RAY_DEFAULT_WAIT_S = 3
_SHORT_WAIT_S = 30

T = TypeVar("T")


class Stopped(UserError):
    """Training was asked to stop. Its checkpoint is written, and the same command continues it."""


class Ended(SystemExit):
    """SIGTERM or SIGHUP ends the job: unlike KeyboardInterrupt, nothing that waits for a Ctrl-C takes it for its own."""


class StopSignals:
    """The handler of the stop signals of this process.

    last: number of the last signal, 0 before the first. asked: how many arrived inside `saving`.
    """

    def __init__(self) -> None:
        self.last = 0
        self.asked = 0
        self._saving = False
        self._handled: dict[int, Any] = {}  # signal -> the handler it had before
        # put() of a SimpleQueue may be called from a signal handler; printing and locks may not.
        self._requests: SimpleQueue[int] = SimpleQueue()

    @property
    def exit_status(self) -> int:
        """Exit status of a job that was stopped, as a shell counts it: 128 + the signal; 1 without a signal."""
        return 128 + self.last if self.last else 1

    @property
    def last_words(self) -> str:
        """What a job says that a signal ended at once."""
        if self.asked >= GIVE_UP_AT:
            return (
                "ended at once, without a checkpoint of the last steps. Run the same command to continue from the newest "
                "checkpoint."
            )
        return "stopped; everything finished before is kept. Run the same command to continue."

    def __call__(self, signum: int, frame: Any) -> None:
        """The signal handler. Ends the job, except for the first two signals inside `saving`."""
        self.last = signum
        if self._saving:
            self.asked += 1
            if self.asked < GIVE_UP_AT:
                self._requests.put(signum)
                return
        self.end()

    def end(self) -> NoReturn:
        """Raises KeyboardInterrupt after a Ctrl-C, Ended after any other signal."""
        if self.last == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(self.exit_status)

    def install(self) -> None:
        """Handle the stop signals, except those that this process was told to ignore (`nohup`, a shell's `&`)."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._handled = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        self.keep()

    def keep(self) -> None:
        """Put our handlers back, Python's and C's, whatever a library has installed since. Main thread only."""
        for number in self._handled:
            signal.signal(number, self)

    def remove(self) -> None:
        """Restore the handlers of before `install`."""
        for number, handler in self._handled.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handled = {}

    @contextmanager
    def saving(self, run_dir: str) -> Iterator[None]:
        """Inside, the first signal asks the workers of a run to save and end; the third ends the job."""
        thread = threading.Thread(target=self._serve, args=(run_dir,), name="stop-signals", daemon=True)
        thread.start()
        self._saving = True
        try:
            yield
        finally:
            self._saving = False
            self._requests.put(0)
            thread.join()

    def check(self) -> None:
        """End the job when a signal arrived during a training that reached its end all the same."""
        if self.asked:
            self.end()

    def beside(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread of its own, while this thread keeps the handlers in force."""
        if not self._handled:
            return work()
        box: dict[str, Any] = {}

        def run() -> None:
            try:
                box["result"] = work()
            except BaseException as error:  # handed to the waiting thread, which raises it
                box["error"] = error

        thread = threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.2)
            self.keep()
        if "error" in box:
            raise box["error"]
        result: T = box["result"]
        return result

    def _serve(self, run_dir: str) -> None:
        """Do what the handler must not do itself: write the stop file, then say so. 0 ends it."""
        for count, signum in enumerate(iter(self._requests.get, 0), start=1):
            if count == 1:
                _write_stop_file(run_dir)
                wait = kill_after_s()
                limit = (
                    f" (`ray job stop` kills it after {wait} s)" if wait is not None and wait < _SHORT_WAIT_S else ""
                )
                said = f"writing a checkpoint, then stopping{limit}"
            else:
                said = "already stopping; one more signal ends the job at once, without the checkpoint"
            print(f"{signal.Signals(signum).name}: {said}", flush=True)


_active: StopSignals | None = None


@contextmanager
def handled() -> Iterator[StopSignals]:
    """Handle the stop signals inside; the same object for a `handled` inside of another.

    Only the main thread may handle signals. In any other thread the object never receives one.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or StopSignals()
        return
    _active = StopSignals()
    _active.install()
    try:
        yield _active
    finally:
        _active.remove()
        _active = None


def check() -> None:
    """End this job when it was asked to stop and is still running: between two stages."""
    if _active is not None:
        _active.check()


def start_kept(start: Callable[[], T]) -> T:
    """The result of `start`, which starts Ray in this thread. Our handlers are in force again afterwards.

    Ray's handler of SIGTERM raises SystemExit inside `ray.init`; here that is a stop like any other.
    """
    if _active is None or threading.current_thread() is not threading.main_thread():
        return start()
    try:
        return start()
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            _active(signal.SIGTERM, None)  # raises Ended
        raise
    finally:
        _active.keep()


@contextmanager
def unhandled() -> Iterator[None]:
    """Inside, a stop signal ends this process at once and without a word, as the system does it.

    For long calls of libraries that Python's handlers cannot interrupt, in stages that have made nothing yet.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if _active is None or _active not in before.values() or threading.current_thread() is not threading.main_thread():
        yield
        return
    for number, handler in before.items():
        if handler is _active:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        _active.keep()


def _write_stop_file(run_dir: str, attempts: int = 5) -> None:
    for attempt in range(1, attempts + 1):
        try:
            storage.write_bytes(stop_file(run_dir), b"")
            return
        except StorageError as error:
            print(f"cannot ask the training processes to stop ({error}); attempt {attempt} of {attempts}", flush=True)
            time.sleep(1.0)


def kill_after_s() -> int | None:
    """Seconds between the signal of `ray job stop` and SIGKILL; None for a process that is not a submitted job."""
    if SUBMITTED not in os.environ:
        return None
    value = os.environ.get(RAY_STOP_WAIT, "")
    return int(value) if value.isdecimal() else _RAY_DEFAULT_WAIT_S


def ask_ray_to_wait() -> None:
    """Give a job that was submitted without a wait time the one of our client. Ray must have been joined.

    Ray reads the time when a job is stopped, from the environment of the actor that supervises it. Where that actor
    cannot be told, `ray job stop` leaves a checkpoint 3 s, and the log says so.
    """
    if kill_after_s() is None or os.environ.get(RAY_STOP_WAIT):
        return
    import ray
    from ray.dashboard.modules.job.common import JOB_ACTOR_NAME_TEMPLATE, SUPERVISOR_ACTOR_RAY_NAMESPACE

    name, value = RAY_STOP_WAIT, str(WAIT_S)

    def tell(supervisor: Any) -> str:  # a nested function travels by value: the actor need not import this module
        import os

        if not os.environ.get(name):
            os.environ[name] = value
        return os.environ[name]

    try:
        job = json.loads(os.environ[SUBMITTED])["metadata"]["job_submission_id"]
        supervisor = ray.get_actor(JOB_ACTOR_NAME_TEMPLATE.format(job_id=job), SUPERVISOR_ACTOR_RAY_NAMESPACE)
        os.environ[name] = ray.get(supervisor.__ray_call__.remote(tell), timeout=20)
    except Exception as error:  # Ray's internals; a job that cannot be told is stopped as Ray stops it
        warn_of_short_stop(f" ({type(error).__name__})")


def warn_of_short_stop(reason: str = "") -> None:
    """Say that `ray job stop` will not wait for a checkpoint, and what makes it wait, where that is so."""
    wait = kill_after_s()
    if wait is None or wait >= _SHORT_WAIT_S:
        return
    print(
        f"`ray job stop` kills this job after {wait} s{reason}; a checkpoint that takes longer is lost. Submit with "
        f'--runtime-env-json \'{{"env_vars": {{"{RAY_STOP_WAIT}": "{WAIT_S}"}}}}\', or start the cluster with '
        f"{RAY_STOP_WAIT}={WAIT_S}.",
        flush=True,
    )
