"""Measure how well the vocabulary compresses text, beside GPT-2's and GPT-4's if tiktoken has them on this machine.

python jobs/tok_eval.py --tier cpu
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tiktoken

from jobs.runtime import cli
from jobs.runtime.stage import Job, run_stage
from megacontext.config import DataConfig, RunConfig
from megacontext.data import parquet
from megacontext.data.tokenizer import Tokenizer
from megacontext.stages import TOK_EVAL

SECTIONS = [RunConfig, DataConfig]
SPLIT_CHARS = 2_000_000  # characters read of each split

BLOBS = "https://openaipublic.blob.core.windows.net"


@dataclass(frozen=True)
class Baseline:
    """A public vocabulary: tiktoken's name for it, and the files it is made from as (address, SHA-256)."""

    label: str
    encoding: str
    files: tuple[tuple[str, str], ...]


BASELINES = (
    Baseline(
        "gpt2",
        "gpt2",
        (
            (f"{BLOBS}/gpt-2/encodings/main/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
            (f"{BLOBS}/gpt-2/encodings/main/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        ),
    ),
    Baseline(
        "gpt2",
        "r50k_base",  # the same vocabulary in one file
        ((f"{BLOBS}/encodings/r50k_base.tiktoken", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),),
    ),
    Baseline(
        "gpt4",
        "cl100k_base",
        ((f"{BLOBS}/encodings/cl100k_base.tiktoken", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),),
    ),
)  # fmt: skip

SAMPLES: Mapping[str, str] = {
    "english": (
        "The harbour was quiet when the last boat came in. Nobody had expected it before morning, and the two men on "
        "the pier looked at each other without a word. “You're late,” said the older one at last, “or we can't count.” "
        "It had rained since noon; the ropes were heavy, the lamps smoked, and somewhere behind the warehouses a dog "
        "went on barking as if it knew what the night would bring.\n"
    ),
    "code": (
        "def moving_average(values: list[float], width: int) -> list[float]:\n"
        '    """Mean of each window of `width` neighbours."""\n'
        "    if width < 1:\n"
        '        raise ValueError(f"width is {width}; it must be at least 1")\n'
        "    total, out = 0.0, []\n"
        "    for i, value in enumerate(values):\n"
        "        total += value - (values[i - width] if i >= width else 0.0)\n"
        "        if i + 1 >= width:\n"
        "            out.append(total / width)\n"
        "    return out\n"
    ),
    "numbers": (
        "2024-02-29 07:45, 3.14159265, 1,048,576 bytes, 299792458 m/s, 6.02214076e23, 192.168.0.1, +41 44 668 18 00, "
        "17*23=391, 1000000007, 0xdeadbeef, 12.5%, 1/3, 8:30-17:15, 60.1699 N 24.9384 E\n"
    ),
    "unicode": (
        "Die Straße führt über die Brücke. L'été, où l'œuvre naît. Широкая река течёт на юг. Η γλώσσα είναι ζωντανή. "
        "図書館は静かです。 오늘은 날씨가 좋다. السماء زرقاء. नमस्ते दुनिया। ∑ᵢ xᵢ² ≤ ε, α → β; 🚀🌍🎉\n"
    ),
}  # fmt: skip


def inputs(args: cli.Args) -> dict[str, str]:
    """The tokenizer of the run. Raises CheckpointError when there is none."""
    return {"tokenizer": Tokenizer.load(cli.paths(args).tokenizer_dir).digest}


def run(args: cli.Args) -> dict[str, Any]:
    """Compare the tokenizer of the run with the public ones."""
    where = cli.paths(args)
    return evaluate_tokenizer(where.data_dir, where.tokenizer_dir)


def evaluate_tokenizer(data_dir: str, tokenizer_dir: str, max_chars: int = SPLIT_CHARS) -> dict[str, Any]:
    """Bytes per token on both splits and on fixed samples; `{"tok_eval/[<vocabulary>_]<text>_bytes_per_token": ratio}`.

    Names without a vocabulary are ours. Prints a table, and a line for each public vocabulary that is not here.
    """
    tokenizer = Tokenizer.load(tokenizer_dir)
    train, validation = parquet.text_shards(data_dir)
    texts = {name: [text] for name, text in SAMPLES.items()}
    texts |= {"train": first_texts(train, max_chars), "val": first_texts(validation, max_chars)}
    count: dict[str, Callable[[str], int]] = {"ours": lambda text: len(tokenizer.encode_numpy(text))}
    for label, encoding in cached_baselines().items():
        count[label] = partial(count_tokens, encoding)
    ratios = {label: {name: bytes_per_token(each, of) for name, each in texts.items()} for label, of in count.items()}
    print_table(ratios)
    return {
        f"tok_eval/{'' if label == 'ours' else label + '_'}{name}_bytes_per_token": ratio
        for label, row in ratios.items()
        for name, ratio in row.items()
    }


def count_tokens(encoding: tiktoken.Encoding, text: str) -> int:
    """Tokens of a text in a public vocabulary."""
    return len(encoding.encode_ordinary(text))


def first_texts(paths: Iterable[str], max_chars: int) -> list[str]:
    """Whole documents from the front of the shards, until there are `max_chars` characters."""
    chosen, chars = [], 0
    for path in paths:
        for texts in parquet.read_texts(path):
            for text in texts:
                chosen.append(text)
                chars += len(text)
                if chars >= max_chars:
                    return chosen
    return chosen


def bytes_per_token(texts: Sequence[str], count: Callable[[str], int]) -> float:
    """UTF-8 bytes per token over all texts."""
    return sum(len(text.encode()) for text in texts) / max(1, sum(map(count, texts)))


def cached_baselines() -> dict[str, tiktoken.Encoding]:
    """The public vocabularies whose files tiktoken has in its cache, by label. Nothing is downloaded."""
    found: dict[str, tiktoken.Encoding] = {}
    for baseline in BASELINES:
        if baseline.label not in found and all(is_cached(url, sha256) for url, sha256 in baseline.files):
            found[baseline.label] = tiktoken.get_encoding(baseline.encoding)
    for label in dict.fromkeys(baseline.label for baseline in BASELINES):
        if label not in found:
            print(
                f"tok_eval: comparison with {label} skipped, tiktoken has no vocabulary of it in {cache_dir() or 'a cache'}",
                flush=True,
            )
    return found


def cache_dir() -> str:
    """Where tiktoken keeps its files; empty when its cache is switched off."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            return os.environ[name]
    return os.path.join(tempfile.gettempdir(), "data-gym-cache")


def is_cached(url: str, sha256: str) -> bool:
    """Whether tiktoken would find this file without the network: it deletes and fetches again what does not match."""
    if not cache_dir():
        return False
    path = Path(cache_dir(), hashlib.sha1(url.encode()).hexdigest())
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def print_table(ratios: Mapping[str, Mapping[str, float]]) -> None:
    """Bytes per token, a line a text, a column a vocabulary."""
    print(f"{'bytes per token':16}" + "".join(f"{label:>8}" for label in ratios))
    for name in ratios["ours"]:
        print(f"{name:16}" + "".join(f"{row[name]:8.3f}" for row in ratios.values()), flush=True)


JOB = Job(TOK_EVAL, run, ready=inputs, inputs=inputs)


def main() -> None:
    args = cli.parse(SECTIONS, __doc__)
    cli.print_config(args, SECTIONS)
    cli.finish(lambda: run_stage(JOB, args))


if __name__ == "__main__":
    main()
