"""Measure what a model's memory is worth on long documents: the loss of what really follows, beside every baseline.

    python jobs/memory_eval.py --checkpoint runs/mine --docs books/ --budget 256 --history 1024 4096 --horizon 32 \\
        --windows 64 --json out/memory.json

Documents are .txt, .md or .parquet files with a `text` column. Beside the JSON go a plot and the timeline of one
history's focus. For a checkpoint of a run, results and pictures are in that run's next report, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import megacontext as mc
from jobs import evaluation
from megacontext import storage
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import UserError
from megacontext.eval import memory
from megacontext.eval.memory_card import memory_plot, memory_table
from megacontext.eval.methods import FULL_TOKENS, METHODS, choose_methods
from megacontext.eval.windows import Windows, read_long_documents, sample_windows
from megacontext.inference.session_options import resolve_options
from megacontext.model.gpt import GPT
from megacontext.stages import MEMORY_EVAL
from megacontext.telemetry import otel, provenance, report
from megacontext.telemetry.focus_log import FocusLog

STAGE = MEMORY_EVAL.name
_TIMELINE_REFOCUSES = 48


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = evaluation.parser(__doc__)
    evaluation.add_documents(parser)
    add = parser.add_argument
    add(
        "--history",
        type=int,
        nargs="+",
        default=[],
        help="tokens of history, N; several make curves [default: 4 budgets]",
    )
    add("--methods", default="", help=f"comma-separated, of {','.join(METHODS)} [default: all that the model can use]")
    add("--full_tokens", type=int, default=0, help="most tokens that `full` attends to, horizon included [default: the "
        "model's sequence length if that is more than the budget, else 4 budgets]")  # fmt: skip
    add(
        "--oracle_blocks",
        type=int,
        default=64,
        help="blocks measured per window for the oracle; 0 leaves it out [default 64]",
    )
    add("--key_share", type=float, default=0.1, help="share of the tokens that count as key tokens [default 0.1]")
    add("--timing_windows", type=int, default=3, help="windows on which decoding is timed; 0 is none [default 3]")
    add(
        "--substitution_windows",
        type=int,
        default=8,
        help="windows in which gists stand in for raw blocks; 0 is none [default 8]",
    )
    add("--block_size", type=int, default=32, help="tokens of a block, for a model without a memory [default 32]")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, print the table, write JSON and pictures; returns what the JSON holds.

    Raises UserError for sizes that do not fit each other, CheckpointError and DataError for what cannot be read.
    """
    began = time.time()
    model, tokenizer, device = evaluation.load(args)
    settings = settings_of(args, model)
    settings.check(args.horizon)
    histories = sorted(set(args.history or [4 * settings.budget]))
    check_room(model, settings, histories[-1], args.horizon)
    windows = sample_windows(
        read_long_documents(args.docs), tokenizer, histories[-1], args.horizon, args.windows, args.seed
    )
    config = {
        "checkpoint": args.checkpoint, "docs": args.docs, "histories": histories, "horizon": args.horizon,
        "windows": len(windows), "documents": len(np.unique(windows.document)), "device": str(device),
        "dtype": str(model.compute_dtype).removeprefix("torch."), "memory": model.memory is not None,
        "sequence_len": model.config.sequence_len, **vars(settings),
    }  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in config.items()), flush=True)
    if settings.full_tokens > model.config.sequence_len:
        print(
            f"full attends to more than the {model.config.sequence_len} tokens the model was trained with", flush=True
        )
    rows: list[dict[str, Any]] = []
    far: list[dict[str, Any]] = []
    for history in histories:
        measured = memory.measure(model, windows, history, settings, Progress(history, len(windows)))
        rows += memory.table_rows(measured, windows, settings)
        far.append(memory.far_context(measured, windows, settings))
    log, focus = timeline(model, tokenizer, windows, settings)
    result = {
        "config": config,
        "far_context": far,
        "rows": rows,
        "substitution": memory.substitution(model, windows, settings, args.substitution_windows),
        "focus": focus,
        "seconds": time.time() - began,
        "provenance": provenance.collect(),
    }
    text = memory_table(result)
    print(f"{text}\n\nfocus over a history of {histories[-1]:,} tokens\n{log.text()}", flush=True)
    store(args, result, text, log)
    return result


def settings_of(args: argparse.Namespace, model: GPT) -> memory.Settings:
    """Settings with the model's defaults filled in. Raises UserError for methods that the model lacks."""
    budget = args.budget or model.config.sequence_len
    asked = {"budget": budget, "recent_tokens": args.tail or None}
    options = resolve_options(model, asked if model.memory is not None else asked | {"block_size": args.block_size})
    trained = model.config.sequence_len
    full = args.full_tokens or (trained if trained > budget else 4 * budget)
    if args.windows < 1 or args.timing_windows < 0 or args.substitution_windows < 0 or args.oracle_blocks < 0:
        raise UserError(
            "--windows must be at least 1; --timing_windows, --substitution_windows, --oracle_blocks 0 or more."
        )
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    methods = [m for m in choose_methods(model, names) if names or m != "oracle" or args.oracle_blocks]
    if "oracle" in methods and not args.oracle_blocks:
        raise UserError(
            "the oracle tries blocks, and --oracle_blocks is 0; raise it, or leave oracle out of --methods."
        )
    return memory.Settings(
        budget=budget, tail=options.recent_tokens, methods=tuple(methods), full_tokens=min(full, FULL_TOKENS),
        block_size=options.block_size, oracle_blocks=args.oracle_blocks, key_share=args.key_share,
        timing_windows=args.timing_windows, seed=args.seed,
    )  # fmt: skip


