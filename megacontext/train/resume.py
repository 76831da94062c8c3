"""What a stage of a run begins from, and what must be right before its first step so that its saves do not fail."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from megacontext import storage
from megacontext.checkpoint import FORMAT, META, TEMPORARY, Warn, damage, list_checkpoints, read_meta
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, StorageError
from megacontext.train.checkpoint import TOKENIZER_FILES, read_tokenizer, refuse_second_writer
from megacontext.train.lens_loss import RunningScales
from megacontext.train.task import TrainTask

_COUNTS = ("step", "rows_consumed", "total_tokens")
_NUMBERS = ("total_training_flops", "total_training_time", "smooth_loss")
_SCALES = {item.name for item in fields(RunningScales)}  # what the objective of an --mc run carries


def checkpoints_dir(task: TrainTask) -> str:
    """Folder of the checkpoints of a run."""
    return storage.join(task.run_dir, "checkpoints")


def newest_to_resume(directory: str, stage: str, warn: Warn = print, thorough: bool = True) -> str | None:
    """The newest checkpoint that training can continue from; None when there is no checkpoint at all.

    Each damaged one on the way is named through `warn`. Raises CheckpointError when there are checkpoints and all are
    damaged: to begin anew over them is for the user to choose. What a process left half written on storage without
    renames is no checkpoint. Without `thorough` only names and sizes are compared.
    """
    reasons: dict[str, str] = {}
    names = set(storage.list_dir(directory))
    for path in reversed(list_checkpoints(directory, stage)):
        reason = damage(path, thorough) or _not_resumable(read_meta(path))
        if reason is None:
            return path
        name = path.rsplit("/", 1)[-1]
        if TEMPORARY + name in names:
            warn(f"checkpoint {path} was half written when its process ended; it is passed over.")
        else:
            warn(f"checkpoint {path} is damaged ({reason}); looking for the one before it.")
            reasons[name] = reason
    if not reasons:
        return None
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
    raise CheckpointError(
        f"training does not begin: each of the {len(reasons)} checkpoints of stage {stage} in {directory!r} is damaged "
        f"({listed}{'; …' if len(reasons) > 3 else ''}). Restore one from a copy and run the same command; or delete "
        "these folders to begin at step 0; or start another --run."
    )


def _not_resumable(meta: Mapping[str, Any]) -> str | None:
    """What training needs of an intact meta.json and does not find there."""
    if meta["format"] != FORMAT:
        return None  # not damaged: loading it says which formats this version reads
    state = meta.get("state")
    for key, kind in (("identity", dict), ("train_data", str), ("num_iterations", int), ("state", dict)):
        if not isinstance(meta.get(key), kind):
            return f"{key!r} of its {META} is {meta.get(key)!r}"
    assert isinstance(state, dict)
    wrong = [key for key in _COUNTS if not isinstance(state.get(key), int)]
    wrong += [key for key in _NUMBERS if not isinstance(state.get(key), int | float)]
    judged = [key for key in state if key.startswith(("val_", "best_val_"))]
    wrong += [key for key in judged if not isinstance(state[key], int | float | None)]
    if not isinstance(state.get("best_checkpoint", 0), str | None):
        wrong.append("best_checkpoint")
    for key in ("objective", "lens"):  # "lens": as checkpoints before 2026-11-27 call it
        carried = state.get(key, {})
        of_memory = key == "lens" or meta["identity"].get("mc")
        unknown = isinstance(carried, dict) and of_memory and carried.keys() - _SCALES
        if not isinstance(carried, dict) or unknown or not all(isinstance(x, int | float) for x in carried.values()):
            wrong.append(key)
    if wrong:
        return f"{wrong[0]!r} of the state in its {META} is {state.get(wrong[0])!r}"
    return None if state["step"] == meta["step"] else f"the state in its {META} is of step {state['step']}"


def stored_horizon(task: TrainTask, path: str) -> int | None:
    """Steps of a stage that the clock has sized before, from `path` or else from its newest checkpoint; None otherwise.

    A damaged file is named on stdout, with what stands in for it.
    """
    reason = ""
    try:
        steps = storage.read_json(path)["num_iterations"]
        if isinstance(steps, int) and steps > 0:
            return steps
        reason = f"num_iterations is {steps!r}"
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
    newest = newest_to_resume(checkpoints_dir(task), task.stage, warn=lambda _: None, thorough=False)
    known = int(read_meta(newest, "num_iterations")["num_iterations"]) if newest else None
    if reason:
        instead = f"{newest} says {known} steps" if newest else "no checkpoint says it either, so it is measured again"
        print(f"{task.stage}: the horizon file {path} is damaged ({reason}); {instead}", flush=True)
    return known


def check_start(task: TrainTask) -> None:
    """What can be wrong before any process is started, for who launches them. Changes nothing.

    Raises UserError when the run is trained already, CheckpointError when all its checkpoints are damaged or a file of
    the tokenizer is missing. Under torchrun the first process checks for all.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    directory = checkpoints_dir(task)
    refuse_second_writer(directory, task.stage)
    newest_to_resume(directory, task.stage, warn=lambda _: None, thorough=False)
    read_tokenizer(task.tokenizer_dir)


