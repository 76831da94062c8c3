"""The environment of jobs: `.mc_env`, what a submitted job is given, and what is never sent.

Ray writes a job's runtime environment into its logs and shows it on its dashboard. So secrets never travel in it: on
a one-machine cluster processes inherit them, on any other cluster they come from its own environment or `.mc_env`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from jobs.runtime.env_file import read_env_file
from jobs.runtime.user_paths import is_relative, settle_user, user_path
from megacontext.errors import UserError
from megacontext.telemetry.provenance import is_secret_name

ROOT = Path(__file__).resolve().parents[2]

# Settings without secrets that a submitted job gets from the client.
FORWARDED = (
    "NANOCHAT_BASE_DIR",
    "WANDB_RUN",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "MEGACONTEXT_ENABLE_WANDB",
    "HF_HOME",
    "HF_ENDPOINT",
    *(f"MC_OTEL_{name}" for name in ("ENDPOINT", "INSECURE")),
    *(
        f"OTEL_{name}"
        for name in ("SDK_DISABLED", "SERVICE_NAME", "RESOURCE_ATTRIBUTES", "TRACES_EXPORTER", "METRICS_EXPORTER")
    ),
    *(
        f"OTEL_EXPORTER_OTLP_{signal}{name}"
        for signal in ("", "TRACES_", "METRICS_")
        for name in ("ENDPOINT", "PROTOCOL", "INSECURE", "TIMEOUT")
    ),
)
PATHS = ("NANOCHAT_BASE_DIR", "HF_HOME", "MEGACONTEXT_ENV_FILE")  # variables that hold a path
NEEDED_SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "OTEL_EXPORTER_OTLP_HEADERS")


def env_file() -> Path | None:
    """`MEGACONTEXT_ENV_FILE`, else `.mc_env` in the current folder, the source folder or the home folder; None if absent."""
    given = os.environ.get("MEGACONTEXT_ENV_FILE")
    if given:
        path = user_path(given, "MEGACONTEXT_ENV_FILE")
        if not os.path.isfile(path):
            raise UserError(
                f"MEGACONTEXT_ENV_FILE is {given!r}, and no such file exists. Run cluster/setup.sh or unset it."
            )
        return Path(path)
    # os.path's functions: pathlib's raise without a home folder, and where a folder may not be entered.
    places = [".mc_env", str(ROOT / ".mc_env"), os.path.expanduser("~/.mc_env")]
    return next((Path(place).absolute() for place in places if os.path.isfile(place)), None)


def load(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Add the settings of `.mc_env` that the environment does not have yet; returns the file read.

    Then names the user where the system has no name (`settle_user`). Raises UserError when the file is damaged, or
    readable by other users: it holds secrets.
    """
    path = env_file()
    if path is not None:
        _add_settings(path, environment)
    settle_user(environment)
    return path


def _add_settings(path: Path, environment: MutableMapping[str, str]) -> None:
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by other users and holds secrets. Run: chmod 600 {shlex.quote(str(path))}")
    for key, value in read_env_file(path, environment).items():
        if value and not environment.get(key):
            environment[key] = value


def job_env_vars(environment: Mapping[str, str], revision: str) -> dict[str, str]:
    """Variables that every submitted job gets in its runtime environment."""
    # Ray kills a stopped job after 3 s unless told otherwise; a checkpoint takes longer.
    return {
        "RAY_JOB_STOP_WAIT_TIME_S": environment.get("RAY_JOB_STOP_WAIT_TIME_S", "120"),
        "MEGACONTEXT_REVISION": revision,
    }


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings that a job on another cluster gets in its runtime environment; none of them is secret.

    Raises UserError for a value with a $, because Ray replaces what looks like a variable by its value on the cluster.
    """
    sent = {name: environment[name] for name in FORWARDED if environment.get(name)}
    assert not any(is_secret_name(name) for name in sent)
    for name, value in sent.items():
        if "$" in value:
            raise UserError(f"{name} is {value!r}; Ray cannot send a value with a $. Set {name} on the cluster.")
    return sent


def fix_paths(environment: MutableMapping[str, str], same_machine: bool) -> None:
    """Make the paths among the variables absolute for a job on this machine; raise UserError for relative ones elsewhere."""
    for name in PATHS:
        value = environment.get(name, "")
        if same_machine:
            if value:
                environment[name] = user_path(value, name)
        elif name in FORWARDED and is_relative(value):
            raise UserError(
                f"{name} is {value!r}, a relative path, and the job runs on other machines. Give an absolute path there."
            )


def secrets_kept_back(environment: Mapping[str, str]) -> list[str]:
    """Names of the secrets set here that a job on another cluster will have to find there."""
    return [name for name in NEEDED_SECRETS if environment.get(name)]
