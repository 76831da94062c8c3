"""The house keeps its rules: import direction, no Ray in the library, short files, a true map, no machine's paths."""

from __future__ import annotations

import ast
import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400

# A file may import its own package and packages of lower rank. Root files of megacontext are rank 0.
RANK = {"model": 1, "context": 1, "data": 1, "telemetry": 1, "inference": 2, "eval": 3, "train": 4, "bench": 5}
PUBLIC_FACE = ("megacontext/api.py", "megacontext/__init__.py")  # imported by nothing inside; may use what it exposes
MAY_USE = {  # beside rank: who may see which top-level package
    "megacontext": {"megacontext"},
    "jobs": {"megacontext", "jobs"},
    "serve": {"megacontext", "jobs", "serve"},  # of jobs the runtime alone
    "tune": {"megacontext", "jobs", "tune"},
}
TOP_LEVEL = {
    "megacontext", "jobs", "serve", "tune", "cluster", "tests", "pyproject.toml", "README.md", "Makefile", "LICENSE",
}  # fmt: skip
UNCHECKED = {"build", "dist", "wandb", "runs", "data"}  # made by tools and runs, ignored by git
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(home|root|Users|work|mnt|workspace)/\w")


def tracked(*suffixes: str) -> list[Path]:
    """Files that git has or would add; every file below the checkout where there is no git."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = done.stdout.splitlines() if done.returncode == 0 else []
    paths = [ROOT / name for name in names] or [
        path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)
    ]
    return sorted(path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes))


def imported(source: str, path: str) -> list[tuple[str, int]]:
    """(absolute module, line) of every import in a file, also inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def violations(path: str, source: str) -> list[str]:
    """Forbidden imports of a file; path is relative to the repository."""
    top, *rest = Path(path).parts
    own = rest[0] if top == "megacontext" and len(rest) > 1 else ""
    shared = top == "serve" or (top == "jobs" and rest[0] == "runtime")  # may use jobs/runtime/, not the jobs
    found = []
    for module, line in imported(source, path):
        package, *inner = module.split(".")
        where = f"{path}:{line}: imports {module}"
        if package == "ray" and top == "megacontext":
            found.append(f"{where}; the library never imports ray")
        if package in MAY_USE and package not in MAY_USE[top]:
            found.append(f"{where}; {top} may not use {package}")
        if package == "jobs" and shared and inner[:1] != ["runtime"]:
            found.append(f"{where}; {top} may use jobs.runtime alone")
        if package == top == "megacontext" and path not in PUBLIC_FACE:
            other = inner[0] if inner and inner[0] in RANK else ""
            if other and other != own and RANK[other] >= RANK.get(own, 0):
                found.append(f"{where}; {own or 'a root file'} may not use {other}")
            if inner[:1] == ["api"]:
                found.append(f"{where}; the public face is for users")
    return found


def test_imports_go_one_way() -> None:
    wrong = []
    for path in tracked(".py"):
        relative = path.relative_to(ROOT).as_posix()
        if relative.split("/")[0] in MAY_USE:
            wrong += violations(relative, path.read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megacontext/model/gpt.py", "from megacontext.data.tokenizer import Tokenizer"),
        ("megacontext/model/gpt.py", "def f():\n    import ray"),
        ("megacontext/train/loop.py", "from ray.train import report"),
        ("megacontext/data/shards.py", "from megacontext import train"),
        ("megacontext/storage.py", "import megacontext.model.gpt"),
        ("megacontext/eval/bpb.py", "from megacontext.train.step import Stepper"),
        ("megacontext/telemetry/report.py", "from megacontext.data import shards"),
        ("megacontext/train/loop.py", "from jobs import cli"),
        ("megacontext/train/loop.py", "from megacontext.api import load"),
        ("jobs/runtime/launch.py", "from serve.app import build_app"),
        ("serve/app.py", "from jobs import cli"),
    ],
)
def test_a_wrong_import_is_caught(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "megacontext/train/loop.py",
            "from megacontext.telemetry.tracker import Tracker\nfrom megacontext.model.gpt import GPT",
        ),
        ("megacontext/api.py", "from megacontext.train.checkpoint import load"),
        ("megacontext/inference/engine.py", "from megacontext import errors, storage"),
        ("jobs/runtime/launch.py", "import ray\nfrom megacontext.train import loop"),
        ("tune/sweep.py", "from jobs import launch"),
        ("megacontext/bench/train_step.py", "from megacontext.train import step"),
    ],
)
def test_a_right_import_is_allowed(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in tracked(".py", ".sh")}
    assert {path.name: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_top_level_is_what_the_design_says() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} - TOP_LEVEL - UNCHECKED == set()
    for name in ("README.md", "LICENSE", "Makefile", "pyproject.toml"):
        assert name in names


def test_no_path_of_a_machine_is_written_down() -> None:
    wrong = []
    for path in tracked(".py", ".md", ".toml", ".yaml", ".sh"):
        if path.name == "test_layout.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def map_of_readme(text: str) -> dict[str, list[str]]:
    """{folder: names} of the block under `## Map`: `folder/   name, name: what it is`."""
    block = re.search(r"^## Map\n.*?```\n(.*?)```", text, re.S | re.M)
    assert block, "README.md has no '## Map' block"
    found: dict[str, list[str]] = {}
    folder = ""
    for line in block.group(1).splitlines():
        entry = re.match(r"^(\S*/)?\s+(.*?)(?:\s{2,}#.*)?$", line)
        assert entry, f"cannot read the map's line {line!r}"
        folder = entry.group(1) or folder
        found.setdefault(folder.rstrip("/"), []).extend(name for name in re.split(r"[,\s]+", entry.group(2)) if name)
    return found


def test_readme_map_equals_the_disk() -> None:
    listed = map_of_readme((ROOT / "README.md").read_text())
    files = tracked()
    for folder, names in listed.items():
        for name in names:
            path = ROOT / folder / name
            assert path.is_file() or path.with_suffix(".py").is_file() or path.is_dir(), (
                f"the map lists {folder}/{name}, which is absent"
            )
    missing = []
    for path in files:
        relative = path.relative_to(ROOT)
        folder, top = relative.parent.as_posix(), relative.parts[0]
        code = path.suffix == ".py" and top in ("megacontext", "jobs", "serve", "tune") and path.name != "__init__.py"
        if (code and path.stem not in listed.get(folder, [])) or (
            top == "cluster" and path.name not in listed.get(folder, [])
        ):
            missing.append(str(relative))
    assert not missing, f"not in the README's map: {missing}"


def test_importing_does_nothing() -> None:
    """Importing the library starts no Ray, touches no torch and configures no logging."""
    code = (
        "import sys, logging, threading; import megacontext, megacontext.config, megacontext.storage, megacontext.telemetry.tracker\n"
        "assert not {'torch', 'ray', 'wandb', 'matplotlib'} & set(sys.modules), 'heavy import'\n"
        "assert not logging.getLogger().handlers and threading.active_count() == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["local.yaml", "h100x8.yaml"])
def test_cluster_files_are_valid_and_ask_for_a_token(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster" / name).read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    starts = [
        c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in config[key] if "ray start" in c
    ]
    assert starts
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    with pytest.raises(Exception, match="unknown_key"):
        validate_config(prepare_config({**copy.deepcopy(config), "unknown_key": 1}))
