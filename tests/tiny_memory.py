"""A model with a memory, small enough to check by hand, and windows of random ids."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tiny import make_tokenizer

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.eval.windows import Windows
from megacontext.model.gpt import GPT
from megacontext.train.checkpoint import CheckpointWriter

VOCAB, BLOCK, TAIL, HORIZON = 64, 4, 8, 6


def make_model(positional_type: str = "slot", vocab_size: int = VOCAB) -> GPT:
    """Two layers, blocks of four; nothing is left at zero, so that every part has an effect."""
    shape = dict(sequence_len=64, vocab_size=vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(GPTConfig(**shape, token_shift=True))
    model.attach_memory(
        MemoryConfig(
            mc=1,
            block_size=BLOCK,
            routing_slots=2,
            routing_width=8,
            positional_type=positional_type,
        ),
        router_trained=True,
    )
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.abs().max():
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval()


def make_windows(count: int = 4, history: int = 80) -> Windows:
    """Windows of two documents."""
    ids = np.random.default_rng(0).integers(0, VOCAB - 1, (count, history - 1 + HORIZON))
    return Windows(ids, np.arange(count) // 2, ("a", "b"), HORIZON, VOCAB - 1)


def save_run(folder: Path, memory: bool = True) -> Path:
    """A run folder with one checkpoint of such a model, and beside it `book.txt`, a long document."""
    make_tokenizer(folder / "tokenizer")
    model = make_model(vocab_size=300)
    memory_config = asdict(model.memory.config) if memory and model.memory is not None else None
    if not memory:
        model.memory = None
    writer = CheckpointWriter(str(folder / "run" / "checkpoints"), "base", str(folder / "tokenizer"), 1)
    meta = {"model_config": asdict(model.config), "memory_config": memory_config, "router_trained": True}
    writer.save(1, model.state_dict(), {}, meta)
    writer.close()
    words = np.random.default_rng(0).choice(["the", "quick", "brown", "fox", "jumps", "over"], 3000)
    (folder / "book.txt").write_text(" ".join(words))
    return folder / "run"
