"""Damage to checkpoints: it is named, never loaded, never counted, and nothing intact is deleted because of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import losses, train_here
from tiny import make_task, make_tokenizer

import megacontext as mc
from megacontext import storage
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, StorageError
from megacontext.train import checkpoint as ck
from megacontext.train import resume
from megacontext.train.resume import newest_to_resume

FILES = (
    "model.pt",
    "optimizer.pt",
    "meta.json",
    "tokenizer/tokenizer.pkl",
    "tokenizer/token_bytes.pt",
    "manifest.json",
)
HARMS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "four bytes short": lambda data: data[:-4],
    "one bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
}
META = {"identity": {}, "train_data": "x", "num_iterations": 9, "best_checkpoint": None}


def state_of(step: int) -> dict[str, Any]:
    """What the loop keeps, after so many steps."""
    counts = {"step": step, "rows_consumed": step, "total_tokens": step, "smooth_loss": 1.0, "best_checkpoint": None}
    return counts | {"total_training_flops": 1.0, "total_training_time": 1.0, "val_bpb": None, "best_val_bpb": 2.0}


def write(directory: Path | str, *steps: int, keep: int = 10, tokenizer: Path | None = None) -> None:
    """Checkpoints of these steps by one writer; each has other weights."""
    writer = ck.CheckpointWriter(str(directory), "base", str(tokenizer) if tokenizer else None, keep)
    for step in steps:
        model = {"w": torch.full((8, 8), float(step))}
        writer.save(step, model, {"w": {"momentum": torch.full((9,), float(step))}}, {**META, "state": state_of(step)})
    writer.close()


def path_of(directory: Path, step: int) -> Path:
    return directory / ck.checkpoint_name("base", step)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def set_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def seal(folder: Path) -> None:
    """A manifest that fits whatever lies in the folder."""
    files = {
        name: {"bytes": len(data), "sha256": storage.sha256_file(str(folder / name))}
        for name, data in content(folder).items()
        if name != ck.MANIFEST
    }
    (folder / ck.MANIFEST).write_text(json.dumps({"files": files}))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2 with different tokenizers."""
    folder = tmp_path_factory.mktemp("two")
    make_tokenizer(folder / "first")
    Tokenizer.train(["one two three four five six seven eight nine ten eleven twelve " * 9], 290).save(
        str(folder / "other")
    )
    for step, name in ((1, "first"), (2, "other")):
        write(folder / "checkpoints", step, tokenizer=folder / name)
    return folder / "checkpoints"


def check_is_passed_over(directory: Path, says: str) -> None:
    """The newest checkpoint is damaged: never loaded, never deleted; the one before it is used, and kept while it must."""
    newest = path_of(directory, 2)
    before = content(newest)
    with pytest.raises(CheckpointError, match="cannot be loaded") as refused:
        ck.load_checkpoint(str(newest), with_optimizer=False)
    assert says in str(refused.value)
    said: list[str] = []
    for newest_of in (ck.latest_checkpoint, newest_to_resume):
        assert newest_of(str(directory), "base", warn=said.append) == str(path_of(directory, 1))
    assert len(said) == 2
    assert all(str(newest) in line and says in line for line in said)
    write(directory, 3, keep=2)
    assert content(newest) == before
    assert newest_to_resume(str(directory), "base", warn=said.append) == str(path_of(directory, 3))
    assert path_of(directory, 1).is_dir(), "two intact ones are kept, and the damaged one is none of them"
    write(directory, 4, keep=1)
    assert [path.name[-1] for path in sorted(directory.glob("mega*"))] == ["2", "4"]
    assert content(newest) == before


