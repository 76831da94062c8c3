"""Command lines of the jobs: sections of `megacontext.config` become flags, tiers their defaults."""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType, SimpleNamespace
from typing import Any

from jobs.runtime import environment, run_settings
from jobs.runtime.hardware import detect_tier
from jobs.runtime.own_lines import own_lines
from jobs.runtime.parser import Parser
from jobs.runtime.run_settings import SECTIONS, settings_of_start
from jobs.runtime.stopping import Ended, Stopped, handled
from jobs.runtime.user_paths import base_folder, user_path
from megacontext import storage
from megacontext.checkpoint import checkpoint_name
from megacontext.config import (
    MC_IMPLIES,
    TIERS,
    DataConfig,
    EvalConfig,
    FocusConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    preset,
)
from megacontext.errors import MegaContextError, UserError
from megacontext.flags import from_flat, is_switch, own_fields


class Args(SimpleNamespace):
    """Parsed sections by name: `args.run`, `args.data`, …; those of no flag of a job hold the defaults of run and tier.

    given: names of the flags that the user gave. inherited: what the run's `config.yaml` set in place of the tier's
    defaults, by name.
    """

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    memory: MemoryConfig
    focus: FocusConfig
    eval: EvalConfig
    given: frozenset[str]
    inherited: Mapping[str, Any]


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


def parse(
    sections: Sequence[type[Any]],
    description: str | None,
    argv: Sequence[str] | None = None,
    aliases: Mapping[str, Sequence[str]] = MappingProxyType({}),
    stage: str = "",
) -> Args:
    """Parse flags of the given sections over the defaults of run and tier. Unknown flags end the program with 2.

    `--help` shows the flags of a section that are marked as first, all of them where none is.
    aliases: other spellings of flags, by name. stage: the name of the stage of training that is parsed for, if one is.
    """
    finish(environment.load)  # .mc_env may name the base folder, which is a default below
    parser = Parser(description)
    for section in sections:
        add_section(parser, section, aliases)
    if DataConfig in sections and MemoryConfig not in sections:
        parser.add_argument(
            "--mc", nargs="?", const=1, type=int, default=argparse.SUPPRESS, metavar="INT",
            help="the run has a memory: what this implies for vocabulary and rows holds here too (0 or 1) [default 0]",
        )  # fmt: skip
    parser.add_argument(
        "--config", default="", metavar="FILE",
        help="YAML file of settings, by name of the flag: your own, or config.yaml of another run; flags on the command line "
        "go before it [default: none]",
    )  # fmt: skip
    flags = vars(parser.parse_args(argv))
    path = flags.pop("config")

    def resolved() -> Args:
        return resolve({**(run_settings.of_file(user_path(path, "--config")) if path else {}), **flags}, stage)

    args: Args = finish(resolved)
    return args


def add_section(
    parser: Parser, section: type[Any], aliases: Mapping[str, Sequence[str]] = MappingProxyType({}), note: str = ""
) -> None:
    """Add the flags of a section to a parser; those that are not given are absent from what it parses.

    note: what help says of every default, in place of the section's own.
    """
    group = parser.add_argument_group(section.__name__, (section.__doc__ or "").split("\n")[0])
    some = any(item.metadata["first"] for item in fields(section))
    for item in own_fields(section):
        switch = {"nargs": "?", "const": 1} if is_switch(item) else {}
        action = group.add_argument(
            f"--{item.name}",
            *aliases.get(item.name, ()),
            **switch,
            type=type(item.default),
            default=argparse.SUPPRESS,
            choices=item.metadata["choices"] or None,
            metavar=None if item.metadata["choices"] else type(item.default).__name__.upper(),
            help=f"{item.metadata['help']} [{note or tier_note(item.name, item.default)}]".replace("%", "%%"),
        )
        if some and not item.metadata["first"]:
            parser.hide(action)


def tier_note(name: str, default: Any) -> str:
    """The default of a flag, and where tiers set another one."""
    others = [f"{tier}: {values[name]}" for tier, values in TIERS.items() if name in values]
    others += [f"{tier} with --mc: {values[name]}" for tier, values in MC_IMPLIES.items() if name in values]
    return ", ".join([f"default {default!r}" if default != "" else "default: empty", *others])


def resolve(given: Mapping[str, Any], stage: str = "") -> Args:
    """All settings of a job: what the user gave, over the settings of the run, over the tier's, over the defaults.

    `stage` names the stage of training that the job is, if it is one: its own earlier settings go before the run's.
    What `--mc` implies counts as the tier's. With `--init_from` the shape is that of the model taken over. Raises UserError for impossible values and for ones that
    contradict that model, and when `config.yaml` of the run is damaged.
    """
    where = absolute_paths(given)
    run = from_flat(RunConfig, where)
    run_dir = storage.join(run.storage, run.run)
    inherited = run_settings.read(run_dir).inherited(stage)
    tier = next(
        (name for name in (given.get("tier"), inherited.get("tier")) if name not in (None, "auto")), None
    ) or detect_tier(run.launcher)
    if tier != inherited.get("tier", tier) and inherited["tier"] != "auto":
        raise UserError(
            f"--tier is {tier!r}, and run {run.run!r} was made with --tier {inherited['tier']}; its settings stay those of "
            f"that tier. Leave --tier out to go on with it, or start another --run. The run is in {run_dir!r}."
        )
    preset_values = preset(tier, {**inherited, **where})
    flat = {**preset_values, **inherited, **where, "tier": tier}
    if flat.get("init_from"):
        flat |= settings_of_start(flat, given, start_dir(run_dir))
    sections = {name: from_flat(section, flat) for name, section in SECTIONS.items()}
    plain = {item.name: item.default for section in SECTIONS.values() for item in fields(section)} | preset_values
    taken = {name: value for name, value in inherited.items() if name not in given and value != plain[name]}
    return Args(**sections, given=frozenset(given), inherited=taken)


