"""The main job: text to tokenizer to token shards to base model to evaluation to report card.

    ray job submit --working-dir . -- python jobs/speedrun.py --run mine

Each stage is skipped when its output is complete, so the same command continues a run that was stopped or killed.
Other settings under the same name are refused, but for those of evaluations, which run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs import base_eval, base_train, prepare_data, prepare_text, report, tok_eval, tok_train
from jobs.runtime import cli
from jobs.runtime.checks import check
from jobs.runtime.stage import run_stage
from megacontext.config import DataConfig, EvalConfig, FocusConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig
from megacontext.telemetry import otel

SECTIONS = [RunConfig, DataConfig, ModelConfig, TrainConfig, MemoryConfig, FocusConfig, EvalConfig]

JOBS = (prepare_text.JOB, tok_train.JOB, tok_eval.JOB, prepare_data.JOB, base_train.JOB, base_eval.JOB)


def pipeline(args: cli.Args) -> None:
    """Check the settings, run every stage that is not complete, then write the report card."""
    check(args, JOBS)
    with otel.opened(run=args.run.run, rank=0), otel.span("speedrun"):
        for job in JOBS:
            run_stage(job, args)
        report.run(args)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: pipeline(args))


if __name__ == "__main__":
    main()
