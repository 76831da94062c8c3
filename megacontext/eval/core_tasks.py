"""The tasks of the CORE metric: files, few-shot prompts, and which tokens of a prompt are judged.

CORE is the mean over 22 tasks of DCLM (Li et al. 2024, arXiv 2406.11794); draws, prompts and spans are nanochat's, so
that accuracies are comparable item by item. Prompts are built here, scores in `core.py`.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml

from megacontext import storage
from megacontext.errors import DataError

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer

TASK_TYPES = ("multiple_choice", "schema", "language_modeling")
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class CoreTask:
    """One line of core.yaml, its random baseline, and where its items are (None: no such file)."""

    label: str
    task_type: str
    num_fewshot: int
    delimiter: str
    baseline: float  # accuracy of guessing, 0..1
    path: str | None


@dataclass(frozen=True)
class CoreBundle:
    """All tasks that a core.yaml lists, in its order."""

    tasks: tuple[CoreTask, ...]

    @property
    def available(self) -> tuple[CoreTask, ...]:
        return tuple(task for task in self.tasks if task.path is not None)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(task.label for task in self.tasks if task.path is None)


@dataclass(frozen=True)
class Question:
    """An item as token rows. Ids [start, end) of each row are judged; gold is the right row, None for exact match."""

    rows: tuple[list[int], ...]
    spans: tuple[tuple[int, int], ...]
    gold: int | None


def load_bundle(path: str) -> CoreBundle:
    """Read an evaluation bundle: a folder with core.yaml, eval_meta_data.csv and eval_data/, or another yaml file in it.

    Task files are `<dataset_uri>` or `<dataset_uri>.zst`; a task without a file is kept as missing.
    Raises DataError when the folder, the yaml or the csv is absent or does not say what is needed.
    """
    is_file = path.endswith((".yaml", ".yml"))
    folder = path.rsplit("/", 1)[0] if is_file and "/" in path else "." if is_file else path
    config = _read(path if is_file else storage.join(path, "core.yaml")).decode()
    baselines = _baselines(storage.join(folder, "eval_meta_data.csv"))
    try:
        listed = yaml.safe_load(config)["icl_tasks"]
        tasks = tuple(_task(folder, entry, baselines) for entry in listed)
    except (yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: not a list of CORE tasks under icl_tasks ({type(error).__name__}: {error})."
        ) from error
    return CoreBundle(tasks)


def _task(folder: str, entry: Mapping[str, Any], baselines: Mapping[str, float]) -> CoreTask:
    label, task_type = entry["label"], entry["icl_task_type"]
    if task_type not in TASK_TYPES:
        raise DataError(f"task {label}: type {task_type!r} is not one of {', '.join(TASK_TYPES)}.")
    if label not in baselines:
        raise DataError(f"task {label}: no random baseline in eval_meta_data.csv; add a row with that Eval Task.")
    uri = storage.join(folder, "eval_data", entry["dataset_uri"])
    return CoreTask(
        label=label,
        task_type=task_type,
        num_fewshot=int(entry["num_fewshot"][0]),
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=baselines[label],
        path=next((name for name in (uri, f"{uri}.zst") if storage.exists(name)), None),
    )


def _read(path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; --eval_bundle needs core.yaml, eval_meta_data.csv, eval_data/."
        ) from error


def _baselines(path: str) -> dict[str, float]:
    """Accuracy of guessing by task label, 0..1 (the file has percent)."""
    rows = csv.DictReader(io.StringIO(_read(path).decode(), newline=""))
    try:
        return {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: needs the columns 'Eval Task' and 'Random baseline' (percent): {error}.") from error


def load_items(task: CoreTask, max_items: int = -1) -> list[dict[str, Any]]:
    """The items of a task in nanochat's order: shuffled by random.Random(1337), then the first max_items (-1: all).

    Raises DataError with file and line for a line that is not JSON or lacks a field, and when too few items are left to
    draw num_fewshot examples from: an accuracy with fewer examples would not be the task that its label names.
    """
    assert task.path is not None, f"task {task.label} has no file"
    data = _read(task.path)
    if task.path.endswith(".zst"):
        try:
            data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{task.path} is not a whole zstd file: {error}. Fetch it again.") from error
    items = []
    for number, line in enumerate(data.split(b"\n"), start=1):  # not splitlines: strings hold U+2028
        if line.strip():
            items.append(_item(task, line, number))
    random.Random(SHUFFLE_SEED).shuffle(items)
    if max_items > 0:
        items = items[:max_items]
    if not items:
        raise DataError(f"{task.path} has no items.")
    if len(items) <= task.num_fewshot:
        raise DataError(
            f"task {task.label} needs {task.num_fewshot} examples beside each item, but {len(items)} items are in use; "
            f"raise --core_max_per_task to {task.num_fewshot + 1} or more, or check {task.path}."
        )
    return items


def _item(task: CoreTask, line: bytes, number: int) -> dict[str, Any]:
    try:
        item: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise DataError(f"{task.path}, line {number}: not JSON ({error}).") from error
    absent = [name for name in FIELDS[task.task_type] if not isinstance(item, dict) or name not in item]
    if absent:
        raise DataError(f"{task.path}, line {number}: a {task.task_type} item needs {', '.join(absent)}.")
    if task.task_type in OPTIONS:
        options = item[OPTIONS[task.task_type]]
        if not isinstance(options, list) or not options:
            raise DataError(f"{task.path}, line {number}: {OPTIONS[task.task_type]} must be a list of options.")
        if type(item["gold"]) is not int or not 0 <= item["gold"] < len(options):
            raise DataError(f"{task.path}, line {number}: gold {item['gold']!r} is none of {len(options)} options.")
    return item


def draw_fewshot(items: Sequence[dict[str, Any]], index: int, count: int) -> list[dict[str, Any]]:
    """The examples shown before item `index`: drawn from the others by random.Random(1234 + index)."""
    if count == 0:
        return []
    others = [i for i in range(len(items)) if i != index]
    return [items[i] for i in random.Random(FEWSHOT_SEED + index).sample(others, count)]


def render_prompts(task: CoreTask, item: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Prompt texts of one item: one per option, or for language modelling without and with the continuation.

    Examples stand first, each followed by a blank line. The text without continuation is stripped, so that a trailing
    space merges with the first word of the continuation, as the tokenizer will have it.
    """
    delimiter = task.delimiter
    if task.task_type == "multiple_choice":
        shown = [f"{e['query']}{delimiter}{e['choices'][e['gold']]}\n\n" for e in examples]
        return ["".join(shown) + f"{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task.task_type == "schema":
        shown = [f"{e['context_options'][e['gold']]}{delimiter}{e['continuation']}\n\n" for e in examples]
        return ["".join(shown) + f"{option}{delimiter}{item['continuation']}" for option in item["context_options"]]
    shown = [f"{str(e['context']).strip()}{delimiter}{e['continuation']}\n\n" for e in examples]
    without = "".join(shown) + f"{str(item['context']).strip()}{delimiter}"
    return [without.strip(), without + str(item["continuation"])]


def build_question(
    task: CoreTask,
    tokenizer: Tokenizer,
    items: Sequence[dict[str, Any]],
    index: int,
    max_seq_len: int | None = None,
) -> Question:
    """Item `index` as token rows with BOS in front, cropped from the left to max_seq_len tokens (None: not at all).

    Judged are, for multiple choice, the ids after the common prefix of the options; for a schema, their common suffix;
    for language modelling, the continuation. Raises DataError when the crop would cut into what is judged.
    """
    prompts = render_prompts(task, items[index], draw_fewshot(items, index, task.num_fewshot))
    rows = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    gold = items[index].get("gold")
    if task.task_type == "multiple_choice":
        start = common_length(rows)
        spans = [(start, len(row)) for row in rows]
    elif task.task_type == "schema":
        suffix = common_length([row[::-1] for row in rows])
        spans = [(len(row) - suffix, len(row)) for row in rows]
    else:
        prefix, row = rows
        if row[: len(prefix)] != prefix or len(row) == len(prefix):
            raise DataError(f"task {task.label}, item {index}: the prompt's ids are no proper prefix of the whole's.")
        rows, spans, gold = [row], [(len(prefix), len(row))], None
    if max_seq_len is not None:
        cut = [max(0, len(row) - max_seq_len) for row in rows]
        rows = [row[c:] for row, c in zip(rows, cut, strict=True)]
        spans = [(start - c, end - c) for (start, end), c in zip(spans, cut, strict=True)]
    if any(start < 1 for start, _ in spans):
        raise DataError(
            f"task {task.label}, item {index}: {max(len(row) for row in rows)} tokens leave nothing before the judged "
            f"span; raise max_seq_len (now {max_seq_len})."
        )
    return Question(tuple(rows), tuple(spans), gold)


def common_length(rows: Sequence[list[int]]) -> int:
    """How many leading ids all rows share."""
    shortest, longest = min(rows), max(rows)  # in lexicographic order, all others lie between these two
    for position, (one, other) in enumerate(zip(shortest, longest, strict=False)):
        if one != other:
            return position
    return min(len(shortest), len(longest))