def run_folder(given: Mapping[str, Any]) -> str:
    """The folder of the run that settings name; no setting of the run is read. Raises UserError for an impossible name."""
    run = from_flat(RunConfig, absolute_paths(given))
    return storage.join(run.storage, run.run)


def absolute_paths(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings with absolute paths, because workers run in other folders; base folder and storage are filled in."""
    flat = dict(given)
    flat["base_dir"] = base_folder(flat.get("base_dir", ""))
    flat["storage"] = flat.get("storage") or storage.join(flat["base_dir"], "runs")
    for name in ("storage", "data_dir", "eval_bundle", "init_from"):
        if flat.get(name):
            flat[name] = user_path(flat[name], f"--{name}")
    return flat


def paths(args: Args) -> Paths:
    """The folders of a run. Text and tokens are keyed by what they were made from, so runs can share them."""
    base = args.run.base_dir
    source = source_name(flat_values(args))
    name = f"{source}-v{args.data.vocab_size}"
    for letter, key in (("c", "tok_max_chars"), ("d", "tok_doc_cap")):  # other samples of the text, other vocabularies
        value = getattr(args.data, key)
        name += f"-{letter}{value}" if value != getattr(DataConfig, key) else ""
    shortest = args.data.min_doc_chars
    run_dir = storage.join(args.run.storage, args.run.run)
    start = start_dir(run_dir)
    tokenizer_dir = storage.join(base, "tokenizer", name)
    if args.run.init_from:
        tokenizer_dir = storage.join(start, checkpoint_name("start", 0), "tokenizer")
    return Paths(
        base_dir=base,
        data_dir=args.data.data_dir or storage.join(base, "data", source),
        tokenizer_dir=tokenizer_dir,
        tokens_dir=storage.join(base, "tokens", name + (f"-min{shortest}" if shortest else "")),
        run_dir=run_dir,
        checkpoints_dir=storage.join(run_dir, "checkpoints"),
        start_dir=start,
    )


def start_dir(run_dir: str) -> str:
    """Where a run keeps its copy of the model that it starts from."""
    return storage.join(run_dir, "start")


def flat_values(args: Args) -> dict[str, Any]:
    """All settings by name of the flag."""
    return {name: value for section in SECTIONS for name, value in asdict(getattr(args, section)).items()}


def flat_config(args: Args) -> dict[str, dict[str, Any]]:
    """All sections as plain data, for config.yaml and checkpoints."""
    return {name: asdict(getattr(args, name)) for name in SECTIONS}


def print_config(args: Args, sections: Sequence[type[Any]]) -> None:
    """Print the resolved settings of a job, one line a section."""
    for name, section in SECTIONS.items():
        if section in sections:
            own = ((item.name, getattr(getattr(args, name), item.name)) for item in own_fields(section))
            print(f"{name}: " + " ".join(f"{key}={value}" for key, value in own), flush=True)
    if args.inherited:
        taken = " ".join(f"{name}={value}" for name, value in sorted(args.inherited.items()))
        print(f"from config.yaml of the run: {taken}", flush=True)
    print(f"run folder: {paths(args).run_dir}", flush=True)  # `jobs/runtime/submit.py` reads this line


def source_name(values: Mapping[str, Any]) -> str:
    """Names the text that settings choose: the user's folder, this Python's own files, or the downloaded shards."""
    data_dir = values.get("data_dir")
    if data_dir:
        return f"{data_dir.rstrip('/').rsplit('/', 1)[-1]}-{hashlib.sha256(data_dir.encode()).hexdigest()[:8]}"
    if values.get("tier") == "cpu":
        return f"python-{platform.python_version()}"
    return f"web-{values.get('data_shards')}"


def finish(work: Callable[[], Any]) -> Any:
    """Run a job's work and return its result.

    A user's error ends the job with its message and exit status 1. A stop signal ends it with one line and exit status
    128 + the signal: 130 after Ctrl-C, 143 after SIGTERM. Neither prints a traceback.
    """
    with handled() as stop, own_lines():
        try:
            return work()
        except Stopped as error:
            said = str(error)
        except MegaContextError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from None
        except (KeyboardInterrupt, Ended):
            said = stop.last_words
        print(said, file=sys.stderr, flush=True)
        raise SystemExit(stop.exit_status)