def check_tokenizer(directory: str, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError when a file that checkpoints hold a copy of is missing or does not fit the others."""
    name = TOKENIZER_FILES[1]
    data = read_tokenizer(directory)[name]
    try:
        sizes = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # torch and pickle raise almost anything for bytes that are not theirs
        sizes = None
    if not torch.is_tensor(sizes) or not torch.equal(sizes.cpu(), tokenizer.token_bytes()):
        raise CheckpointError(
            f"{name} in {directory!r} is damaged or belongs to another tokenizer than {TOKENIZER_FILES[0]} beside it. "
            f"Delete {name} and run jobs/tok_train.py with the same --run: it makes what is missing."
        )


def check_room(task: TrainTask, model: torch.nn.Module, optimizer: Mapping[str, Any], steps: int) -> None:
    """Compare the free space of a local disk with what the checkpoints of `steps` more steps need.

    Raises StorageError when there is no room for one; prints a warning when there is none for all that are kept.
    """
    directory, cfg = checkpoints_dir(task), task.train
    if steps <= 0 or not storage.is_local(directory):
        return
    size = _bytes(model.state_dict()) + _bytes(optimizer)
    present = len(list_checkpoints(directory, task.stage))
    saves = 1 + (steps // cfg.save_every if cfg.save_every > 0 else 0)
    at_once = cfg.keep_checkpoints + 2 if cfg.keep_checkpoints > 0 else saves + present  # a new one, and the best
    needed = max(1, min(saves, at_once - present)) * size
    free = shutil.disk_usage(_nearest_folder(directory)).free
    sizes = f"{size / 1e6:,.0f} MB, and {directory!r} has {free / 1e6:,.0f} MB free"
    if free < size:
        raise StorageError(
            f"a checkpoint of this run takes {sizes}: the first save would fail. Free space, choose another --storage, "
            "or train a smaller model."
        )
    if free < needed:
        print(
            f"warning: a checkpoint of this run takes {sizes}; the checkpoints that it keeps need {needed / 1e6:,.0f} MB "
            "more at times. Free space, lower --keep_checkpoints, or choose another --storage.",
            flush=True,
        )


def _nearest_folder(directory: str) -> str:
    path = storage.local_path(directory).absolute()
    while not path.exists():
        path = path.parent
    return str(path)


def _bytes(state: Mapping[str, Any]) -> int:
    """Size of the tensors in a nested mapping."""
    return sum(
        value.numel() * value.element_size() if torch.is_tensor(value) else _bytes(value)
        for value in state.values()
        if torch.is_tensor(value) or isinstance(value, Mapping)
    )
