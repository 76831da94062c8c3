"""Bring the text to this machine: the running Python's own documentation and sources, or downloaded parquet shards.

python jobs/prepare_text.py --tier cpu
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Any

from jobs.runtime import cli
from jobs.runtime.stage import Job, run_stage
from megacontext.config import DataConfig, RunConfig
from megacontext.data import corpus, download, parquet
from megacontext.stages import PREPARE_TEXT

SECTIONS = [RunConfig, DataConfig]


def ready(args: cli.Args) -> None:
    """Raises DataError when --data_dir holds no text."""
    if args.data.data_dir:
        parquet.split_parquet(parquet.list_parquet(args.data.data_dir))


def run(args: cli.Args) -> dict[str, Any]:
    """Make or fetch the parquet shards of the run. With --data_dir they must be there and are only checked.

    Raises DataError naming each shard whose footer shows that it cannot be used.
    """
    directory = cli.paths(args).data_dir
    if not args.data.data_dir:
        if args.run.tier == "cpu":
            corpus.write_embedded_corpus(directory)
        else:
            download.fetch_web_shards(directory, args.data.data_shards)
    train, validation = parquet.text_shards(directory)
    unread = parquet.unread_subfolders(directory)
    if unread:
        print(f"prepare_text: the parquet files in {', '.join(unread)} below {directory} are not read", flush=True)
    return {
        "prepare_text/train_shards": len(train),
        "prepare_text/val_shards": len(validation),
        "prepare_text/directory": directory,
    }


JOB = Job(PREPARE_TEXT, run, ready)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage(JOB, args, again=True))


if __name__ == "__main__":
    main()
