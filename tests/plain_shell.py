"""Commands as a user types them: in a checkout with a `.venv`, in a shell that knows no Python and no Ray of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = (
    "awk",
    "bash",
    "cat",
    "chmod",
    "dirname",
    "env",
    "git",
    "grep",
    "make",
    "mktemp",
    "mv",
    "rm",
    "sed",
    "sh",
    "touch",
)


def checkout(folder: Path, recorded: Path | None = None, links: bool = True) -> Path:
    """A checkout in `folder` whose `.venv` is the running Python's, or one whose programs only write to `recorded`.

    links: its files are links to those of this checkout, not copies.
    """
    (folder / "bin").mkdir(parents=True)
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (folder / "bin" / tool).symlink_to(found)
    root = folder / "checkout"
    root.mkdir()
    for name in ("Makefile", "pyproject.toml", "README.md", ".gitignore", "megacontext", "jobs", "tests", "cluster"):
        if links:
            (root / name).symlink_to(ROOT / name)
        elif (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    if recorded is None:
        (root / ".venv").symlink_to(sys.prefix)
        return root
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "ray", "ruff", "mypy"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >"{recorded}"\n')
        (programs / name).chmod(0o755)
    (root / ".venv" / ".installed").touch()
    return root


def run(command: str, root: Path, timeout_s: float = 200, **env: str) -> subprocess.CompletedProcess[str]:
    """What a plain shell in the checkout does with a line."""
    known = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VIRTUAL_ENV", "PYTHON"))
    }
    known |= {"PATH": str(root.parent / "bin"), **env}
    return subprocess.run(
        ["bash", "-c", command], cwd=root, env=known, capture_output=True, text=True, timeout=timeout_s, check=False
    )
