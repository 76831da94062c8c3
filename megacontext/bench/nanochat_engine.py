"""nanochat's model and engine, imported from a checkout of it that the user has, to be timed beside ours.

Nothing of nanochat is in this project. Any version works whose `nanochat/gpt.py` has GPT and GPTConfig and whose
`nanochat/engine.py` has Engine.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from megacontext.errors import UserError
from megacontext.model.gpt import GPT


class NoStops:
    """A tokenizer for both engines whose special ids never occur, so that no row ends early and no tool runs."""

    bos_id = -2

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def special(self, name: str) -> int:
        return -2

    def encode_special(self, name: str) -> int:
        return -2

    def get_bos_token_id(self) -> int:
        return -2


@contextmanager
def nanochat_engine(folder: str, model: GPT) -> Iterator[Any]:
    """nanochat's Engine around its GPT of the shape of `model`, on the CPU in fp32.

    It gets the weights of `model` where its state dict has the same names (the model of 2025), else its own.
    Raises UserError when the folder is no checkout of nanochat, or what nanochat itself imports is not installed.
    """
    root = Path(folder).expanduser().absolute()
    if not (root / "nanochat" / "engine.py").is_file():
        raise UserError(f"--nanochat {folder!r} has no nanochat/engine.py; give the folder of a nanochat checkout.")
    before = {name for name in sys.modules if name.split(".")[0] == "nanochat"}
    if before:
        raise UserError("a nanochat is imported in this process already; compare in a process of its own.")
    sys.path.insert(0, str(root))
    os.environ.setdefault("NANOCHAT_DTYPE", "float32")  # newer versions read it when they are imported
    try:
        try:
            gpt, engine = (importlib.import_module(f"nanochat.{name}") for name in ("gpt", "engine"))
        except ImportError as error:
            raise UserError(f"nanochat in {folder!r} cannot be imported: {error}. Install what it needs.") from error
        yield engine.Engine(_model(gpt, model), NoStops(model.config.vocab_size))
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
            del sys.modules[name]


def _model(gpt: Any, ours: GPT) -> Any:
    """nanochat's GPT, with all layers attending to the whole context."""
    known = {field.name for field in fields(gpt.GPTConfig)}
    shape = {name: value for name, value in {**asdict(ours.config), "window_pattern": "L"}.items() if name in known}
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**shape))
    model.to_empty(device="cpu")
    model.init_weights()
    weights = ours.state_dict()
    if weights.keys() == model.state_dict().keys():
        model.load_state_dict(weights)
    return model.eval()
