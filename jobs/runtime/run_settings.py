"""The settings of a run: `config.yaml` in its folder, which later jobs take as their defaults, and what a stage was made with.

`config.yaml` holds, by section, the settings that the stages of the run read, and under `stages` the names of those
stages. A stage writes what it read when it begins. It never changes a value that belongs to a stage of higher rank:
training ranks above preparation, preparation above evaluation. A later stage of training changes no value of an earlier
one either: where its own values differ, they stand under `of_stage` and its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

import yaml

from megacontext import api, storage
from megacontext.checkpoint import MANIFEST, list_checkpoints
from megacontext.config import (
    DataConfig,
    EvalConfig,
    FocusConfig,
    GPTConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from megacontext.errors import UserError
from megacontext.flags import Section, check_value, decides, own_fields, reads
from megacontext.stages import BY_NAME, EVALUATE, PREPARE, STAGES, TRAIN, Stage
from megacontext.telemetry.report import read_stage

SECTIONS: Mapping[str, type[Section]] = {
    "run": RunConfig,
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "memory": MemoryConfig,
    "focus": FocusConfig,
    "eval": EvalConfig,
}
FLAGS: Mapping[str, tuple[type[Section], Field[Any]]] = {
    item.name: (section, item) for section in SECTIONS.values() for item in own_fields(section)
}
_OF_MEMORY = (MemoryConfig, FocusConfig)  # MemoryConfig inherits the focus settings, whose section is FocusConfig
START = "start"  # name of the stage whose checkpoint is the model that a run starts from
TEXT = "text"  # stands for the settings of _TEXT_FLAGS: all that counts is which text they choose
_TEXT_FLAGS = ("data_dir", "data_shards", "tier")
_RANK = {EVALUATE: 0, PREPARE: 1, TRAIN: 2}
_BEFORE_NAMES = [stage.name for stage in STAGES if not stage.after]  # who wrote a file without the names of stages


@dataclass(frozen=True)
class RunSettings:
    """What `config.yaml` of a run holds: `values` by name of the flag, the `stages` that wrote them, and the values of
    single stages that differ, `of_stage`.

    reliable: whether the names of the stages were in the file. Earlier versions did not write them, and let every job
    overwrite all values.
    """

    path: str
    values: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[str] = ()
    reliable: bool = True
    of_stage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, stage: str) -> dict[str, Any]:
        """The values of a stage, by its name."""
        return {**self.values, **self.of_stage.get(stage, {})}

    def inherited(self, stage: str = "") -> dict[str, Any]:
        """The values that a later job takes as its defaults: all but those that say where and how a job runs."""
        return {name: value for name, value in self.of(stage).items() if not FLAGS[name][1].metadata["machine"]}


def read(run_dir: str) -> RunSettings:
    """The settings of a run; none when it has no `config.yaml`.

    A file from before the names of stages were written counts as one of all stages; settings that this version does
    not have are left out with a line that names them. Raises UserError when the file is damaged.
    """
    path = storage.join(run_dir, "config.yaml")
    try:
        content = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        return RunSettings(path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not YAML ({' '.join(str(error).split())[:200]}).") from None
    return read_content(path, content)


def read_content(path: str, content: Any) -> RunSettings:
    """The settings in the content of a `config.yaml`. Raises UserError when it is damaged."""
    stages = content.get("stages", _BEFORE_NAMES) if isinstance(content, dict) else None
    of_stage = content.get("of_stage", {}) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(stages, list) or not isinstance(of_stage, dict):
        raise _damaged(path, "it does not hold sections of settings.")
    values: dict[str, Any] = {}
    for section in SECTIONS:
        values |= _known(path, section, content.get(section, {}))
    of_stage = {str(name): _known(path, f"of_stage: {name}", part) for name, part in of_stage.items()}
    return RunSettings(path, values, [str(name) for name in stages], "stages" in content, of_stage)


def of_file(path: str) -> dict[str, Any]:
    """The settings of a YAML file for `--config`, by name of the flag.

    The file is flat, or has sections as `config.yaml` has. Of a run's own `config.yaml`, what says where and how its jobs
    ran is left out. Raises UserError when there is no such file, for what is no setting, and for impossible values.
    """
    try:
        content = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"--config {path!r} does not exist; give a YAML file of settings.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path!r} is not YAML ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path!r} holds no settings; write one a line, such as `depth: 6`.")
    if "stages" in content:
        return read_content(path, content).inherited()
    values: dict[str, Any] = {}
    for name, value in content.items():
        values |= value if name in SECTIONS and isinstance(value, dict) else {name: value}
    for name, value in values.items():
        if name not in FLAGS:
            raise UserError(f"--config {path!r} has {name!r}, which is no setting; --help_all of the job lists them.")
        default = FLAGS[name][1].default
        try:
            if isinstance(default, float) and isinstance(value, str):
                values[name] = float(value)  # YAML takes 2e-2 for text
            elif isinstance(value, bool) and isinstance(default, int):
                values[name] = int(value)
        except ValueError:
            pass  # the check says what is wrong
        try:
            check_value(FLAGS[name][1], values[name])
        except UserError as error:
            raise UserError(f"--config {path!r}: {error}") from None
    return values


def _known(path: str, section: str, part: Any) -> dict[str, Any]:
    """The settings of a part of `config.yaml` that this version has. Raises UserError when the part is damaged."""
    if not isinstance(part, dict):
        raise _damaged(path, f"its section {section!r} does not hold settings.")
    unknown = sorted(str(name) for name in part if name not in FLAGS)
    if unknown:
        print(f"{path}: this version of megacontext has no setting {', '.join(unknown)}; left out", flush=True)
    values = {name: value for name, value in part.items() if name in FLAGS}
    for name, value in values.items():
        try:
            check_value(FLAGS[name][1], value)
        except UserError as error:
            raise _damaged(path, str(error)) from None
    return values


def record(run_dir: str, stage: Stage, values: Mapping[str, Any]) -> None:
    """Add what a stage reads to `config.yaml` when it begins. `values`: all settings of the job, by name of the flag.

    Raises UserError when the file is damaged, StorageError when it cannot be written.
    """
    with _locked(run_dir):
        known = read(run_dir)
        merged, own = dict(known.values), {}
        for name, (section, item) in FLAGS.items():
            unread = section in _OF_MEMORY and name != "mc" and not values["mc"]
            if not reads(stage, section, item) or unread:
                continue
            if name not in merged or _may_change(stage, name, known.stages):
                merged[name] = values[name]
            elif stage.kind == TRAIN and merged[name] != values[name]:
                own[name] = values[name]
        stages = [name for name in BY_NAME if name == stage.name or name in known.stages]
        stages += [name for name in {stage.name: 0, **dict.fromkeys(known.stages)} if name not in stages]
        content: dict[str, Any] = {"stages": stages}
        of_stage = {**known.of_stage, stage.name: own} if own else {**known.of_stage}
        for name, section in SECTIONS.items():
            part = {item.name: merged[item.name] for item in own_fields(section) if item.name in merged}
            if part:
                content[name] = part
        if of_stage:
            content["of_stage"] = of_stage
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        storage.write_bytes(known.path, text.encode())


def made_with(stage: Stage, values: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The settings on which the result of a stage depends. `text` names the text that the settings choose."""
    found = {name: values[name] for name, owner in FLAGS.items() if name in values and decides(stage, *owner)}
    if any(name in found for name in _TEXT_FLAGS):
        found = {TEXT: text} | {name: value for name, value in found.items() if name not in _TEXT_FLAGS}
    if not found.get("mc", 1):  # without a memory its settings mean nothing
        found = {
            name: value
            for name, value in found.items()
            if name == "mc" or FLAGS.get(name, (None,))[0] not in _OF_MEMORY
        }
    return found


