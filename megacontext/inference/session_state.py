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
from megacontext.context.working_context import InvariantError, WorkingContext
from megacontext.errors import DataError

if TYPE_CHECKING:
    from megacontext.model.gpt import GPT

FILE = "session.json"
TREE = "tree"
FORMAT = "megacontext-session"
VERSION = 1
APPENDED, GENERATED = "appended", "generated"


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
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        data = json.dumps({**body, "checksum": _checksum(body)}, separators=(",", ":"))
        storage.write_bytes(str(folder / FILE), data.encode())

    @classmethod
    def load(cls, folder: Path) -> SessionState | None:
        """The state of a folder, None where there is none. Raises DataError for one that is damaged or too new."""
        path = folder / FILE
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(_damaged(path, str(error))) from error
        if body.get("format") != FORMAT or checksum != _checksum(body):
            raise DataError(_damaged(path, "its checksum does not fit"))
        if body["version"] != VERSION:
            raise DataError(f"{str(path)!r} has version {body['version']}; this program reads version {VERSION}.")
        return cls(**{f.name: body[f.name] for f in fields(cls)})


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


def _damaged(path: Path, why: str) -> str:
    return (
        f"{str(path)!r} is not a session's state or is damaged: {why}. Restore it from a copy; or delete it, and the "
        "session's ids are kept and its focus starts anew."
    )
