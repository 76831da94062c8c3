"""Sessions whose files are missing, cut, changed or of an older copy; paths and states that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from session_programs import PLAIN, ids_of, make_model, make_tokenizer, one_thread, random_ids

import megacontext as mc
from megacontext.context import recovery
from megacontext.errors import DamagedError, DataError, MegaContextError, StorageError, UserError
from megacontext.inference import session_state

MODEL = make_model(False)
IDS = random_ids(203)
OLDER, TOKENS = 150, len(IDS)
_threads = pytest.fixture(scope="module", autouse=True)(one_thread)

FILES = [
    "session.json", "tree/tree.json", "tree/ids.bin", "tree/ids.crc", "tree/gists_0_01.bin", "tree/gists_0_02.bin",
    "tree/gists_0_03.bin", "tree/commit.bin", "tree/commit.copy", "tree/lock",
]  # fmt: skip
DAMAGES = ["missing", "empty", "half", "four bytes short", "a bit flipped", "of an older copy"]


def opened(path: Path | None, **options: Any) -> mc.Session:
    return mc.Session(MODEL, make_tokenizer(), path=path, **{**(PLAIN if path is None else {}), **options})


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A closed session of 203 tokens, and a copy of it from when it had 150."""
    folder = tmp_path_factory.mktemp("damage")
    with mc.Session(MODEL, make_tokenizer(), path=folder / "s", **PLAIN) as session:
        session.append(IDS[:90])
        session.append(IDS[90:OLDER])
    shutil.copytree(folder / "s", folder / "older")
    with opened(folder / "s") as session:
        session.append(IDS[OLDER:])
    return {"whole": folder / "s", "older": folder / "older"}


@pytest.fixture(scope="module")
def continuation() -> Callable[[int], list[int]]:
    """What a new session of the first `tokens` ids generates."""
    known: dict[int, list[int]] = {}

    def generated(tokens: int) -> list[int]:
        if tokens not in known:
            with opened(None) as session:
                session.append(IDS[:tokens])
                known[tokens] = list(session.generate(3, stop=()))
        return known[tokens]

    return generated


def harm(path: Path, damage: str, older: Path) -> None:
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "of an older copy":
        shutil.copy(older, path)
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        cut = {"empty": b"", "half": data[:middle], "four bytes short": data[:-4], "a bit flipped": flipped}
        path.write_bytes(cut[damage])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, whose only content is the name of who opened the tree last."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def intact_tokens(file: str, damage: str) -> int:
    """Tokens of the longest prefix that the undamaged files bear out."""
    if file != "tree/ids.bin":
        return TOKENS
    return {"missing": 0, "empty": 0, "half": 100, "four bytes short": 200, "a bit flipped": 100}.get(damage, OLDER)


def costs_something(file: str, damage: str) -> bool:
    """Whether a session with this damage is refused unless it is salvaged."""
    harmless = {"session.json": ("missing", "of an older copy"), "tree/tree.json": ("of an older copy",)}
    return file == "tree/ids.bin" or (file in ("session.json", "tree/tree.json") and damage not in harmless[file])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_nothing_intact_is_lost(
    file: str, damage: str, tmp_path: Path, copies: dict[str, Path], continuation: Callable[[int], list[int]]
) -> None:
    path = tmp_path / "s"
    shutil.copytree(copies["whole"], path)
    harm(path / file, damage, copies["older"] / file)
    before, intact = contents(path), intact_tokens(file, damage)
    options = PLAIN if file == "session.json" else {}

    with opened(path, read_only=True, **options) as reader:
        assert reader.tokens <= intact
        assert reader.tokens >= intact - intact % 4
        intact = reader.tokens
        assert ids_of(reader) == IDS[:intact].tolist()
        with pytest.raises(UserError, match="opened with read_only=True"):
            reader.append([1])
        with pytest.raises(UserError, match="opened with read_only=True"):
            next(reader.generate(1))
        reader.refocus()
    assert contents(path) == before

    refused = costs_something(file, damage)
    if refused:
        with pytest.raises(DamagedError, match=rf"(?s){Path(file).name}.*salvage=True") as error:
            opened(path, **options)
        assert "read_only=True" in str(error.value)
        assert "writable" not in str(error.value)
        assert contents(path) == before
    with opened(path, salvage=refused, **options) as session:
        session.verify()
        assert ids_of(session) == IDS[:intact].tolist()
        after = contents(path)
        kept = [data for name, data in after.items() if ".damaged-" in name]
        for name, data in before.items():
            if intact and not name.startswith("tree/gists") and len(after[name]) < len(data):
                assert file in ("tree/ids.bin", "session.json", "tree/tree.json")
        if refused and before.get(file):
            assert any(data and before[file].endswith(data) for data in kept)
        assert list(session.generate(3, stop=())) == continuation(intact)
    with opened(path) as session:
        assert session.tokens == max(intact, 1) + 3  # an empty history begins with BOS
        session.verify()


