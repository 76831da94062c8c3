"""The ladder of recall: train one small model with a memory, then ask it ever harder things, each rung beside its bar.

    python jobs/recall_ladder.py --seed 0 --json out/ladder_0.json

Raw recall inside the budget, an oracle that expands far outside it, the learned search in the oracle's place, facts
in every other block, updates, and a million tokens of history. A table for people, JSON with everything beside it; a
second run with the same --run continues training where it stopped, or only asks when training is complete.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs import base_train, prepare_data, prepare_text, recall_eval, tok_train
from jobs.runtime import cli, environment
from jobs.runtime.checks import check
from jobs.runtime.parser import Parser
from jobs.runtime.stage import run_stage
from jobs.runtime.user_paths import resolve_paths
from megacontext import storage

BASELINES = "window,sinks,ours,oracle"
FACTS = "window,sinks,gist_age,random,bm25,flat,ours,oracle"
RECIPE: dict[str, Any] = {
    "tier": "cpu", "depth": 2, "width": 128, "vocab_size": 2048, "max_seq_len": 512, "token_shift": 1,
    "device_batch_size": 8, "total_batch_size": 4096, "warmdown_ratio": 0.4, "eval_every": -1, "save_every": 200,
    "log_every": 20, "wandb": "off", "launcher": "local",
    "mc": 1, "mc_num_random_variants": 1, "mc_recall_share": 0.75, "mc_recall_answer_weight": 16.0,
    "allocator_recent_tokens": 32, "routing_slots": 8, "routing_width": 32, "mc_auto_batch": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One question of the ladder: a task, the history in budgets (0: inside one), who answers, and what is asked of whom."""

    name: str
    task: str
    budgets: float
    items: int
    methods: str
    judged: str
    bar: float
    questions: int = 0


RUNGS = (
    Rung("raw recall inside W", "mk_niah", 0.85, 1000, "full", "full", 0.99),
    Rung("oracle expansion, one needle, 64 W", "niah", 64, 50, BASELINES, "oracle", 0.99, questions=4),
    Rung("learned search, one needle, 64 W", "niah", 64, 50, BASELINES, "ours", 0.95, questions=4),
    Rung("a fact in every other block, 16 W", "mk_niah", 16, 50, FACTS, "ours", 0.85, questions=4),
    Rung("phone book, every other block, 16 W", "phonebook", 16, 50, FACTS, "ours", 0.85, questions=4),
    Rung("MQAR, 64 pairs, 16 W", "mqar", 16, 40, FACTS, "ours", 0.85),
    Rung("updates, the latest counts, 16 W", "update", 16, 100, FACTS, "ours", 0.85),
    Rung("one needle in a million tokens", "niah", 3906.25, 1, BASELINES, "ours", 0.90, questions=20),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data and questions [default 0]")
    parser.add_argument("--run", default="", help="name of the run [default ladder-<seed>]")
    parser.add_argument("--base_dir", default="", help="folder for data and runs [default: NANOCHAT_BASE_DIR]")
    parser.add_argument("--minutes", type=float, default=15.0, help="training time on this machine [default 15]")
    parser.add_argument(
        "--num_iterations", type=int, low=-1, default=-1, help="training steps instead of --minutes [default -1]"
    )
    parser.add_argument("--budget", type=int, default=256, help="entries that the model is shown, W [default 256]")
    parser.add_argument("--items", type=float, default=1.0, help="share of each rung's questions to ask [default 1]")
    parser.add_argument(
        "--rungs", default="", help="numbers of the rungs to ask, 1 to 8, comma-separated [default all]"
    )
    parser.add_argument(
        "--json", default="", help="file for the results; each rung's lie beside it [default: in the run]"
    )
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> cli.Args:
    """Train the model of a seed, or find it trained; returns the settings of its run."""
    given = RECIPE | {"run": args.run or f"ladder-{args.seed}", "seed": args.seed, "max_minutes": args.minutes}
    given["num_iterations"] = args.num_iterations
    if args.base_dir:
        given["base_dir"] = args.base_dir
    resolved = cli.resolve(given)
    jobs = (prepare_text.JOB, tok_train.JOB, prepare_data.JOB, base_train.JOB)
    check(resolved, jobs)
    for job in jobs:
        run_stage(job, resolved)
    return resolved


def climb(args: argparse.Namespace, checkpoint: str, out: str) -> list[dict[str, Any]]:
    """Ask every rung; returns one row each."""
    wanted = {int(number) for number in args.rungs.split(",") if number.strip()} or set(range(1, len(RUNGS) + 1))
    asked: dict[tuple[Any, ...], dict[str, Any]] = {}
    rows = []
    for number, rung in enumerate(RUNGS, 1):
        if number not in wanted:
            continue
        print(f"== rung {number}: {rung.name}", flush=True)
        key = (rung.task, rung.budgets, rung.methods)
        if key not in asked:  # two rungs may read the same answers
            flags = [
                f"--checkpoint={checkpoint}", f"--task={rung.task}", f"--budget={args.budget}",
                f"--history={int(rung.budgets * args.budget)}", f"--items={max(1, round(rung.items * args.items))}",
                f"--methods={rung.methods}", f"--seed={1000 + args.seed}", f"--questions={rung.questions}",
                f"--json={storage.join(out, f'rung_{number}.json')}",
            ]  # fmt: skip
            asked[key] = recall_eval.run(recall_eval.parse(flags))
        result = asked[key]
        judged = result["methods"][rung.judged]
        others = {name: row["accuracy"] for name, row in result["methods"].items()}
        rows.append({
            "rung": number, "name": rung.name, "judged": rung.judged, "bar": rung.bar, "accuracy": judged["accuracy"],
            "low": judged["low"], "high": judged["high"], "questions": judged["items"],
            "met": judged["accuracy"] >= rung.bar, "others": others, "lens_recall": result.get("lens_recall"),
            "lens_regret": result.get("lens_regret"), "chance": result["chance"],
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a rung."""
    lines = []
    for row in rows:
        others = " ".join(f"{name} {100 * share:.0f}" for name, share in row["others"].items() if name != row["judged"])
        lines.append(
            f"{row['rung']} {row['name']:<38} {row['judged']:>6} {100 * row['accuracy']:5.1f} % "
            f"[{100 * row['low']:.0f}–{100 * row['high']:.0f}] of {row['questions']}, bar {100 * row['bar']:.0f}: "
            f"{'met' if row['met'] else 'MISSED'}   {others}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    cli.finish(environment.load)
    args = parse(argv)

    def work() -> None:
        resolve_paths(args, "json")
        began = time.perf_counter()
        resolved = train(args)
        trained = time.perf_counter() - began
        run_dir = cli.paths(resolved).run_dir
        out = storage.join(run_dir, "ladder")
        rows = climb(args, run_dir, out)
        print(table(rows), flush=True)
        path = args.json or storage.join(out, "ladder.json")
        storage.write_json(path, {"seed": args.seed, "train_seconds": trained, "recipe": RECIPE, "rungs": rows})
        print(f"training {trained:.0f} s, all {time.perf_counter() - began:.0f} s; wrote {path}", flush=True)

    cli.finish(work)


if __name__ == "__main__":
    main()
