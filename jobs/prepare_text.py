"""Bring the text to this machine: the running Python's own documentation and sources, or downloaded parquet shards.

python jobs/prepare_text.py --tier cpu
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Any

from jobs import cli
from jobs.stage import run_stage
from megacontext.config import DataConfig, RunConfig
from megacontext.data import corpus, download, parquet

SECTIONS = [RunConfig, DataConfig]


def run(args: cli.Args) -> dict[str, Any]:
    """Make or fetch the parquet shards of the run. With --data_dir they must be there and are only checked."""
    directory = cli.paths(args).data_dir
    if not args.data.data_dir:
        if args.run.tier == "cpu":
            corpus.write_embedded_corpus(directory)
        else:
            download.fetch_web_shards(directory, args.data.data_shards)
    train, validation = parquet.split_parquet(parquet.list_parquet(directory))
    return {
        "prepare_text/train_shards": len(train),
        "prepare_text/val_shards": len(validation),
        "prepare_text/directory": directory,
    }


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage("prepare_text", args, run, again=True))


if __name__ == "__main__":
    main()