def test_a_record_that_changes_is_noticed_when_it_is_read(
    tmp_path: Path, copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch, continuation: Callable[[int], list[int]]
) -> None:
    """Of a session so long that opening does not check all of it."""
    for name in ("CHECKED_TOKENS", "CHECKED_BYTES", "CHECKED_IN_ALL"):
        monkeypatch.setattr(recovery, name, -1 if name == "CHECKED_IN_ALL" else 0)
    for level in (1, 2, 3):
        file = f"gists_0_0{level}.bin"
        path = tmp_path / file
        shutil.copytree(copies["whole"], path)
        data = bytearray((path / "tree" / file).read_bytes())
        data[::132] = bytes(value ^ 4 for value in data[::132])  # a bit of every record
        (path / "tree" / file).write_bytes(data)
        with opened(path) as session:
            with pytest.raises(DamagedError, match=rf"{file}.*has changed.*salvage=True"):
                session.verify()
            if any(lod == level for lod, _ in session.entries):
                with pytest.raises(DamagedError, match=rf"{file}.*has changed.*salvage=True"):
                    next(session.generate(1))
            assert session.tokens == TOKENS
        with opened(path, salvage=True) as session:
            assert list(session.generate(3, stop=())) == continuation(TOKENS)


def test_a_tree_that_is_gone_is_no_empty_session(tmp_path: Path, copies: dict[str, Path]) -> None:
    path = tmp_path / "s"
    shutil.copytree(copies["whole"], path)
    shutil.rmtree(path / "tree")
    for _ in range(2):
        for read_only in (False, True):
            with pytest.raises(DamagedError, match=r"tree' is missing or empty.*203 tokens.*salvage=True"):
                opened(path, read_only=read_only)
        (path / "tree").mkdir(exist_ok=True)
    assert sorted(contents(path)) == ["session.json"]
    with opened(path, salvage=True) as session:
        assert session.tokens == 0
        session.append(IDS)
    assert (path / "session.json.damaged-1").read_bytes() == (copies["whole"] / "session.json").read_bytes()
    shutil.copy(copies["whole"] / "tree" / "tree.json", tmp_path)
    shutil.rmtree(path / "tree")
    (path / "tree").mkdir()
    shutil.copy(tmp_path / "tree.json", path / "tree")
    with pytest.raises(DamagedError, match=r"the tree holds no tokens.*203 tokens.*salvage=True"):
        opened(path)


def test_a_folder_deleted_while_open_is_said_and_not_made_again(tmp_path: Path) -> None:
    session = mc.Session(MODEL, make_tokenizer(), path=tmp_path / "s", **PLAIN)
    session.append(IDS[:90])
    session.refocus()
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(StorageError, match="was deleted while"):
        session.append(IDS[90:])  # session.json is written before the tree takes tokens that follow another focus
    with pytest.raises(StorageError, match="deleted while it was open"):
        session.close()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "four bytes short"])
def test_verify_of_a_reader_names_the_checksums(tmp_path: Path, copies: dict[str, Path], damage: str) -> None:
    shutil.copytree(copies["whole"], tmp_path / "s")
    harm(tmp_path / "s" / "tree" / "ids.crc", damage, copies["older"])
    with (
        opened(tmp_path / "s", read_only=True) as session,
        pytest.raises(DamagedError, match=r"ids\.crc' has changed .* the ids are intact.*salvage=True"),
    ):
        session.verify()


def test_a_state_ahead_of_its_tree_is_kept_aside(tmp_path: Path, copies: dict[str, Path]) -> None:
    path = tmp_path / "s"
    shutil.copytree(copies["older"], path)
    shutil.copy(copies["whole"] / "session.json", path)
    with opened(path) as session:
        assert ids_of(session) == IDS[:OLDER].tolist()
    assert (path / "session.json.damaged-1").read_bytes() == (copies["whole"] / "session.json").read_bytes()


def test_a_reader_beside_a_writer(tmp_path: Path) -> None:
    with mc.Session(MODEL, make_tokenizer(), path=tmp_path / "s", **PLAIN) as writer:
        writer.append(IDS[:90])
        with opened(tmp_path / "s", read_only=True) as reader:
            writer.append(IDS[90:])
            assert ids_of(reader) == IDS[:90].tolist()
            reader.verify()
        with pytest.raises(UserError, match=r"open for writing by process.*read_only=True"):
            opened(tmp_path / "s")


