"""Turn text into token shards: one Ray Data task per parquet file, each repeatable, the manifests last.

    python jobs/prepare_data.py --tier cpu

Tasks run on all cores of the cluster; with fewer files than cores each takes several tokenizer threads. A job that was
killed continues at the first file without a receipt. Shards of another tokenizer or row length have another folder.
On several nodes the base folder must be on storage that all of them see.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tqdm import tqdm

from jobs.runtime import cli
from jobs.runtime.stage import Job as StageJob
from jobs.runtime.stage import run_stage
from jobs.runtime.take_over import take_over
from megacontext import storage
from megacontext.config import DataConfig, RunConfig
from megacontext.data import binarize, parquet
from megacontext.data.binarize import Receipt
from megacontext.data.shards import MANIFEST, Manifest
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, DataError, MegaContextError
from megacontext.precision import usable_cores
from megacontext.stages import PREPARE_DATA

SECTIONS = [RunConfig, DataConfig]
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Job:
    """One input file and where it goes; plain data that crosses to a task."""

    split: str
    parquet_path: str
    out_prefix: str
    tokenizer_dir: str
    tokenizer_digest: str
    row_tokens: int
    shard_bytes: int
    min_doc_chars: int

    def finished(self) -> Receipt | None:
        return binarize.finished(self.parquet_path, self.out_prefix, self.tokenizer_digest, self.row_tokens)


def token_dirs(args: cli.Args) -> tuple[str, str]:
    """Folders (train, val) of the run's token shards. Raises CheckpointError when there is no tokenizer yet."""
    where = cli.paths(args)
    digest = Tokenizer.load(where.tokenizer_dir).digest
    train, val = (binarize.split_dir(where.tokens_dir, args.data.max_seq_len, digest, split) for split in SPLITS)
    return train, val


def ready(args: cli.Args) -> None:
    """Raises CheckpointError when there is no tokenizer, DataError when there is no text."""
    where = cli.paths(args)
    take_over(args)  # its tokenizer, where a run starts from a model
    Tokenizer.load(where.tokenizer_dir)
    parquet.split_parquet(parquet.list_parquet(where.data_dir))


def has_shards(args: cli.Args) -> bool:
    """Whether the token shards of the run are there."""
    try:
        return all(storage.exists(storage.join(directory, MANIFEST)) for directory in token_dirs(args))
    except CheckpointError:  # no tokenizer, so no shards of it
        return False


def run(args: cli.Args) -> dict[str, Any]:
    """Binarize both splits, or say that they are complete. Returns `{"prepare_data/<metric>": number}`."""
    where = cli.paths(args)
    take_over(args)  # its tokenizer, where a run starts from a model
    return prepare(
        where.data_dir,
        where.tokenizer_dir,
        where.tokens_dir,
        args.data.max_seq_len,
        min_doc_chars=args.data.min_doc_chars,
        launcher=args.run.launcher,
    )


def prepare(
    data_dir: str,
    tokenizer_dir: str,
    tokens_dir: str,
    seq_len: int,
    shard_bytes: int = binarize.SHARD_BYTES,
    min_doc_chars: int = 0,
    launcher: str = "ray",
) -> dict[str, Any]:
    """Binarize the parquet files of `data_dir` into `tokens_dir`; rows are of `seq_len` + 1 ids.

    Training documents shorter than `min_doc_chars` are left out; validation has them all, so that runs compare.
    `launcher`: "ray" makes a Ray Data task of each file, "local" takes them one after another in this process.

    Raises DataError for unusable input, naming the file, StorageError when the output cannot be written.
    """
    began = time.monotonic()
    tokenizer = Tokenizer.load(tokenizer_dir)
    inputs = dict(zip(SPLITS, parquet.text_shards(data_dir), strict=True))
    folders = {split: binarize.split_dir(tokens_dir, seq_len, tokenizer.digest, split) for split in SPLITS}
    jobs = [
        Job(
            split,
            path,
            binarize.out_prefix(folders[split], path),
            tokenizer_dir,
            tokenizer.digest,
            seq_len + 1,
            shard_bytes,
            min_doc_chars if split == "train" else 0,
        )
        for split in SPLITS
        for path in inputs[split]
    ]
    receipts = {job: receipt for job in jobs if (receipt := job.finished()) is not None}
    todo = [job for job in jobs if job not in receipts]
    print(f"prepare_data: {len(jobs)} files of {data_dir}, {len(receipts)} of them already done", flush=True)
    for job in todo:
        if binarize.read_receipt(job.out_prefix) is not None:
            print(f"prepare_data: {job.parquet_path} or its token shards changed; it is binarized again", flush=True)
    if todo:
        for job, receipt in _with_progress((_run_here if launcher == "local" else _run_jobs)(todo), len(todo)):
            receipts[job] = receipt
    manifests = {}
    for split in SPLITS:
        of_split = [receipts[job] for job in jobs if job.split == split]
        manifests[split] = binarize.build_manifest(split, of_split, tokenizer, seq_len + 1, data_dir)
        _publish(manifests[split], folders[split])
    return _metrics(manifests, sum(receipts[job].tokens_kept for job in todo), time.monotonic() - began)


