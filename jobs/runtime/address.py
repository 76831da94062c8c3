"""The Ray cluster that RAY_ADDRESS or `--address` names: found out before anything is sent to it, in one sentence."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from megacontext.errors import UserError
from megacontext.reach import reply_of, why

VARIABLES = (
    "RAY_API_SERVER_ADDRESS",
    "RAY_ADDRESS",
)  # in Ray's order; for Ray's client both count more than its --address
_TIMEOUT_S = 10.0
_FORM = "An address is the URL of a Ray dashboard, for example http://localhost:8265."
_HERE = "Without --address and RAY_ADDRESS a cluster is started on this machine."


def address_of(flag: str, environment: Mapping[str, str]) -> str:
    """The address of `--address`, else of the environment; empty when there is none."""
    return next((given for given in (flag, *(environment.get(name, "").strip() for name in VARIABLES)) if given), "")


def client_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of Ray's client: its token is used when there is one, and no variable names another cluster."""
    settings = {name: value for name, value in environment.items() if name not in VARIABLES}
    if _token(environment):
        settings.setdefault("RAY_AUTH_MODE", "token")  # Ray's client ignores a token unless the mode says so
    return settings


def check_dashboard(address: str, environment: Mapping[str, str]) -> None:
    """Raise UserError unless a Ray dashboard answers at an address and accepts our token.

    `auto` and the `host:port` of a cluster's control store are left to Ray, which finds the dashboard.
    """
    if address == "auto":
        return
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number
        fits = False
    if not fits:
        raise UserError(f"the Ray address is {address!r}. {_FORM} {_HERE}")
    token = _token(environment)
    headers = {"Authorization": f"Bearer {token}"} if token and environment.get("RAY_AUTH_MODE") == "token" else {}
    try:
        status, body = reply_of(f"{url.rstrip('/')}/api/version", headers, _TIMEOUT_S)
    except (OSError, ValueError) as error:
        if (
            "://" not in address
            and isinstance(error, ConnectionError)
            and not isinstance(error, ConnectionRefusedError)
        ):
            return  # something listens there that does not speak HTTP, as the control store does
        reason = why(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"no Ray dashboard answers at {address} ({reason}). {_FORM} {_HERE}") from None
    if status in (401, 403):
        state = "does not accept this token" if headers else "asks for a token"
        raise UserError(
            f"the Ray cluster at {address} {state}. Set RAY_AUTH_MODE=token, and put the cluster's token into "
            "~/.ray/auth_token, RAY_AUTH_TOKEN or the file that RAY_AUTH_TOKEN_PATH names."
        )
    if status != 200 or not _is_ray(body):
        raise UserError(f"what answers at {address} (status {status}) is no Ray dashboard. {_FORM} {_HERE}")


@contextmanager
def joining(address: str) -> Iterator[None]:
    """Around `ray.init` of a process that joins the cluster at RAY_ADDRESS: what fails there becomes a UserError."""
    import ray.exceptions

    remedy = "Unset RAY_ADDRESS to start Ray here, or submit the job to the cluster: .venv/bin/python -m jobs.runtime.submit -- python jobs/…"
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS is {address!r}, which takes submitted jobs; this process cannot join it. {remedy}"
        )
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()
        except (OSError, OverflowError) as error:
            reason = why(error) if isinstance(error, OSError) else str(error)
            raise UserError(f"nothing answers at RAY_ADDRESS {address!r} ({reason}). {remedy}") from None
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot join the Ray cluster at RAY_ADDRESS {address!r}: {lines[0]} {remedy}") from error


def _is_ray(body: bytes) -> bool:
    try:
        return "ray_version" in json.loads(body)
    except (ValueError, TypeError):
        return False


def _token(environment: Mapping[str, str]) -> str:
    """The token that Ray's client would use; empty when there is none or it cannot be read."""
    given = environment.get("RAY_AUTH_TOKEN")
    if given:
        return given.strip()
    path = environment.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    try:
        with open(path) as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""
