"""The environment of jobs: `.mc_env`, what a submitted job is given, and what is never sent.

Ray writes a job's runtime environment into its logs and shows it on its dashboard. So secrets never travel in it: on
a one-machine cluster processes inherit them, on any other cluster they come from its own environment or `.mc_env`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from megacontext.errors import UserError
from megacontext.telemetry.provenance import is_secret_name

ROOT = Path(__file__).resolve().parents[1]

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
    "MC_OTEL_ENDPOINT",
    "MC_OTEL_INSECURE",
)
NEEDED_SECRETS = ("WANDB_API_KEY", "HF_TOKEN")


def env_file() -> Path | None:
    """`MEGACONTEXT_ENV_FILE`, else `.mc_env` in the current folder, the source folder or the home folder; None if absent."""
    given = os.environ.get("MEGACONTEXT_ENV_FILE")
    places = [Path(given)] if given else [Path.cwd() / ".mc_env", ROOT / ".mc_env", Path.home() / ".mc_env"]
    found = next((path for path in places if path.is_file()), None)
    if given and found is None:
        raise UserError(
            f"MEGACONTEXT_ENV_FILE is {given!r}, and no such file exists. Run cluster/setup.sh or unset it."
        )
    return found


def parse_env_file(text: str, name: str = ".mc_env") -> dict[str, str]:
    """`[export ]NAME=value` lines with shell quoting; blank lines and comments are skipped. UserError names a bad line."""
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(
                f"line {number} of {name}: {error}. Write NAME=value, quoted where it has spaces."
            ) from None
        words = words[1:] if words[:1] == ["export"] else words
        if not words:
            continue
        key, equals, value = words[0].partition("=")
        if len(words) != 1 or not equals or not key.isidentifier():
            raise UserError(f"line {number} of {name} is not NAME=value. Quote values that have spaces.")
        values[key] = value
    return values


def load(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Add the settings of `.mc_env` that the environment does not have yet; returns the file read.

    Raises UserError when the file is damaged, or readable by other users: it holds secrets.
    """
    path = env_file()
    if path is None:
        return None
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by other users and holds secrets. Run: chmod 600 {shlex.quote(str(path))}")
    for key, value in parse_env_file(path.read_text(), str(path)).items():
        if value and not environment.get(key):
            environment[key] = value
    return path


def job_env_vars(environment: Mapping[str, str], revision: str) -> dict[str, str]:
    """Variables for the runtime environment of a submitted job; none of them is secret."""
    sent = {name: environment[name] for name in FORWARDED if environment.get(name)}
    assert not any(is_secret_name(name) for name in sent)
    # Ray kills a stopped job after 3 s unless told otherwise; a checkpoint takes longer.
    return {
        **sent,
        "RAY_JOB_STOP_WAIT_TIME_S": environment.get("RAY_JOB_STOP_WAIT_TIME_S", "120"),
        "MEGACONTEXT_REVISION": revision,
    }


def secrets_kept_back(environment: Mapping[str, str]) -> list[str]:
    """Names of the secrets set here that a job on another cluster will have to find there."""
    return [name for name in NEEDED_SECRETS if environment.get(name)]
