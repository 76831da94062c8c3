"""CORE bundles as people make them: byte-order marks, odd options, and every problem named with its file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megacontext import storage
from megacontext.config import GPTConfig
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError
from megacontext.eval.core import CoreResult, evaluate_core
from megacontext.eval.core_tasks import load_bundle, load_items
from megacontext.model.gpt import GPT

BOM = b"\xef\xbb\xbf"
PICK = [{"query": f"{i} plus {i}?", "choices": [str(2 * i), "none"], "gold": i % 2} for i in range(6)]
SAY = [{"context": f"count {i}", "continuation": str(i + 1)} for i in range(6)]
PLACE = [{"context_options": [f"box {i}", f"bag {i}"], "continuation": "is big", "gold": i % 2} for i in range(6)]
KINDS = {"multiple_choice": PICK, "language_modeling": SAY, "schema": PLACE}


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[GPT, Tokenizer]:
    tokenizer = Tokenizer.train(["The box is big, the bag is none of it, count 1 plus 1?"] * 4, 280)
    model = GPT(
        GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model, tokenizer


def bundle(
    folder: Path, kind: str = "multiple_choice", items: Any = None, baselines: bytes = b"t,25\n", **entry: Any
) -> str:
    """A bundle of one task `t`; `items` are objects, or the bytes of the task's file."""
    task = {"label": "t", "dataset_uri": "t.jsonl", "num_fewshot": [1], "icl_task_type": kind} | entry
    (folder / "eval_data").mkdir(parents=True, exist_ok=True)
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [task]}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_bytes(b"Eval Task,Random baseline\n" + baselines)
    items = KINDS[kind] if items is None else items
    lines = items if isinstance(items, bytes) else "".join(json.dumps(item) + "\n" for item in items).encode()
    (folder / "eval_data/t.jsonl").write_bytes(lines)
    return str(folder)


def score(model_and_tokenizer: tuple[GPT, Tokenizer], path: str) -> tuple[CoreResult, list[str]]:
    spoken: list[str] = []
    return evaluate_core(*model_and_tokenizer, load_bundle(path), say=spoken.append), spoken


@pytest.mark.parametrize(("kind", "field"), [("multiple_choice", "choices"), ("schema", "context_options")])
def test_identical_options_have_nanochats_verdict_and_are_named(
    tmp_path: Path, model_and_tokenizer: tuple[GPT, Tokenizer], kind: str, field: str
) -> None:
    """nanochat takes the mean of nothing, NaN, for every option, and the lowest of them is the first."""
    odd = [{**item, field: ["same", "same"]} for item in KINDS[kind][:2]]  # gold 0 and gold 1
    only, spoken = score(model_and_tokenizer, bundle(tmp_path / "only", kind, odd, num_fewshot=[0]))
    assert sorted(only.tasks[0].correct) == [False, True]
    assert "t.jsonl, line 1, 2: an option equals all others" in spoken[0]
    mixed, spoken = score(model_and_tokenizer, bundle(tmp_path / "mixed", kind, [*KINDS[kind], *odd]))
    assert len(mixed.tasks[0].correct) == 8
    assert "t.jsonl, line 7, 8: an option equals all others" in spoken[0]


def test_empty_options_and_numbers_are_text(tmp_path: Path, model_and_tokenizer: tuple[GPT, Tokenizer]) -> None:
    items = [*PICK, {"query": "", "choices": ["", "none", 7], "gold": 2}]
    result, _ = score(model_and_tokenizer, bundle(tmp_path, items=items))
    assert len(result.tasks[0].correct) == 7


def test_marks_and_line_ends_of_other_systems_change_nothing(tmp_path: Path) -> None:
    plain = load_items(load_bundle(bundle(tmp_path / "plain")).tasks[0])
    text = "\r\n".join(json.dumps(item) for item in PICK).encode() + b"\r\n\r\n  \n"
    folder = tmp_path / "other"
    bundle(folder, items=BOM + text)
    for name in ("core.yaml", "eval_meta_data.csv"):
        path = folder / name
        path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))
    task = load_bundle(str(folder)).tasks[0]
    assert task.baseline == 0.25
    assert load_items(task) == plain


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(item).encode() for item in PICK]
    lines[1] = b'{"query": "a\xff", "choices": ["b", "c"], "gold": 0}'
    lines[3] = b'{"query": "a", "choices": ["b", "c"], "gold": 2}'
    lines[5] = b"[" * 200_000
    with pytest.raises(DataError) as caught:
        load_items(load_bundle(bundle(tmp_path, items=b"\n".join(lines))).tasks[0])
    for part in ("t.jsonl, line 2: not JSON", "line 4: gold 2 is none of 2 options", "line 6: not JSON"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=r"line 5: .* There are 15 more such lines"):
        load_items(load_bundle(bundle(tmp_path, items=b"x\n" * 20)).tasks[0])


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("multiple_choice", {"query": None, "choices": ["b", "c"], "gold": 0}, "line 7: None in query is neither"),
        ("multiple_choice", {"query": "a", "choices": ["b", ["c"]], "gold": 0}, r"line 7: \['c'\] in choices is"),
        ("multiple_choice", {"query": "a", "choices": ["b", "c"], "gold": -1}, "line 7: gold -1 is none of 2"),
        ("multiple_choice", {"query": "a", "choices": ["b", "c"], "gold": True}, "line 7: gold True is none of 2"),
        ("schema", {"context_options": "ab", "continuation": "c", "gold": 0}, "line 7: context_options must be a list"),
        ("language_modeling", {"context": "a", "continuation": {}}, r"line 7: \{\} in continuation is neither"),
    ],
)
def test_an_item_that_cannot_be_asked_is_named(tmp_path: Path, kind: str, item: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"t\.jsonl, {message}"):
        load_items(load_bundle(bundle(tmp_path, kind, [*KINDS[kind], item])).tasks[0])


