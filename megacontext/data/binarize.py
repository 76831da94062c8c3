"""One parquet shard of text to token shards: tokenize on threads, pack, write; one input at a time, all of it resumable.

The unit of work is an input file. Its output has names that follow from the input's, and a receipt written last, so
any number of processes may binarize the inputs of a folder in any order, be killed, and be started again.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megacontext import storage
from megacontext.data import parquet
from megacontext.data.identity import FileIdentity, check_unchanged, from_json, identify, read_stamp
from megacontext.data.packing import PackStats, pack_rows
from megacontext.data.shards import COLUMNS, VERSION, Manifest, ShardInfo, ids_dtype, write_shard
from megacontext.data.stream import RowOrder
from megacontext.errors import DataError

SHARD_BYTES = 128 << 20
_TASK_CHARS = 1 << 18  # text of one tokenizer task: long enough to hide its dispatch, short enough to share out
_TASKS_PER_THREAD = 4


class Encoder(Protocol):
    """What binarizing asks of a tokenizer; `Tokenizer` has it."""

    vocab_size: int
    bos_id: int

    @property
    def digest(self) -> str: ...

    def encode_numpy(self, text: str) -> npt.NDArray[np.uint32]: ...


@dataclass(frozen=True)
class Receipt:
    """What became of one input file: which input, by which tokenizer, into which shards, with which counts."""

    input: FileIdentity
    tokenizer_digest: str
    row_tokens: int
    shards: tuple[ShardInfo, ...]
    documents: int
    whole_documents: int
    tokens_in: int
    tokens_kept: int
    seconds: float


def split_dir(tokens_dir: str, seq_len: int, tokenizer_digest: str, split: str) -> str:
    """Folder of a split's token shards; another tokenizer or row length has another folder."""
    return storage.join(tokens_dir, f"T{seq_len}-{tokenizer_digest[:12]}", split)


def tokenize(texts: Iterable[Sequence[str]], tokenizer: Encoder, num_threads: int) -> Iterator[npt.NDArray[np.uint32]]:
    """Ids of each text, in order, made by `num_threads` threads that stay a bounded distance ahead of the consumer."""

    def encode(part: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        return [tokenizer.encode_numpy(text) for text in part]

    running: deque[Future[list[npt.NDArray[np.uint32]]]] = deque()
    pool = ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="tokenize")
    try:
        for part in _parts(itertools.chain.from_iterable(texts)):
            running.append(pool.submit(encode, part))
            if len(running) >= _TASKS_PER_THREAD * max(1, num_threads):
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    chars = 0
    for text in texts:
        part.append(text)
        chars += len(text)
        if chars >= _TASK_CHARS:
            yield part
            part, chars = [], 0
    if part:
        yield part


def binarize_file(
    parquet_path: str,
    out_prefix: str,
    tokenizer: Encoder,
    row_tokens: int,
    num_threads: int = 1,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int], None] | None = None,
    min_doc_chars: int = 0,
) -> Receipt:
    """Tokenize and pack one parquet file into `{out_prefix}-00000.arrow`, …, then write `{out_prefix}.done.json`.

    Memory stays at one row group of text, the packer's pool and one shard. Running it again gives the same bytes.

    Args:
        parquet_path: a file with a `text` column, local or fsspec URI.
        out_prefix: folder and first part of the output names, local or fsspec URI.
        tokenizer: gives ids; its BOS starts every row.
        row_tokens: ids of a row, T+1.
        num_threads: tokenizer threads.
        shard_bytes: most bytes of one output file.
        on_progress: called with the tokens written so far, after each block of rows.
        min_doc_chars: documents shorter than this are left out. Another choice needs another `out_prefix`.

    Raises:
        DataError: the input is damaged, or was written to while it was read.
        StorageError: the output cannot be written.
    """
    started = time.monotonic()
    identity = identify(parquet_path)
    stats = PackStats()
    texts = ([text for text in group if len(text) >= min_doc_chars] for group in parquet.read_texts(parquet_path))
    documents = tokenize(texts, tokenizer, num_threads)
    infos = write_rows(
        documents, out_prefix, tokenizer, row_tokens, stats, shard_bytes=shard_bytes, on_progress=on_progress
    )
    check_unchanged(parquet_path, identity)
    receipt = Receipt(
        input=identity,
        tokenizer_digest=tokenizer.digest,
        row_tokens=row_tokens,
        shards=infos,
        documents=stats.documents,
        whole_documents=stats.whole_documents,
        tokens_in=stats.tokens_in,
        tokens_kept=stats.tokens_kept,
        seconds=time.monotonic() - started,
    )
    storage.write_json(_receipt_path(out_prefix), asdict(receipt))
    return receipt


