"""The tasks of the CORE metric: files, few-shot prompts, and which tokens of a prompt are judged.

CORE is the mean over 22 tasks of DCLM (Li et al. 2024, arXiv 2406.11794); draws, prompts and spans are nanochat's, so
that accuracies are comparable item by item. Prompts are built here, scores in `core.py`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
NAMED = 5  # most lines of a file that a message names one by one
SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234


class Item(dict[str, Any]):
    """The fields of one item, and the number of its line in the task's file; the first line is 1."""

    line: int = 0


@dataclass(frozen=True)
class CoreTask:
    """One entry of core.yaml, its random baseline, and where its items are (None: no such file)."""

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
    Raises DataError when the folder, the yaml or the csv is absent or does not say what is needed, when two tasks have
    one label, and when no task has a file.
    """
    is_file = path.endswith((".yaml", ".yml"))
    folder = path.rsplit("/", 1)[0] if is_file and "/" in path else "." if is_file else path
    yaml_path = path if is_file else storage.join(path, "core.yaml")
    listed = _listed_tasks(yaml_path)
    baselines = _baselines(storage.join(folder, "eval_meta_data.csv"))
    tasks = tuple(_task(folder, f"{yaml_path}, task {n}", entry, baselines) for n, entry in enumerate(listed, start=1))
    labels = [task.label for task in tasks]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise DataError(f"{yaml_path}: label {', '.join(twice)} stands at several tasks; give each task its own label.")
    bundle = CoreBundle(tasks)
    if not bundle.available:
        raise DataError(
            f"{yaml_path} lists {len(tasks)} tasks, and none of them has a file in {storage.join(folder, 'eval_data')!r}. "
            "Put a task's file at eval_data/<dataset_uri>, or name another bundle with --eval_bundle."
        )
    return bundle


def _listed_tasks(path: str) -> list[Any]:
    """The entries under `icl_tasks` of a yaml file. Raises DataError when there are none."""
    try:
        listed = yaml.safe_load(_read(path))["icl_tasks"]
    except (yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: no list of CORE tasks under icl_tasks ({type(error).__name__}: {error}).") from error
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path}: icl_tasks is {listed!r}; it must be a list of one task or more.")
    return listed


def _task(folder: str, where: str, entry: Any, baselines: Mapping[str, float]) -> CoreTask:
    """One task of the yaml; `where` names its place there. Raises DataError."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: {entry!r} is no task; a task has label, icl_task_type, dataset_uri and num_fewshot.")
    for name in ("label", "dataset_uri", "icl_task_type"):
        if not isinstance(entry.get(name), str) or not entry[name]:
            raise DataError(f"{where}: {name} is {entry.get(name)!r}; it must be a text.")
    label, task_type, shots = entry["label"], entry["icl_task_type"], entry.get("num_fewshot")
    delimiter = entry.get("continuation_delimiter", " ")
    if task_type not in TASK_TYPES:
        raise DataError(f"{where}: task {label}: type {task_type!r} is not one of {', '.join(TASK_TYPES)}.")
    if not isinstance(shots, list) or not shots or type(shots[0]) is not int or shots[0] < 0:
        raise DataError(f"{where}: task {label}: num_fewshot is {shots!r}; it must be a list as [10], with 0 or more.")
    if not isinstance(delimiter, str):
        raise DataError(f"{where}: task {label}: continuation_delimiter is {delimiter!r}; it must be a text.")
    if label not in baselines:
        raise DataError(f"task {label}: no random baseline in eval_meta_data.csv; add a row with that Eval Task.")
    uri = storage.join(folder, "eval_data", entry["dataset_uri"])
    return CoreTask(
        label=label,
        task_type=task_type,
        num_fewshot=shots[0],
        delimiter=delimiter,
        baseline=baselines[label],
        path=next((name for name in (uri, f"{uri}.zst") if storage.exists(name)), None),
    )


def _read(path: str) -> str:
    """A text file, with or without a byte-order mark. Raises DataError when it is absent or not UTF-8."""
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; --eval_bundle needs core.yaml, eval_meta_data.csv, eval_data/."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _baselines(path: str) -> dict[str, float]:
    """Accuracy of guessing by task label, 0 to below 1 (the file has percent). Raises DataError with file and line."""
    rows = csv.DictReader(io.StringIO(_read(path), newline=""))
    columns = rows.fieldnames or []
    if "Eval Task" not in columns or "Random baseline" not in columns:
        raise DataError(
            f"{path}: needs the columns 'Eval Task' and 'Random baseline' (percent), separated by commas; the columns of "
            f"its first line are {list(columns)}."
        )
    baselines: dict[str, float] = {}
    for row in rows:
        label, written = row["Eval Task"], row["Random baseline"]
        try:
            percent = float(written)
        except (ValueError, TypeError):
            percent = math.nan
        if not 0 <= percent < 100:  # at 100 the centred accuracy would be a division by zero
            raise DataError(
                f"{path}, line {rows.line_num}: the random baseline of {label!r} is {written!r}; it must be 0 percent or more, "
                "and less than 100."
            )
        if baselines.setdefault(label, 0.01 * percent) != 0.01 * percent:
            raise DataError(
                f"{path}, line {rows.line_num}: {label!r} has another random baseline in a line above; keep one."
            )
    return baselines