def test_a_continuation_that_cannot_be_judged_is_named_before_anything_is_scored(
    tmp_path: Path, model_and_tokenizer: tuple[GPT, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacontext.eval.core.score_questions", lambda *_: pytest.fail("scored"))
    items = [*SAY, {"context": "x", "continuation": ""}, *SAY, {"context": "1", "continuation": ""}]
    with pytest.raises(DataError, match=r"t\.jsonl, line 7: the ids of the context .*t\.jsonl, line 14: "):
        score(model_and_tokenizer, bundle(tmp_path, "language_modeling", items, continuation_delimiter=""))


def test_no_task_file_is_an_error_and_no_number(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    (tmp_path / "eval_data/t.jsonl").unlink()
    with pytest.raises(DataError, match=r"core\.yaml lists 1 tasks, and none of them has a file in .*eval_data"):
        load_bundle(path)


def test_too_few_items_on_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs 9 examples .* 6 items are in use; add items to .*t\.jsonl"):
        load_items(load_bundle(bundle(tmp_path, num_fewshot=[9])).tasks[0])


@pytest.mark.parametrize("written", [b"100", b"101", b"-1", b"nan", b"inf", b"many", b""])
def test_a_baseline_that_centres_nothing_is_named(tmp_path: Path, written: bytes) -> None:
    path = bundle(tmp_path, baselines=b"t,25\nx," + written + b"\n")
    message = rf"eval_meta_data\.csv, line 3: the random baseline of 'x' is '{written.decode()}'"
    with pytest.raises(DataError, match=message):
        load_bundle(path)


def test_two_baselines_of_one_task_are_named(tmp_path: Path) -> None:
    path = bundle(tmp_path, baselines=b"t,25\nt,25\nx,5\nt,50\n")
    with pytest.raises(DataError, match=r"eval_meta_data\.csv, line 5: 't' has another random baseline"):
        load_bundle(path)


def test_a_table_with_other_separators_is_explained(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task;Random baseline\nt;25\n")
    with pytest.raises(DataError, match=r"separated by commas; .* are \['Eval Task;Random baseline'\]"):
        load_bundle(path)
    (tmp_path / "eval_meta_data.csv").write_bytes("Eval Task,Random baseline\nt,25\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"eval_meta_data\.csv is not UTF-8"):
        load_bundle(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_fewshot": "ten"}, "task 1: task t: num_fewshot is 'ten'"),
        ({"num_fewshot": []}, r"task 1: task t: num_fewshot is \[\]"),
        ({"num_fewshot": [-1]}, "task 1: task t: num_fewshot"),
        ({"label": None}, "task 1: label is None"),
        ({"dataset_uri": 5}, "task 1: dataset_uri is 5"),
        ({"continuation_delimiter": 5}, "task t: continuation_delimiter is 5"),
    ],
)
def test_a_task_of_the_yaml_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"core\.yaml, {message}" if "task 1" in message else message):
        load_bundle(bundle(tmp_path, **entry))


@pytest.mark.parametrize("text", ["", "7", "icl_tasks:", "icl_tasks: []", "icl_tasks: {a: 1}", "icl_tasks: [7]"])
def test_a_yaml_without_tasks_is_explained(tmp_path: Path, text: str) -> None:
    path = bundle(tmp_path)
    (tmp_path / "core.yaml").write_text(text)
    with pytest.raises(DataError, match=r"core\.yaml.*(icl_tasks|is no task)"):
        load_bundle(path)


def test_labels_are_unique(tmp_path: Path) -> None:
    path = bundle(tmp_path)
    listed = json.loads((tmp_path / "core.yaml").read_text())["icl_tasks"]
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": listed * 2}))
    with pytest.raises(DataError, match="label t stands at several tasks"):
        load_bundle(path)


def test_a_json_file_of_ours_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    storage.write_json(str(path), {"a": {"b": [1.5, math.nan, (math.inf, 2)]}, "c": -math.inf, "d": True})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": {"b": [1.5, None, [None, 2]]},
        "c": None,
        "d": True,
    }
