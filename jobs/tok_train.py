"""Train the byte-pair vocabulary on the text of the training shards; the validation shard is not read.

python jobs/tok_train.py --tier cpu --vocab_size 8192
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from jobs.runtime import cli
from jobs.runtime.stage import Job, run_stage
from jobs.runtime.stopping import unhandled
from jobs.runtime.take_over import take_over
from megacontext import storage
from megacontext.config import DataConfig, RunConfig
from megacontext.data import parquet
from megacontext.data.identity import FileIdentity, check_unchanged, from_json, identify_all
from megacontext.data.tokenizer import PICKLE_NAME, TOKEN_BYTES_NAME, Tokenizer
from megacontext.errors import CheckpointError, DataError
from megacontext.stages import TOK_TRAIN

SECTIONS = [RunConfig, DataConfig]
RECORD_NAME = "tok_train.json"


def ready(args: cli.Args) -> None:
    """Raises DataError when there is no text."""
    if not args.run.init_from:
        parquet.split_parquet(parquet.list_parquet(cli.paths(args).data_dir))


def has_tokenizer(args: cli.Args) -> bool:
    """Whether every file of the tokenizer of the run is there."""
    where = cli.paths(args).tokenizer_dir
    return all(storage.exists(storage.join(where, name)) for name in (PICKLE_NAME, TOKEN_BYTES_NAME))


def run(args: cli.Args) -> dict[str, Any]:
    """Train, save and describe the tokenizer of the run; what it made before from the same text is taken as it is, and
    so is the tokenizer of a model that the run starts from."""
    where = cli.paths(args)
    if take_over(args) is not None:
        taken = Tokenizer.load(where.tokenizer_dir)
        return {"tok_train/vocab_size": taken.vocab_size, "tok_train/digest": taken.digest}
    return train_tokenizer(args.data, where.data_dir, where.tokenizer_dir)


def train_tokenizer(data: DataConfig, data_dir: str, tokenizer_dir: str) -> dict[str, Any]:
    """Train on the shards of `data_dir` and write `tokenizer_dir`; return `{"tok_train/<metric>": number}`.

    `tok_train.json`, written last, says what the tokenizer was made from. Raises DataError for unusable shards and
    UserError when the text is too small for the vocabulary.
    """
    train_paths, _ = parquet.text_shards(data_dir)
    before = known_shards(tokenizer_dir)
    shards = identify_all(train_paths, before)
    made_from = {
        "shards": len(train_paths),
        "shards_digest": shards_digest(shards),
        "vocab_size": data.vocab_size,
        "tok_max_chars": data.tok_max_chars,
        "tok_doc_cap": data.tok_doc_cap,
    }
    known = known_metrics(tokenizer_dir, made_from)
    if known is not None:
        print(f"tok_train: {tokenizer_dir} is complete, skipped", flush=True)
        if shards != before:  # copied or touched: with the new stamps the next start need not read them
            write_record(tokenizer_dir, storage.read_json(storage.join(tokenizer_dir, RECORD_NAME)), shards)
        return known
    counts = {"documents": 0, "chars": 0}
    began = time.perf_counter()
    texts = counted(capped(read_all(train_paths), data.tok_max_chars, data.tok_doc_cap), counts, data.tok_max_chars)
    with unhandled():
        tokenizer = Tokenizer.train(texts, data.vocab_size)
    seconds = time.perf_counter() - began
    if not counts["chars"]:
        raise DataError(f"the training shards of {data_dir!r} hold no text.")
    for path, shard in zip(train_paths, shards, strict=True):
        check_unchanged(path, shard)
    tokenizer.save(tokenizer_dir)
    sizes = tokenizer.token_bytes()
    sizes = sizes[sizes > 0].float()
    metrics = {
        "tok_train/vocab_size": tokenizer.vocab_size,
        "tok_train/documents": counts["documents"],
        "tok_train/chars": counts["chars"],
        "tok_train/seconds": seconds,
        "tok_train/token_bytes_mean": float(sizes.mean()),
        "tok_train/token_bytes_std": float(sizes.std()),
        "tok_train/token_bytes_max": int(sizes.max()),
        "tok_train/digest": tokenizer.digest,
    }
    record = {"data_dir": data_dir, "made_from": made_from, "config": asdict(data), "metrics": metrics}
    write_record(tokenizer_dir, record, shards)
    print(
        f"tok_train: {tokenizer.vocab_size} tokens from {counts['chars'] / 1e6:.1f} M characters "
        f"in {seconds:.1f} s, saved to {tokenizer_dir}",
        flush=True,
    )
    return metrics


def write_record(tokenizer_dir: str, record: dict[str, Any], shards: Sequence[FileIdentity]) -> None:
    """Store what a tokenizer was made from, with the identities of its shards."""
    with_shards = {**record, "shards": [asdict(shard) for shard in shards]}
    storage.write_json(storage.join(tokenizer_dir, RECORD_NAME), with_shards)


def known_metrics(tokenizer_dir: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Metrics of a tokenizer that is there, loads, and was made from the same; else None, saying why it is remade."""
    try:
        record = storage.read_json(storage.join(tokenizer_dir, RECORD_NAME))
        tokenizer = Tokenizer.load(tokenizer_dir)
        digest = tokenizer.digest
        before, metrics = dict(record["made_from"]), dict(record["metrics"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:  # CheckpointError is a ValueError
        reason = str(error) if isinstance(error, CheckpointError) else f"{RECORD_NAME} is damaged"
        print(f"tok_train: training again: {reason}", flush=True)
        return None
    changed = [key for key in made_from if before.get(key) != made_from[key]]
    if metrics.get("tok_train/digest") != digest:
        changed.append("digest")
    if changed:
        print(f"tok_train: training again: {', '.join(changed)} changed since {tokenizer_dir} was made", flush=True)
        return None
    if not storage.exists(storage.join(tokenizer_dir, TOKEN_BYTES_NAME)):
        tokenizer.save(tokenizer_dir)
        print(f"tok_train: {tokenizer_dir} had no token_bytes.pt; it is made again from tokenizer.pkl", flush=True)
    return metrics


def known_shards(tokenizer_dir: str) -> list[FileIdentity]:
    """Identities of the shards that a tokenizer was made from; none where no readable record says so."""
    try:
        record = storage.read_json(storage.join(tokenizer_dir, RECORD_NAME))
        return [from_json(shard) for shard in record["shards"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def shards_digest(shards: Iterable[FileIdentity]) -> str:
    """SHA-256 of the shards' names, sizes and contents: different when the text is another one."""
    return hashlib.sha256("".join(f"{shard.content}\n" for shard in shards).encode()).hexdigest()


def read_all(paths: Iterable[str]) -> Iterator[str]:
    """Every document of the shards, in order."""
    for path in paths:
        for texts in parquet.read_texts(path):
            yield from texts


def capped(texts: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    """The first `doc_cap` characters of each text, until `max_chars` characters have been given out."""
    left = max_chars
    for text in texts:
        piece = text[: min(doc_cap, left)]
        left -= len(piece)
        yield piece
        if left <= 0:
            return


def counted(texts: Iterable[str], counts: dict[str, int], max_chars: int, line_every_s: float = 30.0) -> Iterator[str]:
    """Pass texts through, counting them; a bar on a terminal, a line now and then in a log."""
    last = time.monotonic()
    with tqdm(desc=TOK_TRAIN.name, unit=" chars", unit_scale=True, disable=None) as bar:
        for text in texts:
            counts["documents"] += 1
            counts["chars"] += len(text)
            bar.update(len(text))
            if bar.disable and time.monotonic() - last > line_every_s:
                last = time.monotonic()
                print(
                    f"tok_train: {counts['chars'] / 1e6:.0f} of at most {max_chars / 1e6:.0f} M characters", flush=True
                )
            yield text


JOB = Job(TOK_TRAIN, run, ready, has_tokenizer)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage(JOB, args))


if __name__ == "__main__":
    main()