def check_room(model: GPT, settings: memory.Settings, history: int, horizon: int) -> None:
    """Raise UserError unless every shorter history fits, too: timing and timeline read the text piece by piece, and would
    fail when all else is measured."""
    asked = {"budget": settings.budget, "recent_tokens": settings.tail, "block_size": settings.block_size}
    options = resolve_options(model, asked)
    needed = options.entries_needed(history) + 1 + horizon
    if needed > settings.budget:
        raise UserError(
            f"--budget {settings.budget} is too small for histories of up to {history} tokens: a raw tail of {settings.tail}, "
            f"the coarsest nodes before it, a new token and {horizon} to predict can take {needed} entries. Raise --budget, "
            "or lower --tail or --horizon."
        )


def timeline(
    model: GPT, tokenizer: Tokenizer, windows: Windows, settings: memory.Settings
) -> tuple[FocusLog, dict[str, float]]:
    """A session that reads the first window's history in pieces and refocuses after each; its `runtime/…` metrics."""
    ids = windows.history(0)
    with otel.opened() as telemetry:
        log = FocusLog(telemetry)
        with mc.Session(
            model, tokenizer, settings.budget, recent_tokens=settings.tail, block_size=settings.block_size, on_refocus=log
        ) as session, telemetry.span("memory_eval_timeline", tokens=len(ids)):  # fmt: skip
            for piece in np.array_split(ids, min(_TIMELINE_REFOCUSES, len(ids))):
                session.append(piece)
                session.refocus()
            reports = list(session.stats.reports)
            metrics = {
                "runtime/swap_rate": session.stats.swap_rate,
                "runtime/residency": session.stats.residency,
                "runtime/token_budget_utilization": float(np.mean([one.utilization for one in reports])),
            }
            log.update(metrics)
    return log, {name: value for name, value in metrics.items() if np.isfinite(value)}


def store(args: argparse.Namespace, result: dict[str, Any], text: str, log: FocusLog) -> None:
    """Write the JSON and its pictures, and hand both to the report of the checkpoint's run."""
    config = result["config"]
    title = f"working context of a history of {config['histories'][-1]:,} tokens, level by level"
    pictures = {STAGE: memory_plot(result), f"{STAGE}_timeline": log.png(title)}
    if args.json:
        storage.write_json(args.json, result)
        stem = args.json.removesuffix(".json")
        for name, png in pictures.items():
            if png is not None:
                storage.write_bytes(f"{stem}{name.removeprefix(STAGE).replace('_', '-')}.png", png)
        print(f"wrote {args.json} and {stem}*.png", flush=True)
    run_dir = report.run_of_checkpoint(args.checkpoint)
    if run_dir is not None:
        report.write_stage(run_dir, STAGE, result["seconds"], 0.0, stage_metrics(result), {f"{STAGE}/table": text})
        for name, png in pictures.items():
            if png is not None:
                report.write_picture(run_dir, name, png)
        print(f"in the next report of {run_dir}", flush=True)


def stage_metrics(result: dict[str, Any]) -> dict[str, float]:
    """The figures of the longest history under their names of the report: `eval/…` and `runtime/…` are ours."""
    far = result["far_context"][-1]
    rows = {row["method"]: row for row in result["rows"] if row["history"] == far["history"]}
    metrics = {"history_tokens": far["history"], "nll_window_minus_full": far["gap"], **result["focus"]}
    metrics |= {f"nll/{method}": row["nll"] for method, row in rows.items()}
    ours = rows.get("ours", {})
    names = ("delta_nll", "cgr", "key_nll", "lens_recall", "lens_regret")
    metrics |= {f"eval/{name}": ours.get(name) for name in names}
    metrics |= {
        "runtime/latency_ms": ours.get("ms_per_token"),
        "runtime/recompute_tokens_per_token": ours.get("recompute"),
    }
    return {f"{STAGE}/{name}": value for name, value in metrics.items() if value is not None}


class Progress:
    """Prints how far it is every ten seconds, and at the end."""

    def __init__(self, history: int, windows: int) -> None:
        self.history, self.windows, self.said = history, windows, time.monotonic()

    def __call__(self, done: int) -> None:
        if time.monotonic() - self.said > 10 or done == self.windows:
            self.said = time.monotonic()
            print(f"history {self.history:,}: window {done}/{self.windows}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    evaluation.main(parse, run, argv)


if __name__ == "__main__":
    main()
