"""nanochat's checkpoint layout, both ways: `<kind>_checkpoints/<tag>/model_%06d.pt` and `meta_%06d.json`.

Only weights and the meta file; the tokenizer beside them is `data.tokenizer`'s. Tensors keep the dtype they were stored
with (nanochat stores the embedding in bfloat16 when it trained on a GPU), so an export after an import is equal byte
for byte.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from megacontext import storage
from megacontext.config import GPTConfig
from megacontext.errors import CheckpointError, UserError
from megacontext.model.gpt import GPT
from megacontext.stages import BY_CHECKPOINT, NEWEST_FIRST

# Later stages first: the newest of these is what a base directory is asked for.
KINDS = tuple(f"{BY_CHECKPOINT[name].nanochat}_checkpoints" for name in NEWEST_FIRST)
_MODEL_FILE = re.compile(r"model_(\d{6,})\.pt$")
_COMPILED_PREFIX = "_orig_mod."


def find_checkpoint(
    base_dir: str, kind: str | None = None, tag: str | None = None, step: int | None = None
) -> tuple[str, int]:
    """The folder and step of a checkpoint in a nanochat base directory, or in one of its tag folders directly.

    Unless told otherwise: the latest stage present (RL, then SFT, mid, base), the deepest model (tags d<number>, else
    the last by name), the highest step. Raises CheckpointError when nothing is there.
    """
    if _steps(base_dir):
        return base_dir, _chosen_step(base_dir, step)
    for name in (f"{kind.removesuffix('_checkpoints')}_checkpoints",) if kind else KINDS:
        parent = storage.join(base_dir, name)
        tags = [found for found in storage.list_dir(parent) if _steps(storage.join(parent, found))]
        if tag is not None:
            tags = [found for found in tags if found == tag]
        if tags:
            folder = storage.join(parent, max(tags, key=_tag_order))
            return folder, _chosen_step(folder, step)
    wanted = " ".join(f"{key} {value!r}" for key, value in (("kind", kind), ("tag", tag)) if value is not None)
    raise CheckpointError(
        f"no nanochat checkpoint {wanted + ' ' if wanted else ''}in {base_dir!r}; looked for model_<step>.pt there and in "
        f"<kind>/<tag>/, where kind is {' or '.join(KINDS)}."
    )


def load_nanochat(folder: str, step: int | None = None) -> tuple[GPT, dict[str, Any]]:
    """The model and meta of a tag folder (highest step unless given), on the CPU, weights in their stored dtypes.

    Raises CheckpointError when files are missing or damaged, or weights do not fit the meta's model_config.
    """
    step = _chosen_step(folder, step)
    config, meta = read_config(folder, step)
    path = storage.join(folder, _names(step)[0])
    model = GPT(config)
    load_weights(model, _read_tensors(path), path)
    return model, meta


def read_config(folder: str, step: int) -> tuple[GPTConfig, dict[str, Any]]:
    """The shape and the meta of a checkpoint in a tag folder, without its weights. Raises CheckpointError as above."""
    path, meta_path = (storage.join(folder, name) for name in _names(step))
    try:
        meta = storage.read_json(meta_path)
        return GPTConfig(**meta["model_config"]), meta
    except FileNotFoundError as error:
        raise CheckpointError(f"{meta_path!r} is missing; a nanochat checkpoint has it beside {path!r}.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{meta_path!r} holds no model_config of the 2025 nanochat model ({error!r}); newer models are not supported."
        ) from error


def load_weights(model: GPT, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Take over weights with their dtypes; keys may carry torch.compile's prefix.

    Raises CheckpointError naming what is missing, unknown or of another shape.
    """
    state = {key.removeprefix(_COMPILED_PREFIX): value for key, value in state.items()}
    mine = model.state_dict()
    problems = [f"{key} is missing" for key in mine.keys() - state.keys()]
    problems += [f"{key} is unknown" for key in state.keys() - mine.keys()]
    problems += [
        f"{key} has shape {list(state[key].shape)}, expected {list(mine[key].shape)}"
        for key in mine.keys() & state.keys()
        if state[key].shape != mine[key].shape
    ]
    if problems:
        raise CheckpointError(f"weights in {origin!r} do not fit the model: {'; '.join(sorted(problems))}.")
    model.load_state_dict({key: state[key].clone() for key in mine}, assign=True)


def save_nanochat_model(
    model: GPT,
    base_dir: str,
    *,
    kind: str = "base",
    tag: str | None = None,
    step: int = 0,
    meta: Mapping[str, Any] | None = None,
    drop_memory: bool = False,
) -> str:
    """Write weights and meta below a base directory (local or fsspec) in nanochat's layout; returns the tag folder.

    The tag is d<layers> unless given. `meta` is stored as it is, with step and model_config set from the arguments.
    The meta file is written last, so a half-written checkpoint is never found complete.
    Raises UserError, and writes nothing, for what nanochat's layout has no room for: a token shift, without which the
    GPT computes something else; and a memory, unless `drop_memory` says to write the GPT without it.
    """
    if model.config.token_shift:
        raise UserError("nanochat has no token shift, so it cannot run this model; train it with --token_shift 0.")
    if model.memory is not None and not drop_memory:
        raise UserError(
            "nanochat's layout has no room for this model's memory (GistNet, LensNet and router). Copy the checkpoint "
            "folder to keep it; or write the GPT without its memory by drop_memory=True."
        )
    folder = storage.join(base_dir, f"{kind}_checkpoints", tag or f"d{model.config.n_layer}")
    model_name, meta_name = _names(step)
    shape = {key: value for key, value in asdict(model.config).items() if key != "token_shift"}
    buffer = io.BytesIO()
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith("memory.")}
    torch.save({key: value.detach().cpu().clone() for key, value in weights.items()}, buffer)
    storage.write_bytes(storage.join(folder, model_name), buffer.getvalue())
    storage.write_json(storage.join(folder, meta_name), {**(meta or {}), "step": step, "model_config": shape})
    return folder


def _names(step: int) -> tuple[str, str]:
    return f"model_{step:06d}.pt", f"meta_{step:06d}.json"


def _steps(folder: str) -> list[int]:
    return sorted(int(match[1]) for match in map(_MODEL_FILE.fullmatch, storage.list_dir(folder)) if match)


def _chosen_step(folder: str, step: int | None) -> int:
    steps = _steps(folder)
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(f"no checkpoint of step {step} in {folder!r}; there are: {steps or 'none'}.")
    return steps[-1] if step is None else step


def _tag_order(tag: str) -> tuple[int, str]:
    depth = re.fullmatch(r"d(\d+)", tag)
    return (int(depth[1]) if depth else -1, tag)


def _read_tensors(path: str) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(io.BytesIO(storage.read_bytes(path)), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path!r} is missing.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path!r} is damaged: {error}. Fetch it again.") from error
    return dict(state)
