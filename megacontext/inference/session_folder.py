"""The folder of a session: which paths can be one, and how its state and its tree are opened, read or salvaged.

Opening, in this order:

    1. `folder_of`: the path can be a folder.
    2. `load_state`: session.json, without which the options are not known. A damaged one is an error, except for a
       reader and for salvage: they go on with the ids alone.
    3. `check_tree_is_there`: session.json is only ever written when the tree is on the disk, so a tree that is missing
       is damage and no new session.
    4. `open_tree`: see `context.recovery`.
    5. `keep_aside`: before a writer replaces a session.json that it cannot use.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacontext import storage
from megacontext.context.disk_files import HEADER, Header
from megacontext.context.recovery import copy_aside
from megacontext.context.store_disk import DiskStore
from megacontext.context.tree import Tree, tree_spec
from megacontext.errors import DamagedError, DataError, StorageError, UserError
from megacontext.inference.session_state import FILE, TREE, SessionState

if TYPE_CHECKING:
    from megacontext.inference.session_host import SessionHost
    from megacontext.inference.session_options import SessionOptions
    from megacontext.model.gpt import GPT

_log = logging.getLogger(__name__)
# Tokens whose gists are made at once: of a network on the CPU no more than its matrix products can use.
_BATCH_TOKENS, _CPU_NETWORK_BATCH_TOKENS = 1 << 16, 1 << 13
_CHOOSE = "Choose another path, or check its permissions."


def folder_of(path: str) -> Path:
    """The folder that a session's path names.

    Raises UserError for what is no path of a local folder, StorageError for a file and for a path that cannot be reached.
    """
    if not storage.is_local(path):
        raise UserError(f"a session lives in a local folder, not {path!r}; copy it when it is closed.")
    folder = storage.local_folder(path)
    try:
        is_file = folder.exists() and not folder.is_dir()
    except OSError as error:
        raise StorageError(f"cannot use {path!r} for a session: {error}. {_CHOOSE}") from error
    if is_file:
        raise StorageError(f"{path!r} is a file, and a session is a folder. Choose another path.")
    return folder


def load_state(folder: Path, tolerant: bool) -> SessionState | None:
    """What session.json says, None where there is none; None for a damaged one too if `tolerant`.

    Raises DamagedError, DataError for a version that is too new, StorageError when it cannot be read.
    """
    try:
        return SessionState.load(folder)
    except DamagedError as error:
        if not tolerant:
            raise
        _log.warning("the session at %s goes on without its focus: %s", folder, error)
        return None


def check_tree_is_there(folder: Path, stored: SessionState | None) -> None:
    """Raise DamagedError when the files of the tree are gone and session.json is not."""
    tree = folder / TREE
    if stored is None or (tree / HEADER).exists() or any(tree.glob("*.bin")):
        return
    raise DamagedError(missing(folder, stored, f"{str(tree)!r} is missing or empty"))


def missing(folder: Path, stored: SessionState, what: str) -> str:
    """The message for a session whose tokens are gone."""
    return (
        f"{what}, but {str(folder / FILE)!r} belongs to a session of {stored.tokens:,} tokens or more. Restore "
        f"{str(folder / TREE)!r} from a copy; or open the session with salvage=True, which begins an empty one and keeps "
        f"a copy of {FILE}."
    )


def stored_state(
    folder: Path, model: GPT, options: dict[str, Any], read_only: bool, salvage: bool
) -> SessionState | None:
    """The stored state, before the tree is opened. Without one, `options` gets what the tree's header says, where it is None."""
    stored = load_state(folder, tolerant=read_only or salvage)
    if not salvage:
        check_tree_is_there(folder, stored)
    if stored is None:
        known = _tree_options(folder)
        if model.memory is not None:
            known.pop("block_size", None)
        options.update({name: value for name, value in known.items() if options.get(name) is None})
    return stored


def check_model(folder: Path, stored: SessionState | None, digest: str) -> None:
    """Raise DataError when the stored state is of another model."""
    if stored is not None and stored.model_digest != digest:
        raise DataError(
            f"the session at {str(folder)!r} is of another model with the same embeddings. Open it with the model "
            "that made it; or go on with this one by replace_gists=True."
        )


def open_tree(
    host: SessionHost,
    options: SessionOptions,
    folder: Path | None,
    *,
    read_only: bool = False,
    durable: bool = False,
    replace_gists: bool = False,
    salvage: bool = False,
) -> Tree:
    """The tree of a session, in memory without a folder. Raises as `Tree.open` does; messages name the session's options."""
    model, gist = host.model, host.gist(options.block_size)
    on_cpu = model.memory is not None and model.device.type == "cpu"
    batch = _CPU_NETWORK_BATCH_TOKENS if on_cpu else _BATCH_TOKENS
    vocabulary, levels = model.config.vocab_size, options.max_lod
    if folder is None:
        return Tree(gist, vocab_size=vocabulary, max_lod=levels, dtype=options.dtype, batch_tokens=batch)
    store = DiskStore(
        str(folder / TREE),
        tree_spec(gist, vocabulary, options.dtype),
        writable=not read_only,
        durable=durable,
        replace_gists=replace_gists,
        salvage=salvage,
        read_option="read_only=True",
    )
    return Tree(gist, store, max_lod=levels, batch_tokens=batch)


def keep_aside(folder: Path) -> str:
    """Copy a session.json that is about to be replaced, if there is one; says so in words that end a log line.

    Raises StorageError, e.g. on a full disk.
    """
    try:
        return f"; what was stored is kept in {copy_aside(folder / FILE).name}"
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(
            f"cannot copy {str(folder / FILE)!r}: {error}. Free space and open the session again."
        ) from error


def _tree_options(folder: Path) -> dict[str, Any]:
    """`block_size` and `dtype` of the tree in a session's folder; nothing when its header cannot be read."""
    try:
        header = Header.load(folder / TREE)
    except (DataError, OSError):  # opening the tree says what is wrong with it
        return {}
    return {} if header is None else {"block_size": header.spec.block_size, "dtype": header.spec.dtype}
