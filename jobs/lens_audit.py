"""Audit a lens: do its scores rank the expansions that help, and do they change with the question?

    python jobs/lens_audit.py --checkpoint runs/mine --docs books/ --budget 256 --history 4096 --json out/lens.json

Every gist of a working context is expanded by itself, and the loss of the raw tail and of the tokens ahead is measured
before and after. Documents are .txt, .md or .parquet files with a `text` column that the model was not trained on. With
`--task mk_niah` in place of `--docs` histories are recall tasks: each is asked four questions, what follows is the
answer, and the other query is another question about the same history.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

from jobs import evaluation
from jobs.recall_eval import haystack_ids
from megacontext import storage
from megacontext.data.recall import TASKS, recall_items
from megacontext.data.recall_words import WordList
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import UserError
from megacontext.eval.bootstrap import Interval
from megacontext.eval.lens_audit import Audit, audit, next_question
from megacontext.eval.windows import Windows, question_windows, read_long_documents, sample_windows
from megacontext.inference.session_options import resolve_options
from megacontext.telemetry import provenance, report

STAGE = "lens_audit"
_QUESTIONS = 4  # about a history
FIGURES = ("corr_ahead", "corr_tail", "corr_other_query", "picked", "picked_other", "change", "corr_queries")
_HEAD = (
    "scores of",
    "rank corr. ahead",
    "on the tail",
    "by another query",
    "gain of the first",
    "of another query's first",
    "|Δscore|",
    "corr. of two queries",
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = evaluation.parser(__doc__)
    evaluation.add_documents(parser, required=False)
    add = parser.add_argument
    add("--task", default="", choices=("", *TASKS), help="recall task to audit on instead of documents: "
        "--windows histories, four questions each, and an answer for a horizon [default: none]")  # fmt: skip
    add("--history", type=int, default=0, help="tokens of a history, N [default: 4 budgets]")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Audit, print the table, write the JSON; returns what it holds.

    Raises UserError for a model without a memory and for sizes that do not fit, DataError for what cannot be read.
    """
    began = time.time()
    model, tokenizer, device = evaluation.load(args)
    budget = args.budget or model.config.sequence_len
    options = resolve_options(model, {"budget": budget, "recent_tokens": args.tail or None})
    tail = options.recent_tokens
    history = args.history or 4 * budget
    if bool(args.docs) == bool(args.task):
        raise UserError("an audit needs either --docs, long documents, or --task, a recall task; give one of the two.")
    windows = questions(args, tokenizer, history, budget, options.block_size) if args.task else sample_windows(
        read_long_documents(args.docs), tokenizer, history, args.horizon, args.windows, args.seed
    )  # fmt: skip
    config = {
        "checkpoint": args.checkpoint, "docs": args.docs, "task": args.task, "budget": budget, "history": history, "tail": tail,
        "horizon": windows.horizon, "windows": len(windows), "seed": args.seed, "device": str(device),
    }  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in config.items()), flush=True)
    foreign = next_question(windows) if args.task else None
    found = audit(model, windows, budget=budget, tail=tail, foreign=foreign, seed=args.seed)
    result = {
        "config": config,
        "gists": found.gists,
        "best": plain(found.best),
        "mean": plain(found.mean),
        "rows": [{"scorer": row.scorer, **{name: plain(getattr(row, name)) for name in FIGURES}} for row in found.rows],
        "seconds": time.time() - began,
        "provenance": provenance.collect(),
    }
    text = table(found)
    print(text, flush=True)
    if args.json:
        storage.write_json(args.json, result)
        print(f"wrote {args.json}", flush=True)
    run_dir = report.run_of_checkpoint(args.checkpoint)
    if run_dir is not None:
        ours = found.rows[0]
        figures = {f"{STAGE}/{name}": getattr(ours, name).value for name in FIGURES}
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        report.write_stage(run_dir, STAGE, result["seconds"], 0.0, known, {f"{STAGE}/table": text})
        print(f"in the next report of {run_dir}", flush=True)
    return result


def questions(args: argparse.Namespace, tokenizer: Tokenizer, history: int, budget: int, block_size: int) -> Windows:
    """`--windows` histories of a recall task, whose facts lie before the newest `budget` tokens, with four questions each."""
    words = WordList.from_tokenizer(tokenizer)
    items = recall_items(
        args.task, words, history, args.windows, args.seed, block_size=block_size, recent_tokens=budget,
        haystack=haystack_ids("", tokenizer, history), questions=_QUESTIONS,
    )  # fmt: skip
    return question_windows(list(items), tokenizer.bos_id)


def table(found: Audit) -> str:
    """A line per scorer; brackets are 95 % intervals over documents."""
    lines = [_HEAD, *((row.scorer, *(_cell(getattr(row, name)) for name in FIGURES)) for row in found.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append(
        f"{found.windows} histories, {found.gists:.0f} gists each; gain of an expansion in nats per token ahead: "
        f"best {_cell(found.best)}, at random {_cell(found.mean)}"
    )
    return "\n".join(text)


def plain(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON."""
    return {name: value if math.isfinite(value) else None for name, value in vars(interval).items()}


def _cell(interval: Interval) -> str:
    if not math.isfinite(interval.value):
        return "-"
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def main(argv: Sequence[str] | None = None) -> None:
    evaluation.main(parse, run, argv)


if __name__ == "__main__":
    main()