def settings_of_start(flat: Mapping[str, Any], given: Mapping[str, Any], start_dir: str) -> dict[str, Any]:
    """The settings that follow from the model of `--init_from`: its shape, and with `--mc` that of its memory.

    start_dir: where the run keeps its copy of the model, if it has one by now. Raises UserError for a given flag that
    contradicts the model, CheckpointError when there is no model.
    """
    source = flat["init_from"]
    shape, memory = shape_of_start(source, start_dir)
    values = {
        "depth": shape.n_layer,
        "width": shape.n_embd,
        "n_kv_head": shape.n_kv_head,
        "token_shift": int(shape.token_shift),
        "vocab_size": shape.vocab_size,
    }
    if flat.get("mc") and memory is not None:
        values |= {item.name: getattr(memory, item.name) for item in fields(memory) if item.metadata["shape"]}
    for name, value in values.items():
        derived = name in ("width", "n_kv_head") and given.get(name) == 0
        if name in given and given[name] != value and not derived:
            raise UserError(
                f"--{name} is {given[name]!r}, and the model of --init_from {source!r} has {value!r}. Its shape is taken "
                f"over: leave --{name} out, or train a new model without --init_from."
            )
    return values


def shape_of_start(source: str, start_dir: str) -> tuple[GPTConfig, MemoryConfig | None]:
    """Shape and memory of the model that a run starts from: of the run's copy where it has one. Raises as `mc.load`."""
    copies = [path for path in list_checkpoints(start_dir, START) if storage.exists(storage.join(path, MANIFEST))]
    return api.shape_of(copies[-1] if copies else source)


