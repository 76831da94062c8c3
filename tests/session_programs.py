"""Small models with sessions for tests, and a program that kills sessions in processes of their own.

python tests/session_programs.py 100       kill a session at 100 random moments, reopen it after each and go on
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.inference.session import Session
from megacontext.model.gpt import GPT

VOCAB, BLOCK = 290, 4
OPTIONS: dict[str, Any] = {
    "budget": 48, "recent_tokens": 8, "refocus_interval": 6,
    "expand_threshold": 0.0, "collapse_threshold": 0.0, "cooldown": 1,  # random scores are to make many edits
}  # fmt: skip
PLAIN = {**OPTIONS, "block_size": BLOCK}  # a model without a memory has no block size of its own
ROOT = Path(__file__).resolve().parents[1]


def make_model(memory: bool, *, token_shift: bool = False, seq: int = 64, seed: int = 0, **settings: Any) -> GPT:
    """Two layers of random weights, none of them zero, so that every input counts."""
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    model = GPT(GPTConfig(sequence_len=seq, vocab_size=VOCAB, token_shift=token_shift, **shape))
    if memory:
        given = {"block_size": BLOCK, "routing_slots": 2, "routing_width": 16, **settings}
        model.attach_memory(MemoryConfig(mc=1, **given), router_trained=True)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        if parameter.dim() and name != "token_shift":
            std = 1.0 if "wte" in name else 0.3
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return model.eval()


@cache
def make_tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat, and 12 + 30 makes 42 strawberries"] * 8, VOCAB)


def random_ids(count: int, seed: int = 0) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).integers(0, VOCAB - 9, count)


def one_thread() -> Iterator[None]:
    """For a fixture: small models are slower on many threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A script of calls. A session that died continues it where its history ends.

Call = tuple[str, int]
SCRIPT: list[Call] = [
    ("append", 90), ("generate", 25), ("append", 3), ("generate", 9), ("append", 300), ("append", 41), ("generate", 40),
]  # fmt: skip


def play(
    session: Session, script: list[Call], said: Callable[[int], object] = lambda tokens: None, until: int | None = None
) -> None:
    """What of a script a session has not done yet, up to `until` tokens; an append is never split.

    `said` hears the history's length after every acknowledged token.
    """
    end = 0
    for number, (call, count) in enumerate(script):
        end += count
        left = end - session.tokens
        if left <= 0:
            continue
        if until is not None and session.tokens >= until:
            return
        if call == "append":
            session.append(random_ids(count, number)[count - left :])
            said(session.tokens)
        else:
            for _ in session.generate(left if until is None else min(left, until - session.tokens), stop=()):
                said(session.tokens)
            if session.tokens < end:
                return


def open_session(path: Path | None, model: GPT | None = None, **options: Any) -> Session:
    return Session(model or the_model(), make_tokenizer(), path=path, **{**OPTIONS, **options})


@cache
def the_model() -> GPT:
    return make_model(memory=True)


def ids_of(session: Session) -> list[int]:
    ids: list[int] = session.tree.ids(0, session.tokens).tolist()
    return ids


def _tell(writer: int, tokens: int) -> None:
    os.write(writer, tokens.to_bytes(8, "little"))


def _kill_often(kills: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(kills)
    with open_session(None) as never_stopped:
        play(never_stopped, SCRIPT)
        expected = (ids_of(never_stopped), never_stopped.entries)
    root, number, finished, resumed = Path(tempfile.mkdtemp(prefix="session-kills-")), 0, 0, 0
    try:
        for kill in range(kills):
            path = root / str(number)
            reader, writer = os.pipe()
            if (pid := os.fork()) == 0:
                os.close(reader)
                play(open_session(path), SCRIPT, partial(_tell, writer))
                time.sleep(60)  # done, and waiting for its end
            os.close(writer)
            with os.fdopen(reader, "rb", buffering=0) as pipe:
                pipe.read(8)  # it is at work
                time.sleep(rng.random() ** 2 * 0.15)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                told = pipe.readall() or b""
            acknowledged = int.from_bytes(told[-8:], "little")
            with open_session(path) as session:
                assert session.tokens >= acknowledged, (session.tokens, acknowledged)
                resumed += session.tokens < len(expected[0])
                if session.tokens == len(expected[0]) or kill == kills - 1:
                    play(session, SCRIPT)
                    assert (ids_of(session), session.entries) == expected
                    number, finished = number + 1, finished + 1
        print(f"{kills} kills, {resumed} in the middle, {finished} sessions finished as if never stopped")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    _kill_often(int(sys.argv[1]))
