"""The main job: text to tokenizer to token shards to base model to evaluation to report card.

    ray job submit --working-dir . -- python jobs/speedrun.py --run mine

Each stage is skipped when its output is complete, so the same command continues a run that was stopped or killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs import base_eval, base_train, cli, prepare_data, prepare_text, report, tok_eval, tok_train
from jobs.stage import run_stage
from megacontext.config import DataConfig, EvalConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig

SECTIONS = [RunConfig, DataConfig, ModelConfig, TrainConfig, MemoryConfig, EvalConfig]

STAGES = {
    "prepare_text": prepare_text.run,
    "tok_train": tok_train.run,
    "tok_eval": tok_eval.run,
    "prepare_data": prepare_data.run,
    "base_train": base_train.run,
    "base_eval": base_eval.run,
}


def pipeline(args: cli.Args) -> None:
    """Run every stage that has no record yet, then write the report card."""
    for name, work in STAGES.items():
        run_stage(name, args, work)
    report.run(args)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: pipeline(args))


if __name__ == "__main__":
    main()
