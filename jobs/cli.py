"""Command lines of the jobs: sections of `megacontext.config` become flags, tiers their defaults."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

from jobs import environment
from megacontext import storage
from megacontext.config import (
    TIERS,
    DataConfig,
    EvalConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    default_base_dir,
    from_flat,
)
from megacontext.errors import MegaContextError
from megacontext.train.checkpoint import checkpoint_name

SECTIONS: Mapping[str, type[Any]] = {
    "run": RunConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "memory": MemoryConfig,
    "eval": EvalConfig,
}

_SWITCHES = frozenset({"mc"})  # flags that may stand without their value, which is then 1


class Args(SimpleNamespace):
    """Parsed sections by name: `args.run`, `args.data`, …; sections a job did not ask for hold the tier's defaults."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    memory: MemoryConfig
    eval: EvalConfig


@dataclass(frozen=True)
class Paths:
    """Where a run keeps its things. `run_dir` and below may be URIs; the rest are folders of the machine."""

    base_dir: str
    data_dir: str
    tokenizer_dir: str
    tokens_dir: str
    run_dir: str
    checkpoints_dir: str
    start_dir: str


def parse(sections: Sequence[type[Any]], description: str | None, argv: Sequence[str] | None = None) -> Args:
    """Parse flags of the given sections over the defaults of the chosen tier. Unknown flags end the program with 2."""
    finish(environment.load)  # .mc_env may name the base folder, which is a default below
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for section in sections:
        group = parser.add_argument_group(section.__name__, (section.__doc__ or "").split("\n")[0])
        for item in fields(section):
            switch = {"nargs": "?", "const": 1} if item.name in _SWITCHES else {}
            group.add_argument(
                f"--{item.name}",
                **switch,
                type=type(item.default),
                default=argparse.SUPPRESS,
                choices=item.metadata["choices"] or None,
                metavar=None if item.metadata["choices"] else type(item.default).__name__.upper(),
                help=f"{item.metadata['help']} [{tier_note(item.name, item.default)}]".replace("%", "%%"),
            )
    given = vars(parser.parse_args(argv))
    resolved: Args = finish(lambda: resolve(given))
    return resolved


def tier_note(name: str, default: Any) -> str:
    """The default of a flag, and where tiers set another one."""
    others = [f"{tier}: {values[name]}" for tier, values in TIERS.items() if name in values]
    return ", ".join([f"default {default!r}", *others])


def resolve(given: Mapping[str, Any]) -> Args:
    """Flags given by the user over the tier's values over the defaults."""
    tier = given.get("tier", RunConfig.tier)
    if tier == "auto":
        tier = detect_tier()
    flat = {**TIERS[tier], **given, "tier": tier}
    flat["base_dir"] = os.path.abspath(os.path.expanduser(flat.get("base_dir") or default_base_dir()))
    flat["storage"] = flat.get("storage") or storage.join(flat["base_dir"], "runs")
    if storage.is_local(flat["storage"]):
        flat["storage"] = str(storage.local_path(flat["storage"]).absolute())  # workers run in other folders
    for name in ("data_dir", "eval_bundle", "init_from"):
        if flat.get(name) and storage.is_local(flat[name]):
            flat[name] = str(storage.local_path(flat[name]).absolute())
    return Args(**{name: from_flat(section, flat) for name, section in SECTIONS.items()})


def detect_tier() -> str:
    """`cpu` when this machine sees no GPU, `speedrun` with eight or more, else by the memory of the first."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if torch.cuda.device_count() >= 8:
        return "speedrun"
    return "h100" if torch.cuda.get_device_properties(0).total_memory > 48 * 2**30 else "5090"


def paths(args: Args) -> Paths:
    """The folders of a run. Text and tokens are keyed by what they were made from, so runs can share them."""
    base = args.run.base_dir
    source = _source_name(args)
    name = f"{source}-v{args.data.vocab_size}"
    shortest = args.data.min_doc_chars
    run_dir = storage.join(args.run.storage, args.run.run)
    start_dir = storage.join(run_dir, "start")
    tokenizer_dir = storage.join(base, "tokenizer", name)
    if args.run.init_from:
        tokenizer_dir = storage.join(start_dir, checkpoint_name("start", 0), "tokenizer")
    return Paths(
        base_dir=base,
        data_dir=args.data.data_dir or storage.join(base, "data", source),
        tokenizer_dir=tokenizer_dir,
        tokens_dir=storage.join(base, "tokens", name + (f"-min{shortest}" if shortest else "")),
        run_dir=run_dir,
        checkpoints_dir=storage.join(run_dir, "checkpoints"),
        start_dir=start_dir,
    )


def flat_config(args: Args) -> dict[str, dict[str, Any]]:
    """All sections as plain data, for config.yaml and checkpoints."""
    return {name: asdict(getattr(args, name)) for name in SECTIONS}


def print_config(args: Args, sections: Sequence[type[Any]]) -> None:
    """Print the resolved settings of a job, one line a section."""
    for name, section in SECTIONS.items():
        if section in sections:
            print(
                f"{name}: " + " ".join(f"{key}={value}" for key, value in asdict(getattr(args, name)).items()),
                flush=True,
            )
    print(f"run folder: {paths(args).run_dir}", flush=True)  # `jobs/submit.py` reads this line


def _source_name(args: Args) -> str:
    """Names the text a run is made from: the user's folder, this Python's own files, or the downloaded shards."""
    data_dir = args.data.data_dir
    if data_dir:
        return f"{data_dir.rstrip('/').rsplit('/', 1)[-1]}-{hashlib.sha256(data_dir.encode()).hexdigest()[:8]}"
    if args.run.tier == "cpu":
        return f"python-{platform.python_version()}"
    return f"web-{args.data.data_shards}"


def finish(work: Callable[[], Any]) -> Any:
    """Run a job's work and return its result; a user's error ends it with its message and exit status 1, no traceback."""
    try:
        return work()
    except MegaContextError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