def write_rows(
    documents: Iterable[npt.NDArray[np.uint32]],
    out_prefix: str,
    tokenizer: Encoder,
    row_tokens: int,
    stats: PackStats,
    columns: Sequence[str] = ("ids",),
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[ShardInfo, ...]:
    """Pack documents into shards `{out_prefix}-00000.arrow`, …, in a fixed random order within each shard.

    `columns`: names of the numbers of a token, `ids` first, then those of `shards.COLUMNS` that have one a token. With
    more than one, documents are [n, columns]. `stats` is filled in. Raises StorageError.
    """
    dtypes = [ids_dtype(tokenizer.vocab_size), *(COLUMNS[name].dtype for name in columns[1:])]
    most_rows = max(1, shard_bytes // (row_tokens * sum(dtype.itemsize for dtype in dtypes)))
    count = len(columns)
    blocks = pack_rows(documents, row_tokens, tokenizer.bos_id, stats, block_rows=min(1024, most_rows), columns=count)
    wide = dtypes[0] if count == 1 else np.dtype(np.uint32)
    infos: list[ShardInfo] = []
    for rows in _gather(blocks, most_rows, wide, stats, on_progress):
        parts = [rows] if count == 1 else [rows[..., at].astype(dtype) for at, dtype in enumerate(dtypes)]
        path = f"{out_prefix}-{len(infos):05d}.arrow"
        infos.append(write_shard(path, dict(zip(columns, parts, strict=True))))
    return tuple(infos)


def _gather(
    blocks: Iterable[npt.NDArray[np.uint32]],
    most_rows: int,
    dtype: np.dtype[np.generic],
    stats: PackStats,
    on_progress: Callable[[int], None] | None,
) -> Iterator[npt.NDArray[np.generic]]:
    """Blocks of rows as arrays of at most `most_rows` rows, in a dtype."""
    shard = np.empty(0, dtype)
    filled = 0
    for block in blocks:
        if not shard.size:
            shard = np.empty((most_rows, *block.shape[1:]), dtype)  # pages are used only as far as rows arrive
        while len(block):
            taken = min(len(block), most_rows - filled)
            shard[filled : filled + taken] = block[:taken]
            block, filled = block[taken:], filled + taken
            if filled == most_rows:
                yield _shuffled(shard)
                filled = 0
        if on_progress is not None:
            on_progress(stats.tokens_kept)
    if filled:
        yield _shuffled(shard[:filled])


def _shuffled(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Rows in a fixed random order: packing sorts them by fit, and whoever reads only the first ones wants a fair sample."""
    return rows[RowOrder(len(rows), seed=0).rows(0, len(rows))]


def finished(parquet_path: str, out_prefix: str, tokenizer_digest: str, row_tokens: int) -> Receipt | None:
    """The receipt of an input that is done: same content, tokenizer and row length, all shards there and whole.

    None when any of it does not hold; the input is then binarized anew. The input is read only when its stamp is not
    the receipt's; if the content is the same nevertheless, the receipt gets the new stamp.
    """
    receipt = read_receipt(out_prefix)
    if receipt is None or (receipt.tokenizer_digest, receipt.row_tokens) != (tokenizer_digest, row_tokens):
        return None
    folder = out_prefix.rsplit("/", 1)[0]
    try:
        whole = all(read_stamp(storage.join(folder, shard.name))[0] == shard.bytes for shard in receipt.shards)
    except DataError:  # a shard is gone
        return None
    if not whole or (_name(parquet_path), read_stamp(parquet_path)[0]) != (receipt.input.name, receipt.input.bytes):
        return None
    identity = identify(parquet_path, receipt.input)
    if identity.content != receipt.input.content:
        return None
    if identity != receipt.input:
        receipt = replace(receipt, input=identity)
        storage.write_json(_receipt_path(out_prefix), asdict(receipt))
    return receipt


def read_receipt(out_prefix: str) -> Receipt | None:
    """What `binarize_file` wrote last; None where it never ended, or its receipt cannot be read."""
    try:
        raw = storage.read_json(_receipt_path(out_prefix))
        values = {item.name: raw[item.name] for item in fields(Receipt)}
        values["shards"] = tuple(ShardInfo(**shard) for shard in raw["shards"])
        values["input"] = from_json(raw["input"])
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return Receipt(**values)


def out_prefix(directory: str, parquet_path: str) -> str:
    """Where the shards of an input go: its own name, without the ending, inside the split's folder."""
    return storage.join(directory, _name(parquet_path).removesuffix(".parquet"))


def build_manifest(
    split: str,
    receipts: Sequence[Receipt],
    tokenizer: Encoder,
    row_tokens: int,
    source: str,
    columns: Sequence[str] = ("ids",),
) -> Manifest:
    """The manifest of a split whose inputs are all done. Raises DataError when they hold less than one row."""
    shards = tuple(shard for receipt in receipts for shard in receipt.shards)
    if not shards:
        tokens = sum(receipt.tokens_in for receipt in receipts)
        raise DataError(
            f"the {split} split of {source!r} has {tokens} tokens, less than one row of {row_tokens}. "
            "Give more text, or a smaller --max_seq_len or --min_doc_chars."
        )
    return Manifest(
        version=VERSION,
        split=split,
        row_tokens=row_tokens,
        dtype=ids_dtype(tokenizer.vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        tokenizer_digest=tokenizer.digest,
        columns=tuple(columns),
        shards=shards,
        documents=sum(receipt.documents for receipt in receipts),
        tokens_in=sum(receipt.tokens_in for receipt in receipts),
        tokens_kept=sum(receipt.tokens_kept for receipt in receipts),
        source={
            "folder": source,
            "inputs": [list(receipt.input.content) for receipt in receipts],
            "whole_documents": sum(receipt.whole_documents for receipt in receipts),
        },
    )


def _receipt_path(prefix: str) -> str:
    return f"{prefix}.done.json"


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
