"""`--config FILE`: settings from a file of one's own, or from another run; flags go before it, the run's own come after it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_pipeline import arguments, run_pipeline


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"--config={path}"


@pytest.mark.parametrize(
    "text",
    ["depth: 3\nmatrix_lr: 2e-3\nmc: true\n", "model: {depth: 3}\ntrain:\n  matrix_lr: 0.002\nmemory: {mc: 1}\n"],
)
def test_flat_or_in_sections(tmp_path: Path, text: str) -> None:
    args = arguments(tmp_path, "--tier=cpu", write(tmp_path / "mine.yaml", text))
    assert (args.model.depth, args.train.matrix_lr, args.memory.mc) == (3, 0.002, 1)
    assert {"depth", "matrix_lr", "mc"} <= args.given
    assert args.model.token_shift == 1, "what --mc implies holds as well"


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--tier=cpu", write(tmp_path / "mine.yaml", "depth: 3\nwidth: 96\n"), "--depth=5")
    assert (args.model.depth, args.model.width) == (5, 96)


def test_the_settings_of_another_run_without_its_machine(tmp_path: Path) -> None:
    run_pipeline(tmp_path, "--matrix_lr=0.007")
    known = tmp_path / "runs" / "mine" / "config.yaml"
    args = arguments(tmp_path / "elsewhere", f"--config={known}", run="other")
    assert (args.train.matrix_lr, args.model.width) == (0.007, 32)
    assert args.run.run == "other"
    assert args.run.base_dir == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dept: 3", "has 'dept', which is no setting"),
        ("depth: 0", "--depth is 0; it must be a whole number of at least 1"),
        ("depth: many", "--depth is 'many'; it must be a whole number"),
        ("[1, 2]", "holds no settings"),
        ("{depth: 3", "is not YAML"),
    ],
)
def test_what_cannot_be_ends_with_the_files_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said) as caught:
        arguments(tmp_path, write(tmp_path / "mine.yaml", text))
    assert "mine.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="does not exist; give a YAML file of settings"):
        arguments(tmp_path, f"--config={tmp_path / 'none.yaml'}")
