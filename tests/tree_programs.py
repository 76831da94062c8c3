"""Trees on disk for tests, and two programs that run in processes of their own.

python tests/tree_programs.py kill 100       kill a writer at 100 random moments, reopen after each
python tests/tree_programs.py full FOLDER    fill the (small) file system that FOLDER is on
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megacontext.context.gist_function import MeanGist
from megacontext.context.store_disk import DiskStore
from megacontext.context.tree import Tree, all_records
from megacontext.errors import StorageError

VOCAB, WIDTH, BLOCK = 1000, 5, 4
TABLE = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))
ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STREAM = np.random.default_rng(3).integers(0, VOCAB, 200_000)


def gist(block_size: int = BLOCK, width: int = WIDTH, digest: str = "mean") -> MeanGist:
    return MeanGist(TABLE[:, :width].contiguous(), block_size, width, digest)


def open_tree(path: Path, **options: object) -> Tree:
    return Tree.open(str(path), gist(), vocab_size=VOCAB, **options)  # type: ignore[arg-type]


def assert_prefix(tree: Tree, tokens: int) -> None:
    """The tree is that of the first `tokens` tokens of the stream."""
    oracle = Tree(gist())
    oracle.append(STREAM[:tokens])
    assert tree.tokens == tokens
    assert np.array_equal(tree.ids(0, tokens).numpy(), STREAM[:tokens])
    assert all(torch.equal(a, b) for a, b in zip(all_records(tree), all_records(oracle), strict=True))
    assert isinstance(tree.store, DiskStore)
    tree.store.verify()


def append_error(tree: Tree, count: int) -> str:
    """What an append of the next tokens of the stream has to say."""
    try:
        tree.append(STREAM[tree.tokens : tree.tokens + count])
    except StorageError as error:
        return str(error)
    return ""


def _write_until_killed(path: Path, seed: int, report: int) -> None:
    rng = random.Random(seed)
    with open_tree(path) as tree:
        while True:
            size = rng.choice([1, 1, 3, 10, 100, 1500])
            tree.append(STREAM[tree.tokens : tree.tokens + size])
            os.write(report, tree.tokens.to_bytes(8, "little"))


def _kill_often(kills: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(kills)
    root = Path(tempfile.mkdtemp(prefix="tree-kills-"))
    try:
        path, acknowledged, rebuilt, cut = root / "t", 0, 0, 0
        for number in range(kills):
            reader, writer = os.pipe()
            if (pid := os.fork()) == 0:
                os.close(reader)
                _write_until_killed(path, number, writer)
            os.close(writer)
            os.read(reader, 8)  # it is writing
            time.sleep(rng.random() * 0.05)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with os.fdopen(reader, "rb") as pipe:
                told = pipe.read()
            acknowledged = max(acknowledged, int.from_bytes(told[-8:] if len(told) >= 8 else b"", "little"))
            with open_tree(path) as tree:
                assert tree.tokens >= acknowledged, (tree.tokens, acknowledged)
                assert_prefix(tree, tree.tokens)
                acknowledged = tree.tokens
                rebuilt, cut = rebuilt + bool(tree.gist_runs), cut + (not tree.store.recovery.clean)
            if acknowledged > 60_000:
                shutil.rmtree(path)
                acknowledged = 0
        print(f"{kills} kills, {cut} with an unfinished append, {rebuilt} with gists made again")
    finally:
        shutil.rmtree(root)


def _fill_disk(folder: Path) -> None:
    tree = open_tree(folder / "t")
    while not (message := append_error(tree, 197)):
        assert tree.tokens < len(STREAM)
    assert "No space left" in message
    held = tree.tokens
    assert held > 1000
    assert_prefix(tree, held)
    tree.close()
    tree = open_tree(folder / "t")  # a full disk does not stop opening
    assert_prefix(tree, held)
    tree.close()
    print("full and fine", held)


if __name__ == "__main__":
    if sys.argv[1] == "full":
        _fill_disk(Path(sys.argv[2]))
    else:
        _kill_often(int(sys.argv[2]))
