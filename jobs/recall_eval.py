"""Ask a model what a long history says: accuracy by method and distance at one budget, beside every baseline.

    python jobs/recall_eval.py --checkpoint runs/mine --task mk_niah --budget 256 --history 4096 --items 200 --json out/mk.json

Facts are hidden in text that is not trained on (this Python's own library, unless --haystack), with keys that no
training row has. Beside the JSON goes a plot of accuracy by distance.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import io
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs import evaluation
from megacontext import storage
from megacontext.data import corpus, parquet
from megacontext.data.recall import PAIRS, TASKS, recall_items
from megacontext.data.recall_words import QUESTION_TOKENS, WordList
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError, UserError
from megacontext.eval.methods import METHODS, choose_methods
from megacontext.eval.recall import Answer, evaluate_recall, summarize
from megacontext.stages import RECALL_EVAL
from megacontext.telemetry import provenance, report

STAGE = RECALL_EVAL.name
HISTORY_BUDGETS = 16  # default length of a history, in budgets
_HAYSTACK_HISTORIES = 4  # text read for a haystack, in histories: items begin at different places of it
_HAYSTACK_TOKENS = 1 << 16  # at least, so that short histories are not pieces of one page
_COLORS = ("#94a3b8", "#64748b", "#a16207", "#d97706", "#9333ea", "#0891b2", "#059669", "#2563eb", "#dc2626", "#0f172a")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = evaluation.parser(__doc__)
    parser.add_argument("--task", default="niah", choices=TASKS, help="what is planted and asked [default niah]")
    parser.add_argument(
        "--history", type=int, default=0, help=f"tokens of a history, N [default: {HISTORY_BUDGETS} budgets]"
    )
    parser.add_argument(
        "--tail", type=int, default=32, help="newest tokens that stay raw, the question's 3 included [default 32]"
    )
    parser.add_argument("--items", type=int, default=100, help="histories [default 100]")
    parser.add_argument(
        "--questions",
        type=int,
        default=0,
        help="questions about a history [default: the task's own, 8 of mqar, else 1]",
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"facts of mqar [default {PAIRS}]")
    parser.add_argument(
        "--methods", default="", help=f"comma-separated, of {','.join(METHODS)} [default: all that the model can use]"
    )
    parser.add_argument(
        "--haystack",
        default="",
        help=".txt or .parquet file to hide facts in [default: held-out library documentation]",
    )
    parser.add_argument(
        "--block_size", type=int, default=32, help="tokens of a block, for a model without a memory [default 32]"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, print the table, write JSON and plot; returns what the JSON holds.

    Raises UserError for sizes that do not fit each other, CheckpointError and DataError for what cannot be read.
    """
    model, tokenizer, device = evaluation.load(args)
    budget = args.budget or model.config.sequence_len
    history = args.history or HISTORY_BUDGETS * budget
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    methods = choose_methods(model, names, history + QUESTION_TOKENS)
    if args.items < 1:
        raise UserError(f"--items is {args.items}; ask at least one.")
    block_size = args.block_size if model.memory is None else model.memory.block_size
    words = WordList.from_tokenizer(tokenizer)
    items = recall_items(
        args.task, words, history, args.items, args.seed, block_size=block_size, pairs=args.pairs,
        recent_tokens=budget if args.task == "mqar" else args.tail,  # mqar is about what no window holds
        haystack=haystack_ids(args.haystack, tokenizer, max(_HAYSTACK_TOKENS, _HAYSTACK_HISTORIES * history)), questions=args.questions,
    )  # fmt: skip
    settings = {
        "task": args.task, "budget": budget, "history": history, "tail": args.tail, "items": args.items,
        "questions": args.questions, "pairs": args.pairs, "seed": args.seed, "checkpoint": args.checkpoint,
        "haystack": args.haystack or "library", "block_size": block_size, "device": str(device),
        "dtype": str(model.compute_dtype).removeprefix("torch."), "memory": model.memory is not None,
    }  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in settings.items()), flush=True)
    left_out = [name for name in METHODS if name not in methods]
    if left_out and not names:
        print(f"left out, since this model or history cannot have them: {','.join(left_out)}", flush=True)
    began = time.perf_counter()
    answers = evaluate_recall(
        model, items, methods, budget=budget, tail=args.tail, block_size=block_size, seed=args.seed,
        on_item=Progress(args.items),
    )  # fmt: skip
    result = {
        "config": settings,
        "chance": 1 / len(words.values),
        **summarize(answers, history),
        "seconds": time.perf_counter() - began,
        "provenance": provenance.collect(),
    }
    text = table(result)
    print(text, flush=True)
    store(args, result, text)
    return result


def store(args: argparse.Namespace, result: Mapping[str, Any], text: str) -> None:
    """Write the JSON and its picture, and hand both to the report of the checkpoint's run, beside those of other tasks."""
    picture = plot(result)
    if args.json:
        storage.write_json(args.json, result)
        beside = args.json.removesuffix(".json") + ".png"
        storage.write_bytes(beside, picture)
        print(f"wrote {args.json} and {beside}", flush=True)
    run_dir = report.run_of_checkpoint(args.checkpoint)
    if run_dir is None:
        return
    known = report.read_stage(run_dir, STAGE) or {"seconds": 0.0, "metrics": {}, "text": {}}
    name = f"{STAGE}/{args.task}_{result['config']['history']}"
    found = {f"{name}_{method}": row["accuracy"] for method, row in result["methods"].items()}
    found |= {f"{name}_{key}": result[key] for key in ("lens_recall", "lens_regret") if key in result}
    report.write_stage(
        run_dir, STAGE, known["seconds"] + result["seconds"], 0.0, known["metrics"] | found,
        known["text"] | {f"{name}_table": text},
    )  # fmt: skip
    report.write_picture(run_dir, name.replace("/", "_"), picture)
    print(f"in the next report of {run_dir}", flush=True)