@pytest.mark.parametrize("harm", ["missing", *HARMS, "of an older copy"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    two: Path, tmp_path: Path, name: str, harm: str
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    victim = path_of(directory, 2) / name
    if harm == "missing":
        victim.unlink()
    elif harm == "of an older copy":
        shutil.copy(path_of(directory, 1) / name, victim)
    else:
        victim.write_bytes(HARMS[harm](victim.read_bytes()))
    # Of a manifest that can be read, it is one of the recorded sizes or checksums that is wrong.
    says = "" if name == "manifest.json" and harm in ("one bit flipped", "of an older copy") else name
    check_is_passed_over(directory, says)


def test_all_files_of_an_older_copy_are_an_older_checkpoint(two: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    shutil.rmtree(path_of(directory, 2))
    shutil.copytree(path_of(directory, 1), path_of(directory, 2))
    check_is_passed_over(directory, "meta.json is that of megacontext_base_000001")


SHA = "0" * 64
MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no files": (lambda m: m["files"].clear(), "does not list model.pt, optimizer.pt, meta.json"),
    "other key": (lambda m: m.update(fils=m.pop("files")), "has no list of files"),
    "a list": (lambda m: m.update(files=["model.pt"]), "has no list of files"),
    "one not listed": (lambda m: m["files"].pop("optimizer.pt"), "does not list optimizer.pt"),
    "no size": (lambda m: m["files"]["model.pt"].pop("bytes"), "no size and SHA-256 of model.pt"),
    "size is text": (lambda m: m["files"]["model.pt"].update(bytes="9"), "no size and SHA-256 of model.pt"),
    "checksum renamed": (lambda m: m["files"]["model.pt"].update(sha=m["files"]["model.pt"].pop("sha256")), "model.pt"),
    "entry is a number": (lambda m: m["files"].update({"model.pt": 7}), "no size and SHA-256 of model.pt"),
    "outside": (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": SHA}}), "'../x', which is not a file"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": SHA}}), "'/etc/passwd'"),
    "the folder": (lambda m: m["files"].update({"tokenizer": {"bytes": 1, "sha256": SHA}}), "tokenizer"),
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_that_is_not_one_is_damage(two: Path, tmp_path: Path, change: str) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    set_json(path_of(directory, 2) / ck.MANIFEST, MANIFESTS[change][0])
    check_is_passed_over(directory, MANIFESTS[change][1])


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("meta.json", b"[" * 200_000, "meta.json cannot be read"),
        ("meta.json", b"7", "meta.json holds no JSON object"),
        ("meta.json", b'{"format": 1, "stage": "base"}', "meta.json has no 'step'"),
        ("meta.json", b'{"format": "1", "stage": "base", "step": 2}', "'format' of its meta.json is '1'"),
        ("meta.json", b'{"format": 1, "stage": "base", "step": true}', "'step' of its meta.json is True"),
        ("model.pt", b"no tensors", "model.pt holds no tensors"),
        ("optimizer.pt", b"", "optimizer.pt holds no tensors"),
    ],
)
def test_content_that_a_manifest_bears_out_is_read_with_care(
    two: Path, tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    (path_of(directory, 2) / name).write_bytes(data)
    seal(path_of(directory, 2))
    check_is_passed_over(directory, says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda meta: meta.pop("state"), "'state' of its meta.json is None"),
        (lambda meta: meta.update(identity=[1]), r"'identity' of its meta.json is \[1\]"),
        (lambda meta: meta["state"].pop("rows_consumed"), "'rows_consumed' of the state"),
        (lambda meta: meta["state"].update(smooth_loss="high"), "'smooth_loss' of the state"),
        (lambda meta: meta["state"].update(best_checkpoint=3), "'best_checkpoint' of the state"),
        (lambda meta: meta["state"].update(lens={"gap": 1}), "'lens' of the state"),
        (lambda meta: meta["state"].update(step=1), "is of step 1"),
    ],
)
def test_what_training_needs_of_meta_and_does_not_find_is_damage(
    two: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    set_json(path_of(directory, 2) / "meta.json", change)
    seal(path_of(directory, 2))
    said: list[str] = []
    assert newest_to_resume(str(directory), "base", warn=said.append) == str(path_of(directory, 1))
    assert len(said) == 1
    shutil.rmtree(path_of(directory, 1))
    with pytest.raises(CheckpointError, match=says):
        newest_to_resume(str(directory), "base", warn=said.append)


def test_an_empty_folder_of_a_later_step_costs_nothing(tmp_path: Path) -> None:
    write(tmp_path, 30)
    path_of(tmp_path, 33).mkdir()
    write(tmp_path, 32, keep=1)
    said: list[str] = []
    assert newest_to_resume(str(tmp_path), "base", warn=said.append) == str(path_of(tmp_path, 32))
    assert path_of(tmp_path, 33).is_dir()
    assert not path_of(tmp_path, 30).exists()
    write(tmp_path, 33, 34, keep=1)  # training comes to step 33 again
    assert [path.name for path in tmp_path.glob("mega*")] == ["megacontext_base_000034"]


def test_a_file_in_place_of_a_checkpoint_is_damage(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path_of(tmp_path, 2).write_text("not a folder")
    said: list[str] = []
    assert newest_to_resume(str(tmp_path), "base", warn=said.append) == str(path_of(tmp_path, 1))
    path_of(tmp_path, 4).symlink_to("nowhere")
    write(tmp_path, 3, keep=1)
    assert path_of(tmp_path, 2).read_text() == "not a folder"
    write(tmp_path, 2, 4)  # training comes to these steps: what lay there is kept under another name
    assert path_of(tmp_path, 2).with_name(f"{path_of(tmp_path, 2).name}.aside").read_text() == "not a folder"
    assert newest_to_resume(str(tmp_path), "base") == str(path_of(tmp_path, 4))


def test_damage_that_keeps_the_size_does_not_count_either(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    for step in (2, 3):
        victim = path_of(tmp_path, step) / "model.pt"
        victim.write_bytes(HARMS["one bit flipped"](victim.read_bytes()))
    write(tmp_path, 4, keep=2)
    assert path_of(tmp_path, 1).is_dir()
    assert newest_to_resume(str(tmp_path), "base") == str(path_of(tmp_path, 4))


def test_training_does_not_begin_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    train_here(make_task(tmp_path))
    directory = tmp_path / "run" / "checkpoints"
    for path in directory.glob("mega*"):
        (path / "model.pt").write_bytes(b"half")
    before, metrics = content(directory), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"each of the 3 .*000012: model.pt has 4 bytes.*delete these folders"):
        train_here(make_task(tmp_path))
    assert content(directory) == before
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(directory)
    train_here(make_task(tmp_path))
    train_here(make_task(tmp_path, "whole"))
    assert losses(tmp_path, "run") == losses(tmp_path, "whole")


def test_every_start_says_where_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_task(tmp_path)
    train_here(task)
    directory = Path(task.run_dir) / "checkpoints"
    assert f"base: starting at step 0 of 12: no checkpoint in {directory}\n" in capsys.readouterr().out
    train_here(task)
    assert f"base: resuming at step 12 of 12 from {path_of(directory, 12)}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["token_bytes.pt", "tokenizer.pkl"])
def test_a_missing_file_of_the_tokenizer_is_found_before_the_first_step(tmp_path: Path, name: str) -> None:
    task = make_task(tmp_path)
    (tmp_path / "tokenizer" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"no {name}.*jobs/tok_train.py") as missing:
        train_here(task)
    assert "Free space" not in str(missing.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(CheckpointError, match=name):
        resume.check_start(task)


@pytest.mark.parametrize("data", [b"", b"no tensor"])
def test_a_damaged_file_of_the_tokenizer_is_found_before_the_first_step(tmp_path: Path, data: bytes) -> None:
    task = make_task(tmp_path)
    (tmp_path / "tokenizer" / "token_bytes.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"token_bytes.pt in .* is damaged.*jobs/tok_train.py"):
        train_here(task)


def test_the_tokenizer_may_vanish_while_training_goes_on(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    writer = ck.CheckpointWriter(str(tmp_path / "c"), "base", str(tmp_path / "tokenizer"), 2)
    shutil.rmtree(tmp_path / "tokenizer")
    writer.save(1, {}, {}, {})
    writer.close()
    assert ck.damage(str(path_of(tmp_path / "c", 1))) is None


def test_room_for_checkpoints_is_looked_at_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task(tmp_path)
    train_here(make_task(tmp_path, "other", num_iterations=1))
    saved = tmp_path / "other" / "checkpoints" / "megacontext_base_000001"
    size = sum((saved / name).stat().st_size for name in ("model.pt", "optimizer.pt"))

    def disk(free: int) -> None:
        monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))

    disk(size // 2)
    with pytest.raises(StorageError, match=r"takes \d+ MB.*has \d+ MB free: the first save would fail"):
        train_here(task)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    disk(2 * size)
    assert train_here(task).finished
    assert "warning: a checkpoint of this run takes" in capsys.readouterr().out
    disk(0)
    assert train_here(task).finished, "nothing is left to save"


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file")
    with pytest.raises(StorageError, match="checkpoints"):
        train_here(task)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"num_iterations": "9"}', b'{"steps": 9}', b"[" * 200_000])
def test_a_damaged_horizon_is_that_of_the_checkpoint(
    tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task(tmp_path, num_iterations=-1, max_minutes=1.0)
    path = tmp_path / "run" / "horizon" / "base.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert resume.stored_horizon(task, str(path)) is None
    assert f"{path} is damaged" in capsys.readouterr().out
    write(tmp_path / "run" / "checkpoints", 3)
    assert resume.stored_horizon(task, str(path)) == 9
    assert "000003 says 9 steps" in capsys.readouterr().out
    path.unlink()
    assert resume.stored_horizon(task, str(path)) == 9


def test_a_checkpoint_by_name_is_refused_with_its_file(two: Path, tmp_path: Path) -> None:
    shutil.copytree(path_of(two, 2), tmp_path / "mine")
    (tmp_path / "mine" / "tokenizer" / "tokenizer.pkl").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded: tokenizer/tokenizer.pkl is missing"):
        mc.load(str(tmp_path / "mine"))


@pytest.mark.parametrize("value", [None, 7, {"n_layer": "two"}, {"n_layer": 0}])
def test_a_model_config_that_is_none_is_refused(two: Path, tmp_path: Path, value: object) -> None:
    shutil.copytree(path_of(two, 2), tmp_path / "mine")
    set_json(tmp_path / "mine" / "meta.json", lambda meta: meta.update(model_config=value))
    seal(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"mine.*damaged"):
        mc.load(str(tmp_path / "mine"))