def load_items(task: CoreTask, max_items: int = -1) -> list[Item]:
    """The items of a task in nanochat's order: shuffled by random.Random(1337), then the first max_items (-1: all).

    Raises DataError with file and line for each line that is not JSON or cannot be asked, and when too few items are left
    to draw num_fewshot examples from: an accuracy with fewer examples would not be the task that its label names.
    """
    assert task.path is not None, f"task {task.label} has no file"
    items, problems = [], []
    for number, line in enumerate(_lines(task.path), start=1):
        if line.strip():
            try:
                items.append(_item(task, line, number))
            except DataError as problem:
                problems.append(str(problem))
    _raise_all(problems)
    on_file = len(items)
    random.Random(SHUFFLE_SEED).shuffle(items)
    if max_items > 0:
        items = items[:max_items]
    if not items:
        raise DataError(f"{task.path} has no items.")
    if len(items) <= task.num_fewshot:
        raise DataError(
            f"task {task.label} needs {task.num_fewshot} examples beside each item, but {len(items)} items are in use; "
            + (
                f"raise --core_max_per_task to {task.num_fewshot + 1} or more."
                if on_file > task.num_fewshot
                else f"add items to {task.path}, or lower num_fewshot in the yaml file."
            )
        )
    return items


def _raise_all(problems: Sequence[str]) -> None:
    """One DataError of the first few problems and the number of the others; nothing when there is no problem."""
    if problems:
        more = f" There are {len(problems) - NAMED} more such lines." if len(problems) > NAMED else ""
        raise DataError(" ".join(problems[:NAMED]) + more)


def _lines(path: str) -> list[bytes]:
    """The lines of a task's file, decompressed. Raises DataError when it is no whole zstd file."""
    data = storage.read_bytes(path)
    if path.endswith(".zst"):
        try:
            data = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a whole zstd file: {error}. Fetch it again.") from error
    return data.split(b"\n")  # not splitlines: strings hold U+2028


def _item(task: CoreTask, line: bytes, number: int) -> Item:
    where = f"{task.path}, line {number}"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}).") from error
    absent = [name for name in FIELDS[task.task_type] if not isinstance(fields, dict) or name not in fields]
    if absent:
        raise DataError(f"{where}: a {task.task_type} item needs {', '.join(absent)}.")
    item = Item(fields)
    item.line = number
    if task.task_type in OPTIONS:
        options = item[OPTIONS[task.task_type]]
        if not isinstance(options, list) or not options:
            raise DataError(f"{where}: {OPTIONS[task.task_type]} must be a list of options.")
        if type(item["gold"]) is not int or not 0 <= item["gold"] < len(options):
            raise DataError(f"{where}: gold {item['gold']!r} is none of {len(options)} options.")
    for name in FIELDS[task.task_type]:
        for value in item[name] if name == OPTIONS.get(task.task_type) else [item[name]]:
            if not isinstance(value, str | int | float):
                raise DataError(f"{where}: {value!r} in {name} is neither a text nor a number.")
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
    items: Sequence[Item],
    index: int,
    max_seq_len: int | None = None,
) -> Question:
    """Item `index` as token rows with BOS in front, cropped from the left to max_seq_len tokens (None: not at all).

    Judged are, for multiple choice, the ids after the common prefix of the options; for a schema, their common suffix;
    for language modelling, the continuation. Nothing is judged of options that are identical, as in nanochat.
    Raises DataError, with file and line, when a continuation cannot be told from its context, and when the crop would
    cut into what is judged.
    """
    where = f"{task.path}, line {items[index].line}"
    prompts = render_prompts(task, items[index], draw_fewshot(items, index, task.num_fewshot))
    rows = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    gold = items[index].get("gold")
    if task.task_type == "multiple_choice":
        start = common_length(rows)
        spans = [(start, len(row)) for row in rows]
    elif task.task_type == "schema":
        suffix = common_length([row[::-1] for row in rows])
        if all(len(row) == suffix for row in rows):  # identical options: no id stands before the suffix
            suffix = 0
        spans = [(len(row) - suffix, len(row)) for row in rows]
    else:
        prefix, row = rows
        if row[: len(prefix)] != prefix or len(row) == len(prefix):
            raise DataError(
                f"{where}: the ids of the context are not the first ids of context and continuation, so the continuation "
                f"{items[index]['continuation']!r} cannot be judged alone. Change the line, or continuation_delimiter "
                f"{task.delimiter!r} in the yaml file."
            )
        rows, spans, gold = [row], [(len(prefix), len(row))], None
    if max_seq_len is not None:
        cut = [max(0, len(row) - max_seq_len) for row in rows]
        rows = [row[c:] for row, c in zip(rows, cut, strict=True)]
        spans = [(start - c, end - c) for (start, end), c in zip(spans, cut, strict=True)]
    if any(start < 1 for start, _ in spans):
        raise DataError(
            f"{where}: {max(len(row) for row in rows)} tokens leave nothing before the judged "
            f"span; raise max_seq_len (now {max_seq_len})."
        )
    return Question(tuple(rows), tuple(spans), gold)


def check_items(task: CoreTask, tokenizer: Tokenizer, items: Sequence[Item]) -> None:
    """Raises DataError with file and line for each item whose continuation cannot be told from its context.

    That depends on the tokenizer, so `load_items` cannot see it. The items are checked without examples in front.
    """
    problems = []
    for index in range(len(items)) if task.task_type == "language_modeling" else ():
        try:
            build_question(replace(task, num_fewshot=0), tokenizer, items, index)
        except DataError as problem:
            problems.append(str(problem))
    _raise_all(problems)


def common_length(rows: Sequence[list[int]]) -> int:
    """How many leading ids all rows share."""
    shortest, longest = min(rows), max(rows)  # in lexicographic order, all others lie between these two
    for position, (one, other) in enumerate(zip(shortest, longest, strict=False)):
        if one != other:
            return position
    return min(len(shortest), len(longest))