def refuse_changes(
    run_dir: str, run: str, stage: Stage, asked: Mapping[str, Any], source: Callable[[Mapping[str, Any]], str]
) -> None:
    """Raises UserError when the run has made something with other settings than a stage of it is asked to use now.

    asked: what `made_with` gives for the stage. source: names the text that settings choose. An evaluation is not
    refused: it runs again.
    """
    if stage.kind == EVALUATE:
        return
    for name, settings in _bound(run_dir, source).items():
        if stage.kind == TRAIN and BY_NAME[name].kind == TRAIN and name != stage.name:
            continue  # another stage of training has its own settings
        changes = differences(settings, asked)
        if changes:
            raise UserError(
                f"{name} of run {run!r} used other settings: {'; '.join(changes)}. Leave these flags out to go on with "
                f"the settings of the run, or start another --run. The run is in {run_dir!r}."
            )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`--depth was 4, is 6` for every setting that both know and that differs."""
    return [
        f"{_shown(name)} was {value!r}, is {now[name]!r}"
        for name, value in before.items()
        if name in now and now[name] != value
    ]


def _bound(run_dir: str, source: Callable[[Mapping[str, Any]], str]) -> dict[str, dict[str, Any]]:
    """By stage, the settings that a run is bound to: those of its complete stages, and of trainings with a checkpoint."""
    found: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        if stage.kind == EVALUATE:
            continue
        result = read_stage(run_dir, stage.name)
        if result is not None:
            found[stage.name] = dict(result.get("settings", {}))
        elif stage.kind == TRAIN and list_checkpoints(storage.join(run_dir, "checkpoints"), stage.checkpoint):
            known = read(run_dir)
            if known.reliable and stage.name in known.stages:
                found[stage.name] = made_with(stage, known.of(stage.name), source(known.values))
    return found


def _may_change(stage: Stage, name: str, recorded: Sequence[str]) -> bool:
    """Whether a stage may change a value of `config.yaml`: no stage of higher rank, and no other stage of training, that
    reads it has been recorded."""
    others = [BY_NAME[other] for other in recorded if other in BY_NAME and other != stage.name]
    return not any(
        (_RANK[other.kind] > _RANK[stage.kind] or other.kind == TRAIN) and reads(other, *FLAGS[name])
        for other in others
    )


def _shown(name: str) -> str:
    if name != TEXT:
        return f"--{name}"
    return f"the text ({', '.join('--' + flag for flag in _TEXT_FLAGS)}, or the Python whose files it is)"


def _damaged(path: str, why: str) -> UserError:
    return UserError(
        f"{path!r}, which holds the settings of the run, is damaged: {why} Restore it, or remove it and give the flags "
        "of the run again."
    )


@contextlib.contextmanager
def _locked(run_dir: str) -> Iterator[None]:
    """One process at a time changes the settings of a run on a local disk. Object stores have no locks."""
    if not storage.is_local(run_dir):
        yield
        return
    folder = storage.local_path(run_dir)
    storage.makedirs(str(folder))
    handle = os.open(folder / ".config.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks either
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
