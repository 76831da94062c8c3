"""Opening trees on disk: one writer, the right model, paths that cannot be."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from tree_programs import STREAM, VOCAB, assert_prefix, gist, open_tree

from megacontext.context.tree import Tree
from megacontext.errors import DataError, StorageError, UserError


def test_opened_twice_for_writing(tmp_path: Path) -> None:
    tree = open_tree(tmp_path / "t")
    with pytest.raises(UserError, match=f"open for writing by process {os.getpid()} on"):
        open_tree(tmp_path / "t")
    tree.append(STREAM[:10])
    with open_tree(tmp_path / "t", writable=False) as reader:
        tree.append(STREAM[10:90])
        assert_prefix(reader, 10)  # what was committed when it opened
    tree.close()
    with open_tree(tmp_path / "t") as again:
        assert_prefix(again, 90)


def test_a_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        open_tree(tmp_path / "t").append(STREAM[:10])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, 10)


def test_a_tree_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:100])
    cases = [
        (dict(gist=gist(block_size=8)), "block_size 4, but 8"),
        (dict(gist=gist(digest="other")), "gist_digest 'mean', but 'other'"),
        (dict(gist=gist(width=2)), "record_width 5, but 2"),
        (dict(gist=gist(), dtype="bfloat16"), "dtype 'float32', but 'bfloat16'"),
        (dict(gist=gist(), vocab_size=7), "vocab_size 1000, but 7"),
    ]
    for options, message in cases:
        with pytest.raises(DataError, match=message):
            Tree.open(path, **{"vocab_size": VOCAB, **options})  # type: ignore[arg-type]
    with open_tree(tmp_path / "t") as tree:
        assert_prefix(tree, 100)


def test_gists_of_another_model_replace_the_old_ones(tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    with open_tree(tmp_path / "t") as tree:
        tree.append(STREAM[:100])
    other = gist(width=2, digest="other")
    with Tree.open(path, other, vocab_size=VOCAB, replace_gists=True) as tree:
        assert torch.equal(tree.ids(0, 100), torch.from_numpy(STREAM[:100]))
        assert tree.record_range(1, 0, 25).shape == (25, 2)
    with Tree.open(path, other, vocab_size=VOCAB) as tree:
        tree.append(STREAM[100:200])
        assert tree.count(1) == 50
    assert not list((tmp_path / "t").glob("gists_0_*"))


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="local folder"):
        Tree.open("s3://bucket/tree", gist())
    with pytest.raises(DataError, match="no tree at"):
        open_tree(tmp_path, writable=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot open the tree"):
        open_tree(tmp_path / "file")
    open_tree(tmp_path / "t").close()
    (tmp_path / "t" / "tree.json").write_text('{"format": "x"}')
    with pytest.raises(DataError, match="damaged"):
        open_tree(tmp_path / "t")