def _run_here(jobs: Sequence[Job]) -> Iterator[tuple[Job, Receipt]]:
    """Run jobs in this process, each with a tokenizer thread for every core; yields each as it ends."""
    for index, job in enumerate(jobs):
        row = run_job({"index": index, "job": job, "threads": usable_cores()})
        if row["error"] is not None:
            raise row["error"]
        yield job, row["receipt"]


def _run_jobs(jobs: Sequence[Job]) -> Iterator[tuple[Job, Receipt]]:
    """Run jobs as Ray Data tasks; yields each as it ends. Raises what the first failed job raised."""
    import ray
    import ray.data

    from jobs.runtime.cluster import start_ray

    start_ray()
    threads = threads_per_task(len(jobs), [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]])
    items = [{"index": index, "job": job, "threads": threads} for index, job in enumerate(jobs)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(run_job, num_cpus=threads)
    dataset.context.enable_progress_bars = False  # ours count tokens
    for row in dataset.iter_rows():
        if row["error"] is not None:
            raise row["error"]
        yield jobs[row["index"]], row["receipt"]


def threads_per_task(tasks: int, node_cpus: Sequence[float]) -> int:
    """Tokenizer threads of a task: the cluster's cores shared out, at most the cores of its largest node."""
    return int(max(1, min(sum(node_cpus) // max(1, tasks), max(node_cpus, default=1))))


def run_job(item: Mapping[str, Any]) -> dict[str, Any]:
    """Body of one task. Errors of ours are returned, so that the driver raises them as they are."""
    job: Job = item["job"]
    try:
        receipt = binarize.binarize_file(
            job.parquet_path,
            job.out_prefix,
            _tokenizer(job.tokenizer_dir, job.tokenizer_digest),
            job.row_tokens,
            num_threads=item["threads"],
            shard_bytes=job.shard_bytes,
            min_doc_chars=job.min_doc_chars,
        )
    except MegaContextError as error:
        return {"index": item["index"], "receipt": None, "error": error}
    return {"index": item["index"], "receipt": receipt, "error": None}


@lru_cache(maxsize=1)
def _tokenizer(directory: str, digest: str) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if tokenizer.digest != digest:
        raise DataError(
            f"the tokenizer in {directory!r} is {tokenizer.digest[:12]} here and {digest[:12]} where the job began. Keep "
            "it on storage that every node sees, and do not replace it during the job."
        )
    return tokenizer


def _publish(manifest: Manifest, folder: str) -> None:
    """Write a manifest unless the very same one is there."""
    try:
        if Manifest.read(folder) == manifest:
            return
    except DataError:
        pass  # absent or unreadable: written below
    manifest.write(folder)


def _with_progress(done: Iterator[tuple[Job, Receipt]], total: int) -> Iterator[tuple[Job, Receipt]]:
    """Pass results through; a bar of files on a terminal, a line a file in a log."""
    with tqdm(total=total, desc=PREPARE_DATA.name, unit=" files", disable=None) as bar:
        for count, (job, receipt) in enumerate(done, start=1):
            bar.update()
            line = (
                f"prepare_data: {count}/{total} {storage.join(job.split, receipt.input.name)}: {receipt.documents} documents, "
                f"{receipt.tokens_kept / 1e6:.2f} M tokens, {receipt.tokens_kept / max(receipt.seconds, 1e-9) / 1e6:.2f} M tokens/s"
            )
            if bar.disable:
                print(line, flush=True)
            else:
                bar.set_postfix_str(f"{receipt.tokens_kept / 1e6:.1f} M tokens in the last")
            yield job, receipt


def _metrics(manifests: Mapping[str, Manifest], new_tokens: int, seconds: float) -> dict[str, Any]:
    tokens_in = sum(manifest.tokens_in for manifest in manifests.values())
    tokens_kept = sum(manifest.tokens_kept for manifest in manifests.values())
    documents = sum(manifest.documents for manifest in manifests.values())
    whole = sum(manifest.source["whole_documents"] for manifest in manifests.values())
    metrics = {
        "prepare_data/tokens": tokens_kept,
        "prepare_data/tokens_dropped": tokens_in - tokens_kept,
        "prepare_data/tokens_kept_share": tokens_kept / tokens_in,
        "prepare_data/documents": documents,
        "prepare_data/whole_documents_share": whole / documents,
        "prepare_data/train_rows": manifests["train"].num_rows,
        "prepare_data/val_rows": manifests["val"].num_rows,
        "prepare_data/train_tokens": manifests["train"].tokens_kept,
        "prepare_data/val_tokens": manifests["val"].tokens_kept,
        "prepare_data/bytes": sum(shard.bytes for manifest in manifests.values() for shard in manifest.shards),
        "prepare_data/seconds": seconds,
        "prepare_data/tokens_per_sec": new_tokens / seconds,
    }
    print(
        f"prepare_data: {tokens_kept / 1e6:.2f} M tokens in {manifests['train'].num_rows} training and "
        f"{manifests['val'].num_rows} validation rows; {metrics['prepare_data/tokens_kept_share']:.4%} of the tokens kept, "
        f"{metrics['prepare_data/whole_documents_share']:.1%} of the documents whole",
        flush=True,
    )
    return metrics


JOB = StageJob(PREPARE_DATA, run, ready, has_shards)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage(JOB, args, again=True))


if __name__ == "__main__":
    from jobs import prepare_data  # under its own name, so that tasks can import what they are sent

    prepare_data.main()
