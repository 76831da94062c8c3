"""Sessions on disk: closed, killed, cut off at every write, and what must not be opened."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from session_programs import (
    OPTIONS,
    PLAIN,
    ROOT,
    SCRIPT,
    Call,
    ids_of,
    make_model,
    make_tokenizer,
    one_thread,
    open_session,
    play,
    random_ids,
    the_model,
)

import megacontext as mc
from megacontext import storage
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext
from megacontext.errors import DataError, StorageError, UserError
from megacontext.inference.session_state import SessionState, lod_runs, model_digest
from megacontext.model.gpt import GPT

PLAIN_MODEL = make_model(False)
_threads = pytest.fixture(scope="module", autouse=True)(one_thread)


def history(session: mc.Session) -> tuple[list[int], list[tuple[int, int]]]:
    return ids_of(session), session.entries


def never_stopped(script: list[Call], model: GPT | None = None, **options: Any) -> Any:
    with open_session(None, model, **options) as session:
        play(session, script)
        return history(session)


@pytest.mark.parametrize(
    ("model", "options"),
    [(the_model(), {}), (PLAIN_MODEL, {"block_size": 4}), (make_model(True, positional_type="gaussian", seq=32), {})],
)
def test_closed_and_reopened_it_goes_on(tmp_path: Path, model: GPT, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "chats" / "ada"
    opened, total = 0, sum(count for _, count in SCRIPT)
    given: dict[str, Any] = {**OPTIONS, **options}
    entries: list[tuple[int, int]] = []
    while True:
        with mc.Session(model, make_tokenizer(), path=path, **given) as session:
            assert session.entries == entries
            opened, given = opened + 1, {}  # nothing but the path has to be said again
            if session.tokens == total:
                assert history(session) == never_stopped(SCRIPT, model, **options)
                break
            play(session, SCRIPT, until=session.tokens + int(rng.integers(1, 12)))
            entries = session.entries
    assert opened > 8


SHORT: list[Call] = [("append", 50), ("generate", 7), ("append", 3), ("append", 70), ("generate", 7)]


def test_a_crash_at_any_write_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is copied after every commit of the tree and every write of the state: each copy goes on."""
    copies: list[tuple[Path, int]] = []
    folder = tmp_path / "s"

    def copied(function: Any) -> Any:
        def wrapped(*given: Any) -> Any:
            result = function(*given)
            target = tmp_path / f"copy{len(copies)}"
            shutil.copytree(folder, target)
            copies.append((target, session.tokens))
            return result

        return wrapped

    with open_session(folder) as session:
        with monkeypatch.context() as patch:
            patch.setattr(SessionState, "save", copied(SessionState.save))
            patch.setattr(Tree, "append", copied(Tree.append))
            play(session, SHORT)
        expected = history(session)
    assert len(copies) > 20
    for copy, tokens in copies:
        with open_session(copy) as session:
            assert session.tokens >= tokens
            play(session, SHORT)
            assert history(session) == expected


def test_killed_at_random_moments() -> None:
    kills = "100" if os.environ.get("MC_SOAK") else "6"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "session_programs.py"), kills],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout


def test_a_refocus_is_kept(tmp_path: Path) -> None:
    with open_session(tmp_path / "s") as session:
        session.append(random_ids(200))
        before = session.entries
        session.refocus()
        assert session.entries != before
        shutil.copytree(tmp_path / "s", tmp_path / "copy")
        with open_session(tmp_path / "copy") as copy:
            assert copy.entries == session.entries
            assert list(copy.generate(12, stop=())) == list(session.generate(12, stop=()))
            assert copy.stats.refocuses == session.stats.refocuses - 1 == 1  # none was due before the first token


