"""Where a result comes from: source revision, hardware, versions, start time; and no secrets in what is kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megacontext import storage

PACKAGES = ("torch", "ray", "numpy", "pyarrow", "tiktoken")
_SECRET_NAME = re.compile(
    r"(api_?key|token|secret|password|passwd|credential|otlp_(traces_|metrics_)?headers)", re.IGNORECASE
)
_NOT_SECRET = re.compile(r"(_path|_file|_mode|_dir|_endpoint|_url|_uri)$", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_SHORTEST_SECRET = 8  # characters; shorter values ("1", "true") would redact ordinary text


def source_revision() -> str:
    """Identity of the running source.

    In order: `MEGACONTEXT_REVISION` (the client sets it, because a job's copy of the source has no .git), the git
    commit with `-dirty` when tracked files were changed, else `files-<sha256>` over the package's .py files.
    """
    given = os.environ.get("MEGACONTEXT_REVISION")
    if given:
        return given
    root = Path(__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    if commit:
        return f"{commit}-dirty" if _git(root, "status", "--porcelain") else commit
    package = root / "megacontext"
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"files-{digest.hexdigest()[:12]}"


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git is absent or refuses (no commit yet, foreign owner)."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, RAM in bytes, GPU names and memory of this machine."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory_bytes": int(properties.total_memory)})
    return {"cpu": cpu_model(), "cpu_cores": usable_cores(), "ram_bytes": ram_bytes(), "gpus": gpus}


def cpu_model() -> str:
    """Marketing name of the processor, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no /proc: not Linux
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ram_bytes() -> int:
    """Physical memory of the machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def versions() -> dict[str, str]:
    """Python and the packages that decide numbers, read from their metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def collect() -> dict[str, Any]:
    """Everything a report's header says about where it comes from."""
    return {
        "revision": source_revision(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(shlex.join(sys.argv)),
        "host": platform.node(),
        "system": platform.platform(),
        "hardware": hardware(),
        "versions": versions(),
    }


def record(run_dir: str) -> dict[str, Any]:
    """Write `<run_dir>/provenance.json` and return it; the start time of the run's first start is kept."""
    path = storage.join(run_dir, "provenance.json")
    found = collect()
    with contextlib.suppress(
        FileNotFoundError, ValueError, KeyError
    ):  # first start, or a damaged file: now is what we know
        found["started"] = storage.read_json(path)["started"]
    storage.write_json(path, found)
    return found


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of the environment variables whose names say that they are secret, longest first."""
    source = os.environ if environment is None else environment
    values = {value for name, value in source.items() if is_secret_name(name) and len(value) >= _SHORTEST_SECRET}
    return sorted(values, key=len, reverse=True)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret (`WANDB_API_KEY`), not a path to one."""
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET.search(name)


def redact(value: Any) -> Any:
    """A copy of text or nested plain data with secrets of the environment and passwords in URIs replaced by `***`."""
    secrets = secret_values()

    def clean(item: Any) -> Any:
        if isinstance(item, str):
            for secret in secrets:
                item = item.replace(secret, "***")
            return _USERINFO.sub("***@", item)
        if isinstance(item, Mapping):
            return {key: clean(entry) for key, entry in item.items()}
        if isinstance(item, list | tuple):
            return [clean(entry) for entry in item]
        return item

    return clean(value)