class Progress:
    """Prints how far it is every ten seconds, and at the end."""

    def __init__(self, items: int) -> None:
        self.items, self.right, self.asked, self.said = items, 0, 0, time.monotonic()

    def __call__(self, item: int, answers: Sequence[Answer]) -> None:
        judged = [answer for answer in answers if answer.method == "ours"] or answers
        self.right, self.asked = self.right + sum(a.correct for a in judged), self.asked + len(judged)
        if time.monotonic() - self.said > 10 or item + 1 == self.items:
            self.said = time.monotonic()
            whose = "ours" if judged is not answers else "all methods"
            print(f"item {item + 1}/{self.items}: {whose} {self.right}/{self.asked} right", flush=True)


def haystack_ids(path: str, tokenizer: Tokenizer, tokens: int) -> npt.NDArray[np.int64]:
    """Ids of at least `tokens` tokens of text, or all that there is. Raises DataError for what cannot be read."""
    found: list[npt.NDArray[np.uint32]] = []
    count = 0
    for text in _texts(path):
        found.append(tokenizer.encode_numpy(text))
        count += len(found[-1])
        if count >= tokens:
            break
    if not count:
        raise DataError(f"{path!r} holds no text; give a file with some.")
    return np.concatenate(found).astype(np.int64)


def _texts(path: str) -> Iterator[str]:
    if not path:
        for document in corpus.read_documents(Path(sysconfig.get_path("stdlib"))):
            if corpus.is_validation(document.source) and corpus.is_prose_or_code(document.text):
                yield document.text
    elif path.endswith(".parquet"):
        for group in parquet.read_texts(path):
            yield from group
    else:
        try:
            yield storage.read_bytes(path).decode("utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"--haystack {path!r} does not exist; give a .txt or .parquet file.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"--haystack {path!r} is not UTF-8 text: {error}. Convert it first.") from error


def table(result: Mapping[str, Any]) -> str:
    """One line a method: accuracy with its interval, by distance, and what it costs."""
    rows = result["methods"]
    first = next(iter(rows.values()))
    buckets = [f"≤{bucket['up_to_tokens']}" for bucket in first["by_distance"]]
    head = ["method", "accuracy %", "95 % interval", *buckets, "shown %", "nll", "entries", "ms", "MFLOP"]
    lines = [head]
    for method, row in rows.items():
        near = ["-" if b["accuracy"] is None else f"{100 * b['accuracy']:.1f}" for b in row["by_distance"]]
        lines.append([
            method, f"{100 * row['accuracy']:.1f}", f"{100 * row['low']:.1f}–{100 * row['high']:.1f}", *near,
            f"{100 * row['evidence_raw']:.1f}", f"{row['answer_nll']:.3f}", f"{row['entries']:.0f}",
            f"{row['ms_per_token']:.1f}", f"{row['flops_per_token'] / 1e6:.0f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append(
        f"{first['items']} questions; chance {100 * result['chance']:.1f} %; shown: the evidence was raw; ms and MFLOP: "
        f"choosing and reading the entries of an answer; gists took {result['build_ms_per_token']:.4f} ms per token of history"
    )
    if "lens_recall" in result:
        regret = f", regret {100 * result['lens_regret']:.1f} points" if "lens_regret" in result else ""
        text.append(f"lens recall {100 * result['lens_recall']:.1f} %{regret}")
    return "\n".join(text)


def plot(result: Mapping[str, Any]) -> bytes:
    """PNG: accuracy of each method by distance, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    config = result["config"]
    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for number, (method, row) in enumerate(result["methods"].items()):
        seen = [bucket for bucket in row["by_distance"] if bucket["items"]]
        places = [bucket["up_to_tokens"] * 1.012 ** (number - len(result["methods"]) / 2) for bucket in seen]
        shares = [100 * bucket["accuracy"] for bucket in seen]
        spread = [[100 * abs(b[end] - b["accuracy"]) for b in seen] for end in ("low", "high")]
        panel.errorbar(
            places, shares, spread, label=method, color=_COLORS[number % len(_COLORS)], marker="o", markersize=4,
            capsize=2, linewidth=2.4 if method == "ours" else 1.3, elinewidth=0.8,
        )  # fmt: skip
    panel.axhline(100 * result["chance"], color="#64748b", linestyle=":", linewidth=1, label="chance")
    panel.set_xscale("log", base=2)
    edges = [bucket["up_to_tokens"] for bucket in next(iter(result["methods"].values()))["by_distance"]]
    panel.set_xticks(edges, [f"{edge:,}" for edge in edges])
    panel.set_xlabel("distance of the evidence in tokens, up to")
    panel.set_ylabel("answers right in %")
    panel.set_ylim(-3, 103)
    panel.grid(visible=True, color="#e2e8f0", linewidth=0.8)
    panel.set_title(
        f"{config['task']}: {config['history']:,} tokens of history, {config['budget']:,} entries",
        loc="left",
        fontsize=11,
    )
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    evaluation.main(parse, run, argv)


if __name__ == "__main__":
    main()
