"""Paths as the user means them: relative ones begin at the user's folder, also in a job that Ray runs in another one.

Ray unpacks the source of a submitted job into a temporary folder, runs it there and deletes the folder with all that lies
in it. So the client sends the user's folder along when the job runs on the user's machine. On another machine that folder
means nothing, and a relative path is refused.
"""

from __future__ import annotations

import getpass
import os
import re
from argparse import Namespace
from collections.abc import MutableMapping
from pathlib import Path

from megacontext import storage
from megacontext.config import default_base_dir
from megacontext.errors import UserError

CALLER_DIR = "MEGACONTEXT_CALLER_DIR"  # variable with the user's folder, set by the client for a job on this machine
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in the processes of a submitted job
_HALF_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def user_path(path: str, name: str) -> str:
    """A path or URI that was given as `name` (a flag or a variable), absolute; an empty one stays empty.

    Raises UserError for a relative path in a job that does not know the user's folder, for `memory://`, which is empty at
    the start of a process and gone at its end, and for `~` without a home folder.
    """
    if "memory://" in path:
        raise UserError(
            f"{name} is {path!r}; memory:// is gone when a process ends, and each process of a job has its own. "
            "Give a folder or another URI."
        )
    if not path or not storage.is_local(path):
        return path
    if _HALF_URI.match(path):
        raise UserError(
            f"{name} is {path!r}; a URI has two slashes after the colon, as in file:///folder or s3://bucket/folder."
        )
    plain = storage.local_path(path)
    return str(plain if plain.is_absolute() else Path(_users_folder(path, name), plain))


def base_folder(given: str) -> str:
    """`--base_dir`, else NANOCHAT_BASE_DIR or its default, absolute. Raises UserError for what is no folder of a machine."""
    name = "--base_dir" if given else "NANOCHAT_BASE_DIR"
    folder = user_path(given or default_base_dir(), name)
    if not storage.is_local(folder):
        raise UserError(f"{name} is {folder!r}; it must be a folder of the machine. For runs there is --storage URI.")
    return os.path.abspath(folder)


def resolve_paths(args: Namespace, *names: str) -> None:
    """Make the named flags of a command line absolute, in place. Raises UserError as `user_path` does."""
    for name in names:
        setattr(args, name, user_path(getattr(args, name), f"--{name}"))


def is_relative(path: str) -> bool:
    """Whether what a path means depends on the folder in which it is used."""
    return (
        bool(path)
        and storage.is_local(path)
        and not path.startswith("~")
        and not storage.local_path(path).is_absolute()
    )


def _users_folder(path: str, name: str) -> str:
    if SUBMITTED in os.environ:
        try:
            return os.environ[CALLER_DIR]
        except KeyError:
            raise UserError(
                f"{name} is {path!r}, a relative path, and this job runs in a temporary folder of Ray that is deleted after "
                "it. Give an absolute path or a URI."
            ) from None
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UserError(
            f"{name} is {path!r}, a relative path, and the current folder does not exist any more. Give an absolute path."
        ) from None


def settle_user(environment: MutableMapping[str, str]) -> None:
    """Give a process what libraries ask for where its user id has no name, as in containers: a name and a home folder.

    Torch asks for the name when it is imported; W&B, Ray and matplotlib ask for the home folder, which becomes
    NANOCHAT_BASE_DIR where that is set.
    """
    if environment.get("HOME") == "":
        del environment["HOME"]
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment["USER"] = f"uid{os.getuid()}"
    base = environment.get("NANOCHAT_BASE_DIR")
    if base and "HOME" not in environment and os.path.expanduser("~") == "~":
        environment["HOME"] = user_path(base, "NANOCHAT_BASE_DIR")
