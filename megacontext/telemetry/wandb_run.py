"""A run of Weights & Biases beside `metrics.jsonl`: training never waits for W&B, and never ends because of it.

Whether W&B answers is found out before its client starts, which by itself would try for minutes. A W&B that is out of
reach, or that refuses the key, means a record in a local folder; one that fails later is left alone from then on.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from ssl import SSLError
from typing import Any

from megacontext import storage
from megacontext.errors import UserError
from megacontext.reach import reply_of, why
from megacontext.telemetry.provenance import redact

WANDB_PROJECT = "megacontext"
REACH_S = 5.0  # to wait for any reply of the server
INIT_S = 20.0  # to wait for the start of a run on a server that replies
FINISH_S = 60.0  # to wait for the upload of what is left at the end


class WandbRun:
    """A started run of the W&B client."""

    def __init__(self, run: Any, folder: str) -> None:
        self._run, self.folder = run, folder

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step, unless an earlier start of the run has uploaded this step."""
        if self._run is not None and step >= self._run.starting_step:  # training repeats uploaded steps exactly
            self._try(lambda run: run.log(dict(metrics), step=step))

    def finish(self, exit_code: int) -> None:
        """End the run; waits `FINISH_S` at most for its upload."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, work: Any) -> None:
        if self._run is None:
            return
        try:
            work(self._run)
        except Exception as error:  # the client raises errors of many kinds when its process has died
            self._run = None
            _say(f"W&B failed ({_shown(error)}) and gets no more records; metrics.jsonl has them all. What W&B "
                 f"has not received is in {self.folder}/wandb, upload it with `wandb sync`.")  # fmt: skip


def start(
    run_dir: str, run_name: str, config: dict[str, Any], mode: str, stage: str, demanded: bool
) -> WandbRun | None:
    """Start the W&B run of a stage, `online` or `offline`: grouped by run name, continued by a resumed run.

    Where W&B is out of reach or refuses, an online run becomes an offline one. None when the client cannot start at all.
    With `demanded` both are a UserError instead.
    """
    folder = str(storage.local_path(run_dir)) if storage.is_local(run_dir) else tempfile.mkdtemp(prefix="mc-wandb-")
    os.makedirs(folder, exist_ok=True)
    # Reports of the client itself, which its end would wait for where W&B does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    for way in ("online", "offline") if mode == "online" else ("offline",):
        try:
            if way == "online":
                _check_reach()
            return WandbRun(_init(folder, run_name, config, way, stage), folder)
        except Exception as error:  # of many kinds: no answer, a wrong key, a setting that W&B does not know
            reason = _shown(error)
        _forget()
        if demanded:
            raise UserError(
                f"cannot start W&B {way}: {reason}. Check WANDB_API_KEY, WANDB_BASE_URL and the network, "
                "or choose --wandb offline or off."
            )
        kept = f"recording offline in {folder}/wandb, upload later with `wandb sync`" if way == "online" else "not used"
        _say(f"W&B cannot start {way} ({reason}): {kept}.")
    return None


def _check_reach() -> None:
    """Raise OSError or ValueError when the server of W&B gives no reply at all."""
    import wandb

    settings = wandb.setup().settings
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    try:
        reply_of(f"{settings.base_url}/healthz", timeout_s=REACH_S, proxies={k: v for k, v in proxies.items() if v})
    except SSLError:
        pass  # the client has settings of its own for certificates
    except OSError as error:
        raise ConnectionError(f"{settings.base_url}: {why(error)}") from error


def _init(folder: str, run_name: str, config: dict[str, Any], mode: str, stage: str) -> Any:
    import wandb

    name = os.environ.get("WANDB_RUN") or run_name
    identity = "".join(c if c.isalnum() or c in "-_" else "-" for c in f"{name}-{stage}")[:128]
    # No console, git or code capture: those could carry secrets, and the revision is in the config.
    settings = wandb.Settings(
        console="off", disable_git=True, disable_code=True, save_code=False, silent=True, init_timeout=INIT_S,
        finish_timeout=FINISH_S,
    )  # fmt: skip
    how: Any = mode
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT), id=identity, name=name, group=name, job_type=stage,
        dir=folder, config=config, resume="allow", mode=how, settings=settings, reinit="finish_previous",
    )  # fmt: skip


def _forget() -> None:
    """End the client's process, which keeps the name of a run that it could not start for itself."""
    import wandb

    with contextlib.suppress(Exception):  # what has failed may fail to end as well
        wandb.teardown(exit_code=1)


def _shown(error: Exception) -> str:
    """An error as part of a line, without secrets."""
    text: str = redact(" ".join((str(error) or type(error).__name__).split()))
    return text[:300]


def _say(text: str) -> None:
    print(text, flush=True)
