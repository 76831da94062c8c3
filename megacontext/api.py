"""The public face: load a model with its tokenizer from wherever it is, and write nanochat's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from megacontext import precision, storage
from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, UserError
from megacontext.model.gpt import GPT
from megacontext.model.nanochat import find_checkpoint, load_nanochat, load_weights, save_nanochat_model
from megacontext.train.checkpoint import MANIFEST, latest_checkpoint, list_checkpoints, load_checkpoint

_Section = TypeVar("_Section", GPTConfig, MemoryConfig)
STAGES = ("rl", "sft", "mid", "base")  # later stages first


def load(
    path: str,
    *,
    stage: str | None = None,
    tag: str | None = None,
    step: int | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
) -> tuple[GPT, Tokenizer]:
    """Load a model for inference, and its tokenizer; `path` is local or an fsspec URI.

    `path` is one of
      - a checkpoint of ours: `<run>/checkpoints/megacontext_<stage>_<step>`;
      - a run folder of ours, or its `checkpoints`: the newest intact checkpoint of the latest stage;
      - a nanochat base directory, with `{base,mid,chatsft,chatrl}_checkpoints/<tag>/` beside `tokenizer/`: the latest
        stage, the deepest model, the highest step.

    `stage` (base, mid, sft, rl), `tag` (nanochat's d<depth>) and `step` choose another one. `dtype` fp32, bf16 or auto
    is what the model computes in; its logits are always float32.

        model, tokenizer = mc.load("runs/speedrun")
        logits = model(torch.tensor([tokenizer.encode("Hello", bos=True)]))   # [1, T, V]

    Raises CheckpointError when nothing is there, or what is there is damaged; UserError for an unknown stage or dtype.
    """
    if stage is not None and stage not in STAGES:
        raise UserError(f"stage {stage!r} is unknown; choose one of {', '.join(reversed(STAGES))}.")
    own = _own_checkpoint(path, stage, step)
    if own is not None:
        loaded = load_checkpoint(own, with_optimizer=False)
        model = GPT(_settings(GPTConfig, loaded.meta["model_config"], own))
        if loaded.meta.get("memory_config"):
            model.attach_memory(_settings(MemoryConfig, loaded.meta["memory_config"], own))
        load_weights(model, loaded.model, own)
        tokenizer_dir = storage.join(own, "tokenizer")
    else:
        kind = {"sft": "chatsft", "rl": "chatrl"}.get(stage, stage) if stage else None
        folder, found_step = find_checkpoint(path, kind, tag, step)
        model, _ = load_nanochat(folder, found_step)
        tokenizer_dir = _beside(folder, path)
    tokenizer = Tokenizer.load(tokenizer_dir)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {tokenizer_dir!r} has {tokenizer.vocab_size} tokens, the model in {path!r} was made for "
            f"{model.config.vocab_size}; put the model's own tokenizer there."
        )
    where: Any = device
    model.to(where)
    model.compute_dtype = precision.choose_dtype(dtype, model.device)
    return model.eval(), tokenizer


def _settings(section: type[_Section], stored: Mapping[str, Any], path: str) -> _Section:
    """A configuration as a checkpoint stored it; settings that are newer than the checkpoint have their defaults."""
    unknown = sorted(set(stored) - {field.name for field in fields(section)})
    if unknown:
        raise CheckpointError(
            f"the checkpoint {path!r} was written by another version of megacontext: there is no setting "
            f"{', '.join(unknown)} here. Load it with that version, or train it anew."
        )
    return section(**stored)


def save_nanochat(
    model: GPT, tokenizer: Tokenizer, directory: str, *, stage: str = "base", tag: str | None = None, step: int = 0
) -> str:
    """Write a model and its tokenizer as a nanochat base directory (local or fsspec); returns the model's folder.

    nanochat loads it as it is, and `load(directory)` gives back the same weights byte for byte.
    """
    kind = {"sft": "chatsft", "rl": "chatrl"}.get(stage, stage)
    folder = save_nanochat_model(model, directory, kind=kind, tag=tag, step=step)
    tokenizer.save(storage.join(directory, "tokenizer"))
    return folder


def _own_checkpoint(path: str, stage: str | None, step: int | None) -> str | None:
    """The checkpoint of ours that `path` means, or None when it holds none of ours."""
    if storage.exists(storage.join(path, MANIFEST)) and storage.exists(storage.join(path, "meta.json")):
        return path
    for directory in (storage.join(path, "checkpoints"), path):
        for name in (stage,) if stage else STAGES:
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
    return None


def _beside(folder: str, path: str) -> str:
    """The tokenizer folder of a nanochat base directory, seen from one of its tag folders."""
    for base in (path, folder.rstrip("/").rsplit("/", 2)[0]):
        candidate = storage.join(base, "tokenizer")
        if storage.exists(candidate):
            return candidate
    raise CheckpointError(f"no tokenizer/ beside the checkpoints in {path!r}; nanochat keeps tokenizer.pkl there.")