def test_options_that_cannot_be_together(tmp_path: Path) -> None:
    for options in (dict(read_only=True), dict(salvage=True)):
        with pytest.raises(UserError, match="give its path"):
            opened(None, **options)
    with pytest.raises(UserError, match="one of the two"):
        opened(tmp_path / "s", read_only=True, salvage=True)
    with pytest.raises(DataError, match=r"there is no tree at .*leave out read_only=True"):
        opened(tmp_path / "s", read_only=True)
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be(tmp_path: Path, copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "state" / "session.json").mkdir(parents=True)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "tree").write_text("x")
    for number, name in enumerate(["lock", "tree.json", "ids.bin", "ids.crc", "commit.bin", "commit.copy"]):
        shutil.copytree(copies["whole"], tmp_path / str(number))
        (tmp_path / str(number) / "tree" / name).unlink()
        (tmp_path / str(number) / "tree" / name).mkdir()
    cases: list[tuple[Any, type[MegaContextError], str]] = [
        (tmp_path / "file", StorageError, r"file' is a file, and a session is a folder"),
        (tmp_path / "file" / "below", StorageError, "below.*Choose another path"),
        (tmp_path / ("n" * 300), StorageError, "too long.*Choose another path"),
        (tmp_path / "state", StorageError, r"session.json'.*Choose another path"),
        (tmp_path / "tree", StorageError, r"tree'.*Check the path"),
        *[(tmp_path / str(number), StorageError, r"Is a directory.*Check the path") for number in range(6)],
        (str(tmp_path / "nul\0"), UserError, "NUL.*Choose another path"),
        (str(tmp_path / "\ud800"), UserError, "Choose another path"),
        ("~nobody-has-this-name/s", StorageError, "give an absolute path"),
        ("", UserError, "path is ''"),
        (5, UserError, "path is 5"),
        ("s3://bucket/s", UserError, "local folder"),
    ]  # fmt: skip
    for path, kind, message in cases:
        for options in ({}, dict(read_only=True), dict(salvage=True)):
            if path == tmp_path / "0" and options == {"read_only": True}:
                continue  # a reader needs no lock
            with pytest.raises(kind, match=message):
                opened(path, **PLAIN, **options)
    denied = PermissionError(13, "Permission denied")

    def refuse(*_: object, **__: object) -> None:
        raise denied

    for target in (Path, "mkdir"), (Path, "read_bytes"), (Path, "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(*target, refuse)
            with pytest.raises(StorageError, match=r"Permission denied.*permissions"):
                opened(tmp_path / "new", **PLAIN)


def forged(body: dict[str, Any], **changes: Any) -> bytes:
    """A session.json that says something else and has the right checksum."""
    changed = {**{name: value for name, value in body.items() if name != "checksum"}, **changes}
    return json.dumps({**changed, "checksum": session_state._checksum(changed)}).encode()


def test_states_that_cannot_be(
    tmp_path: Path, copies: dict[str, Path], continuation: Callable[[int], list[int]]
) -> None:
    path = tmp_path / "s"
    shutil.copytree(copies["whole"], path)
    state = path / "session.json"
    body = json.loads(state.read_bytes())
    options, allocator = body["options"], body["allocator"]
    bad: list[bytes] = [
        b"[" * 200_000, b'{"a":' * 200_000, state.read_bytes()[:-20] + b"\xff\xfe", b"[1]", b"3", b'"text"', b"null",
        b"1" * 5000, b"\0" * 300,
    ]  # fmt: skip
    for changes in (
        dict(options=[1, 2]), dict(options={}), dict(options={**options, "budget": "64"}),
        dict(options={**options, "depth": 1}), dict(options={**options, "budget": -1}), dict(tokens="203"),
        dict(tokens=-1), dict(tokens=True), dict(tokens=1 << 60), dict(lods=[[-1, 203]]), dict(lods=[[0, -203]]),
        dict(lods=[["0", 203]]), dict(lods=[3]), dict(lods="all"), dict(lods=[[0, 10**15]]), dict(lods=[[52, 1]]),
        dict(lods=[[0, 3]]), dict(since_refocus=None), dict(refocused_at=999), dict(stale=0), dict(following="read"),
        dict(model_digest=7), dict(allocator=[]), dict(allocator={**allocator, "made": "x"}),
        dict(allocator={**allocator, "refocuses": -1}), dict(allocator={**allocator, "known": [[9, 9]], "born": [1]}),
        dict(allocator={**allocator, "made": [[1, 2]]}), dict(allocator={**allocator, "born": [[1], [2, 3]]}),
    ):  # fmt: skip
        bad.append(forged(body, **changes))
    for data in bad:
        state.write_bytes(data)
        with pytest.raises(DamagedError, match=r"session.json' is not a session's state or is damaged: .*salvage=True"):
            opened(path)
        assert state.read_bytes() == data
    with opened(path, salvage=True, **PLAIN) as session:
        assert list(session.generate(3, stop=())) == continuation(TOKENS)
    state.write_bytes(forged(body, version=7))
    for salvage in (False, True):  # of a newer program: nothing to salvage
        with pytest.raises(DataError, match="version 7"):
            opened(path, salvage=salvage)


def test_a_lost_state_leaves_the_tree_its_own_block_size(tmp_path: Path, copies: dict[str, Path]) -> None:
    path = tmp_path / "s"
    shutil.copytree(copies["whole"], path)
    (path / "session.json").unlink()
    with opened(path) as session:  # 4, where a session of such a model has 32 unless told otherwise
        assert session.options.block_size == 4
        assert np.array_equal(session.tree.ids(0, TOKENS), IDS)
