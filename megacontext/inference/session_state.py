"""What a session keeps on disk beside its tree: the focus at one moment, and how the tokens after it came.

`session.json` is replaced atomically, and always before the tree takes tokens that it would misread. So at any moment
the focus can be derived again: take the stored one, then apply the session's rules to the tokens that the tree has
beyond it, which were all appended, or all generated.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megacontext import storage
from megacontext.context.gist_function import levels_of
from megacontext.context.working_context import MAX_TOKENS, InvariantError, WorkingContext
from megacontext.errors import DamagedError, DataError, StorageError
from megacontext.inference.session_options import SessionOptions

if TYPE_CHECKING:
    from megacontext.model.gpt import GPT

FILE = "session.json"
TREE = "tree"
FORMAT = "megacontext-session"
VERSION = 1
APPENDED, GENERATED = "appended", "generated"
_MAX_LEVEL = 52  # of blocks of two: the highest node that a history of MAX_TOKENS has


@dataclass(frozen=True, kw_only=True)
class SessionState:
    """The focus at `tokens` tokens. `lods` are runs (level, count) of the working context's entries.

    `since_refocus` counts tokens generated since the last refocus, which happened at `refocused_at` tokens; `stale`:
    something was appended since. `following` says how tokens beyond `tokens` came: APPENDED or GENERATED.
    """

    options: dict[str, Any]
    model_digest: str
    tokens: int
    lods: list[list[int]]
    since_refocus: int
    refocused_at: int
    stale: bool
    following: str
    allocator: dict[str, Any]

    def context(self, block_size: int) -> WorkingContext:
        """The working context. Raises DataError when the runs tile no history of `tokens` tokens."""
        runs = np.array(self.lods, np.int64).reshape(-1, 2)
        if len(runs) and runs[:, 0].max() > (top := levels_of(MAX_TOKENS, block_size)):
            raise DataError(f"the stored working context has nodes of level {runs[:, 0].max()}; {top} is the highest.")
        lod = np.repeat(runs[:, 0], runs[:, 1])
        span = np.power(block_size, lod)
        context = WorkingContext(lod, (np.cumsum(span) - span) // span, block_size)
        try:
            context.check()
        except InvariantError as error:
            raise DataError(f"the stored working context is no tiling: {error}") from error
        if context.tokens != self.tokens:
            raise DataError(f"the stored working context covers {context.tokens} tokens, not {self.tokens}.")
        return context

    def save(self, folder: Path) -> None:
        """Replace the folder's state atomically. Raises StorageError, e.g. when the disk is full."""
        if not (folder / TREE).is_dir():
            raise StorageError(f"{str(folder)!r} was deleted while its session was open; what it held is gone.")
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        data = json.dumps({**body, "checksum": _checksum(body)}, separators=(",", ":"))
        try:
            storage.write_bytes(str(folder / FILE), data.encode())
        except StorageError as error:
            why = error.__cause__ or error
            raise StorageError(
                f"cannot store {str(folder / FILE)!r}: {why}. The session's ids are safe; free space and repeat the call."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> SessionState | None:
        """The state of a folder, None where there is none.

        Raises DamagedError for one that is damaged, DataError for one that is too new, StorageError when it cannot be read.
        """
        path = folder / FILE
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
            fits = body.get("format") == FORMAT and checksum == _checksum(body)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(
                f"cannot read {str(path)!r}: {error}. Choose another path for the session, or check its permissions."
            ) from error
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DamagedError(damaged(folder, str(error) or type(error).__name__)) from error
        if not fits:
            raise DamagedError(damaged(folder, "its checksum does not fit"))
        if body.get("version") != VERSION:
            raise DataError(f"{str(path)!r} has version {body.get('version')}; this program reads version {VERSION}.")
        try:
            state = cls(**{f.name: body[f.name] for f in fields(cls)})
            state.check()
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(damaged(folder, f"{type(error).__name__}: {error}")) from error
        return state

    def check(self) -> None:
        """Raise ValueError or TypeError unless every field is one that a session can have stored."""
        for name, kind in _KINDS.items():
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name} is {type(getattr(self, name)).__name__}, not {kind.__name__}")
        if not (0 <= self.refocused_at <= self.tokens <= MAX_TOKENS and 0 <= self.since_refocus <= self.tokens):
            raise ValueError(
                f"tokens {self.tokens}, refocused_at {self.refocused_at}, since_refocus {self.since_refocus}"
            )
        if self.following not in (APPENDED, GENERATED):
            raise ValueError(f"following is {self.following!r}")
        options = SessionOptions.of(self.options)
        for run in self.lods:
            if not (type(run) is list and len(run) == 2 and all(type(value) is int for value in run)):
                raise TypeError(f"lods has {run!r}")
            if not (0 <= run[0] <= _MAX_LEVEL and 0 < run[1] <= options.budget):
                raise ValueError(f"lods has {run!r}")
        counts = [self.allocator[name] for name in ("refocuses", "forced", "reversals")]
        tables = [np.array(self.allocator[name]) for name in ("made", "born", "known")]
        whole = all(type(count) is int and count >= 0 for count in counts)
        if not whole or any(table.size and table.dtype.kind != "i" for table in tables):
            raise TypeError("allocator holds what are no whole numbers")
        made, born, known = tables
        wrong = (made.size and made.shape[1:] != (3,)) or (known.size and known.shape != (len(born), 2))
        if wrong:
            raise ValueError("allocator holds tables of the wrong shape")


_KINDS: dict[str, type] = {
    "options": dict, "model_digest": str, "tokens": int, "lods": list, "since_refocus": int, "refocused_at": int,
    "stale": bool, "following": str, "allocator": dict,
}  # fmt: skip


def lod_runs(context: WorkingContext) -> list[list[int]]:
    """Runs [level, count] of the entries' levels: all that a tiling is."""
    lod = context.lod
    if not len(lod):
        return []
    first = np.concatenate([[0], np.flatnonzero(np.diff(lod)) + 1])
    counts = np.diff(np.concatenate([first, [len(lod)]]))
    return [[int(level), int(count)] for level, count in zip(lod[first], counts, strict=True)]


def remove_leftovers(folder: Path) -> None:
    """Delete what a process that died while it replaced the state has left."""
    for path in folder.glob(f".{FILE}.tmp-*"):
        path.unlink(missing_ok=True)


def model_digest(model: GPT) -> str:
    """Identity of a model's weights, the same whatever dtype it computes in: every value counts, rounded to bfloat16."""
    return weights_digest(repr(model.config), sorted(model.named_parameters()))


def weights_digest(what: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of named tensors by the integer sums of their bits along each axis: exact on any device and thread count.

    A pass at the speed of memory, where hashing the bytes of a large model would take seconds. It tells models apart;
    it is no protection against one made to collide.
    """
    found = hashlib.sha256(what.encode())
    for name, tensor in tensors:
        bits = tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16)
        bits = bits.reshape(len(bits), -1) if bits.dim() else bits.reshape(1, 1)
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        for axis in (0, 1):
            found.update(bits.sum(axis, dtype=torch.int64).cpu().numpy().tobytes())
    return found.hexdigest()[:32]


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def damaged(folder: Path, why: str) -> str:
    """The message for a session.json that cannot be used."""
    return (
        f"{str(folder / FILE)!r} is not a session's state or is damaged: {why}. Restore it from a copy; or delete it, or "
        "open the session with salvage=True, which keeps a copy of it: the session's ids are kept and its focus starts "
        "anew. read_only=True shows the ids."
    )