def test_an_append_that_was_announced_and_never_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies between the state that announces an append and the append: nothing has happened."""
    with open_session(tmp_path / "s") as session:
        play(session, [("append", 25), ("generate", 10)])
        with monkeypatch.context() as patch:
            patch.setattr(session.tree, "append", lambda ids: shutil.copytree(tmp_path / "s", tmp_path / "copy"))
            session.append(random_ids(5))
        expected = list(session.generate(9, stop=()))
        with open_session(tmp_path / "copy") as copy:
            assert list(copy.generate(9, stop=())) == expected
            assert history(copy) == history(session)
            assert copy.stats.refocuses == 2  # six tokens after the last, as if nothing had been announced


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_session(None) as session:
        play(session, SHORT)
    assert list(tmp_path.iterdir()) == []


def test_options_are_the_stored_ones(tmp_path: Path) -> None:
    path = tmp_path / "s"
    open_session(path).close()
    for options, message in [
        (dict(budget=64), "was made with budget 48, but 64 is asked for"),
        (dict(recent_tokens=9), "recent_tokens 8, but 9"),
        (dict(cooldown=2), "cooldown 1, but 2"),
    ]:
        with pytest.raises(UserError, match=message):
            mc.Session(the_model(), make_tokenizer(), path=path, **options)
    with mc.Session(the_model(), make_tokenizer(), 48, str(path)) as again:
        assert again.options.recent_tokens == 8


def test_another_model_is_refused(tmp_path: Path) -> None:
    path, plain = tmp_path / "s", tmp_path / "plain"
    with open_session(path) as session:
        session.append(random_ids(100))
    with mc.Session(PLAIN_MODEL, make_tokenizer(), path=plain, **PLAIN) as session:
        session.append(random_ids(100))
        entries = session.entries
    with pytest.raises(DataError, match="has gist_digest"):
        open_session(path, make_model(True, seed=1))
    with pytest.raises(DataError, match="has gist_digest"):
        mc.Session(make_model(False, seed=1), make_tokenizer(), path=plain)
    with pytest.raises(DataError, match="has block_size 4, but 8"):
        mc.Session(PLAIN_MODEL, make_tokenizer(), path=plain, block_size=8)
    with pytest.raises(DataError, match="block_size 4, but 8"):
        open_session(path, make_model(True, block_size=8))
    with pytest.raises(DataError, match="dtype 'float32', but 'bfloat16'"):
        open_session(path, dtype="bfloat16")
    other = make_model(False)
    other.lm_head.weight.data[5, 3] += 0.1
    with pytest.raises(DataError, match="another model with the same embeddings"):
        mc.Session(other, make_tokenizer(), path=plain)
    with mc.Session(make_model(False, seed=1), make_tokenizer(), path=plain, replace_gists=True) as session:
        assert session.entries == entries
        assert ids_of(session) == random_ids(100).tolist()
    with mc.Session(make_model(False, seed=1), make_tokenizer(), path=plain) as session:  # it is its session now
        assert len(list(session.generate(5, stop=()))) == 5


def test_model_digest_tells_weights_apart_whatever_they_compute_in() -> None:
    model = make_model(True)
    known = model_digest(model)
    half = make_model(True)
    half.compute_dtype = torch.bfloat16
    half.prepare_inference()
    assert model_digest(half) == known
    with torch.no_grad():
        weight = model.transformer["wte"].weight
        weight[3], weight[7] = weight[7].clone(), weight[3].clone()
    assert model_digest(model) != known


def test_opened_twice(tmp_path: Path) -> None:
    session = open_session(tmp_path / "s")
    with pytest.raises(UserError, match=f"open for writing by process {os.getpid()}"):
        open_session(tmp_path / "s")
    session.append("the cat")
    session.close()
    with open_session(tmp_path / "s") as again:
        assert again.tokens == session.tokens
    with pytest.raises(UserError, match="budget is 1"):
        open_session(tmp_path / "new", budget=1)
    open_session(tmp_path / "new").close()  # a refused session leaves no lock


def test_a_lost_state_keeps_the_history(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s"
    with open_session(path) as session:
        play(session, SHORT)
        ids = ids_of(session)
    data = (path / "session.json").read_bytes()
    for damage in (b"", b"{", b"[1]", data.replace(b'"stale":', b'"stole":'), data.replace(b"48", b"49", 1)):
        (path / "session.json").write_bytes(damage)
        with pytest.raises(DataError, match=r"is damaged.*Restore it from a copy; or delete it"):
            open_session(path)
    (path / "session.json").unlink()
    with open_session(path) as session:
        assert ids_of(session) == ids
        assert len(session.entries) <= 48
        assert len(list(session.generate(10, stop=()))) == 10
    assert f"keeps its {len(ids)} tokens; its stored focus is lost" in caplog.text


def test_a_state_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("megacontext.inference.session_state.VERSION", 2)
        open_session(tmp_path / "s").close()
    with pytest.raises(DataError, match="has version 2; this program reads version 1"):
        open_session(tmp_path / "s")


def test_a_power_cut_that_took_ids_starts_the_focus_anew(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with open_session(path) as session:
        session.append(random_ids(100))
    shutil.copytree(path / "tree", tmp_path / "old_tree")
    with open_session(path) as session:
        list(session.generate(20, stop=()))
    shutil.rmtree(path / "tree")
    shutil.copytree(tmp_path / "old_tree", path / "tree")
    with open_session(path) as session:
        assert session.tokens == 100
        assert session.entries == never_stopped([("append", 100)])[1]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"

    def full(*_: object) -> None:
        raise StorageError("No space left on device")

    failed = 0
    with open_session(path) as session:
        for number in range(1, len(SHORT) + 1):  # every call meets a disk without room for the state, then for the tree
            for target, name in ((storage, "write_bytes"), (session.tree.store, "append")):
                with monkeypatch.context() as patch:
                    patch.setattr(target, name, full)
                    try:
                        play(session, SHORT[:number])
                    except StorageError:
                        failed += 1
                assert session.tokens == session.tree.tokens
            play(session, SHORT[:number])
        assert failed >= 2 * len(SHORT) - 2
        assert history(session) == never_stopped(SHORT)
    with open_session(path) as session:
        assert history(session) == never_stopped(SHORT)


def test_an_append_that_fails_half_way_keeps_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    session = mc.Session(PLAIN_MODEL, make_tokenizer(), path=path, budget=128)
    store_append, calls = session.tree.store.append, itertools.count()

    def second_fails(*given: Any) -> None:
        if next(calls) == 1:
            raise StorageError("No space left on device")
        store_append(*given)

    monkeypatch.setattr(session.tree.store, "append", second_fails)
    with pytest.raises(StorageError):
        session.append(random_ids(100_000))
    assert session.tokens == session.tree.tokens == 65_536
    entries = session.entries
    assert session.stats.appended == 65_536
    session.append(random_ids(100_000)[65_536:])
    session.close()
    with mc.Session(PLAIN_MODEL, make_tokenizer(), budget=128) as whole:
        whole.append(random_ids(65_536))
        assert whole.entries == entries
    with mc.Session(PLAIN_MODEL, make_tokenizer(), path=path) as again:
        assert ids_of(again) == random_ids(100_000).tolist()


def test_an_interrupt_leaves_history_and_context_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(None)
    tree_append = session.tree.append

    def interrupted(ids: Any) -> int:
        tree_append(ids)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session.tree, "append", interrupted)
        for call in (lambda: session.append(random_ids(50)), lambda: next(session.generate(1))):
            with pytest.raises(KeyboardInterrupt):
                call()
            assert session.context.tokens == session.tree.tokens
    play(session, SHORT)
    assert history(session) == never_stopped(SHORT)


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    open_session(path).close()
    (path / ".session.json.tmp-1234abcd").write_bytes(b"half")
    open_session(path).close()
    assert sorted(p.name for p in path.iterdir()) == ["session.json", "tree"]


def test_durable_flushes_every_token(tmp_path: Path) -> None:
    for durable in (False, True):
        with open_session(tmp_path / str(durable), durable=durable) as session:
            session.append("the cat")
            next(session.generate(1))
            assert (session.tree.store._flushed == session.tokens) is durable  # type: ignore[attr-defined]


def test_runs_of_levels_are_the_context() -> None:
    for tokens in (0, 1, 5, 700):
        context = WorkingContext.by_age(tokens, 4, 40, 6)
        state = SessionState(
            options={}, model_digest="", tokens=tokens, lods=lod_runs(context), since_refocus=0, refocused_at=0,
            stale=False, following="appended", allocator={},
        )  # fmt: skip
        assert state.context(4) == context
    broken = SessionState(**{**vars(state), "lods": [[0, 1], [1, 1]]})
    with pytest.raises(DataError, match="no tiling"):
        broken.context(4)
    with pytest.raises(DataError, match="covers 4 tokens, not 700"):
        SessionState(**{**vars(state), "lods": [[1, 1]]}).context(4)
