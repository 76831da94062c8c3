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
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from jobs import cli
from jobs.stage import run_stage
from jobs.take_over import take_over
from megacontext import storage
from megacontext.config import DataConfig, RunConfig
from megacontext.data import parquet
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, DataError

SECTIONS = [RunConfig, DataConfig]
RECORD_NAME = "tok_train.json"


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
    train_paths, _ = parquet.split_parquet(parquet.list_parquet(data_dir))
    made_from = {
        "shards": len(train_paths),
        "shards_digest": shards_digest(train_paths),
        "vocab_size": data.vocab_size,
        "tok_max_chars": data.tok_max_chars,
        "tok_doc_cap": data.tok_doc_cap,
    }
    known = known_metrics(tokenizer_dir, made_from)
    if known is not None:
        print(f"tok_train: {tokenizer_dir} is complete, skipped", flush=True)
        return known
    counts = {"documents": 0, "chars": 0}
    began = time.perf_counter()
    texts = counted(capped(read_all(train_paths), data.tok_max_chars, data.tok_doc_cap), counts, data.tok_max_chars)
    tokenizer = Tokenizer.train(texts, data.vocab_size)
    seconds = time.perf_counter() - began
    if not counts["chars"]:
        raise DataError(f"the training shards of {data_dir!r} hold no text.")
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
    storage.write_json(storage.join(tokenizer_dir, RECORD_NAME), record)
    print(
        f"tok_train: {tokenizer.vocab_size} tokens from {counts['chars'] / 1e6:.1f} M characters "
        f"in {seconds:.1f} s, saved to {tokenizer_dir}",
        flush=True,
    )
    return metrics


def known_metrics(tokenizer_dir: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Metrics of a tokenizer that is there, loads, and was made from the same; else None, saying why it is remade."""
    try:
        record = storage.read_json(storage.join(tokenizer_dir, RECORD_NAME))
        digest = Tokenizer.load(tokenizer_dir).digest
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
    return metrics


def shards_digest(paths: Iterable[str]) -> str:
    """SHA-256 of the shards' names and sizes in bytes: cheap, and different when the data set is another one."""
    digest = hashlib.sha256()
    for path in paths:
        fs, inner = storage.filesystem(path)
        digest.update(f"{path.rsplit('/', 1)[-1]} {fs.size(inner)}\n".encode())
    return digest.hexdigest()


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
    with tqdm(desc="tok_train", unit=" chars", unit_scale=True, disable=None) as bar:
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


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage("tok_train", args, run))


if __name__ == "__main__":
    main()
