"""The public face: load a model with its tokenizer from wherever it is, and write nanochat's layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch

from megacontext import arguments, precision, storage
from megacontext.checkpoint import MANIFEST, latest_checkpoint, list_checkpoints, load_checkpoint, read_meta
from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, UserError
from megacontext.memory_config import overridden
from megacontext.model.gpt import GPT
from megacontext.model.nanochat import find_checkpoint, load_nanochat, load_weights, read_config, save_nanochat_model
from megacontext.stages import BY_CHECKPOINT, NEWEST_FIRST
from megacontext.telemetry import otel

_Section = TypeVar("_Section", GPTConfig, MemoryConfig)


def load(
    path: str | os.PathLike[str],
    *,
    stage: str | None = None,
    tag: str | None = None,
    step: int | None = None,
    dtype: str = "fp32",
    device: str | torch.device = "cpu",
    trainable: bool = False,
    focus: Mapping[str, Any] | None = None,
) -> tuple[GPT, Tokenizer]:
    """Load a model for inference, and its tokenizer; `path` is local or an fsspec URI.

    `path` is one of
      - a checkpoint of ours: `<run>/checkpoints/megacontext_<stage>_<step>`;
      - a run folder of ours, or its `checkpoints`: the newest intact checkpoint of the latest stage;
      - a nanochat base directory, with `{base,mid,chatsft,chatrl}_checkpoints/<tag>/` beside `tokenizer/`: the latest
        stage, the deepest model, the highest step.

    `stage` (base, mid, sft, rl), `tag` (nanochat's d<depth>) and `step` choose another one. `dtype` fp32, bf16 or auto
    is what the model computes in; its logits are always float32. The weights take no gradient, unless `trainable`.
    `focus`: focus settings by name of the flag (`FocusConfig`), in place of the checkpoint's.

        model, tokenizer = mc.load("runs/speedrun")
        logits = model(torch.tensor([tokenizer.encode("Hello", bos=True)]))   # [1, T, V]

    Raises CheckpointError when nothing is there, or what is there is damaged; UserError for a stage, dtype or device that
    is unknown or not there.
    """
    path = arguments.path("path", path)
    stage = None if stage is None else arguments.choice("stage", stage, BY_CHECKPOINT)
    tag = None if tag is None else arguments.text("tag", tag)
    step = None if step is None else arguments.whole_number("step", step, 0)
    trainable, where = arguments.truth("trainable", trainable), precision.device_of(device)
    compute_dtype = precision.choose_dtype(dtype, where)
    own = _own_checkpoint(path, stage, step, tag)
    if own is not None:
        with otel.span("checkpoint_load", path=own):
            loaded = load_checkpoint(own, with_optimizer=False)
        for name, asked in (("stage", stage), ("step", step)):
            if asked is not None and loaded.meta.get(name, asked) != asked:
                raise CheckpointError(f"checkpoint {own!r} is of {name} {loaded.meta[name]}, not {asked}.")
        model = GPT(_settings(GPTConfig, loaded.meta.get("model_config"), own))
        if loaded.meta.get("memory_config"):
            config = _settings(MemoryConfig, loaded.meta["memory_config"], own)
            model.attach_memory(config, loaded.meta.get("router_trained"))
        load_weights(model, loaded.model, own)
        tokenizer_dir = storage.join(own, "tokenizer")
    else:
        kind = BY_CHECKPOINT[stage].nanochat if stage else None
        folder, found_step = _nanochat_checkpoint(path, kind, tag, step)
        with otel.span("checkpoint_load", path=folder):
            model, _ = load_nanochat(folder, found_step)
        tokenizer_dir = _beside(folder, path)
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {tokenizer_dir!r} has {tokenizer.vocab_size} tokens, the model in {path!r} was made for "
            f"{model.config.vocab_size}; put the model's own tokenizer there."
        )
    model.focus = overridden(model.focus, dict(focus or {}))
    model.to(where)
    model.compute_dtype = compute_dtype
    return model.eval().requires_grad_(trainable), tokenizer


def shape_of(path: str) -> tuple[GPTConfig, MemoryConfig | None]:
    """Shape of the model that `load(path)` gives, and settings of its memory (None without one); no weights are read.

    Raises as `load` does.
    """
    own = _own_checkpoint(path, None, None)
    if own is None:
        return read_config(*_nanochat_checkpoint(path, None, None, None))[0], None
    meta = read_meta(own)
    memory = meta.get("memory_config")
    return _settings(GPTConfig, meta["model_config"], own), _settings(MemoryConfig, memory, own) if memory else None


def _settings(section: type[_Section], stored: Any, path: str) -> _Section:
    """A configuration as a checkpoint stored it; settings that are newer than the checkpoint have their defaults."""
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"the checkpoint {path!r} is damaged: its meta.json has no {section.__name__}.")
    unknown = sorted(set(stored) - {field.name for field in fields(section)})
    if unknown:
        raise CheckpointError(
            f"the checkpoint {path!r} was written by another version of megacontext: there is no setting "
            f"{', '.join(unknown)} here. Load it with that version, or train it anew."
        )
    try:
        return section(**stored)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the {section.__name__} of the checkpoint {path!r} is damaged: {error}") from error


def save_nanochat(
    model: GPT,
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    stage: str = "base",
    tag: str | None = None,
    step: int = 0,
    drop_memory: bool = False,
) -> str:
    """Write a model and its tokenizer as a nanochat base directory (local or fsspec); returns the model's folder.

    nanochat loads it as it is, and `load(directory)` gives back the same weights byte for byte. nanochat has no memory:
    a model that has one is refused, or written without it by `drop_memory`. A model with a token shift is refused.
    Raises UserError for these, and for a tokenizer of another vocabulary; nothing is written then.
    """
    arguments.same_vocabulary(model, tokenizer)
    directory, stage = arguments.path("directory", directory), arguments.choice("stage", stage, BY_CHECKPOINT)
    step = arguments.whole_number("step", step, 0)
    if tag is not None and (not arguments.text("tag", tag) or "/" in tag):
        raise UserError(f"tag is {tag!r}; it must be the name of a folder, such as d12.")
    drop_memory = arguments.truth("drop_memory", drop_memory)
    kind = BY_CHECKPOINT[stage].nanochat
    folder = save_nanochat_model(model, directory, kind=kind, tag=tag, step=step, drop_memory=drop_memory)
    tokenizer.save(storage.join(directory, "tokenizer"))
    return folder


def _own_checkpoint(path: str, stage: str | None, step: int | None, tag: str | None = None) -> str | None:
    """The checkpoint of ours that `path` means, or None when it holds none of ours.

    Raises CheckpointError when there is nothing at the path; when it holds some, but none of that stage and step, or
    none that is whole.
    """
    if not storage.exists(path):
        raise CheckpointError(f"there is nothing at {path!r}; give a run, a checkpoint or a nanochat base directory.")
    if tag is not None:  # tags are nanochat's
        return None
    if any(storage.exists(storage.join(path, name)) for name in (MANIFEST, "meta.json", "model.pt")):
        return path
    for directory in (storage.join(path, "checkpoints"), path):
        for name in (stage,) if stage else NEWEST_FIRST:
            candidates = list_checkpoints(directory, name)
            if step is not None:
                candidates = [found for found in candidates if found.endswith(f"_{step:06d}")]
                if candidates:
                    return candidates[-1]
            elif candidates:
                intact = latest_checkpoint(directory, name)
                if intact is None:
                    raise CheckpointError(f"every checkpoint of stage {name} in {directory!r} is damaged.")
                return intact
    held = [
        name.rsplit("/", 1)[-1] for part in ("checkpoints", "") for name in list_checkpoints(storage.join(path, part))
    ]
    if held:
        wanted = f"stage {stage or ' or '.join(NEWEST_FIRST)}" + (f" and step {step}" if step is not None else "")
        raise CheckpointError(f"{path!r} has no checkpoint of {wanted}; there are: {', '.join(held)}.")
    return None


def _nanochat_checkpoint(path: str, kind: str | None, tag: str | None, step: int | None) -> tuple[str, int]:
    """`find_checkpoint`, whose error also says where a checkpoint of ours was looked for."""
    try:
        return find_checkpoint(path, kind, tag, step)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} A checkpoint of ours was looked for as well: megacontext_<stage>_<step>/ there or in its checkpoints/."
        ) from None


def _beside(folder: str, path: str) -> str:
    """The tokenizer folder of a nanochat base directory, seen from one of its tag folders."""
    for base in (path, folder.rstrip("/").rsplit("/", 2)[0]):
        candidate = storage.join(base, "tokenizer")
        if storage.exists(candidate):
            return candidate
    raise CheckpointError(f"no tokenizer/ beside the checkpoints in {path!r}; nanochat keeps tokenizer.pkl there.")
