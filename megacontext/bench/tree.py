"""What the gist tree costs: appends to disk far into a history, opening, reading nodes, and building with mean gists.

    python -m megacontext.bench.tree --tokens 10000000 --width 64

`append` brings a tree on disk to nine tenths of `--tokens` random ids, in appends of `--append_tokens`; the last tenth is
then appended in turns with the first tenth of a second tree, so that both meet the same load, and single tokens after it.
`open` is a clean reopening, `open after crash` one after a
writer died with a tenth of the history not flushed (at most a million tokens). `build` makes the tree of
`--build_tokens` tokens in memory at once, against a loop over blocks that makes one gist at a time, and against the
same loop growing its tensors by concatenation at every block; all three must agree. `gistnet` is the default network of
a depth-4 GPT of `--gist_width` making the same kind of tree, in FLOP/s beside those of the machine's own matrix product. Times are CPU time of this process
unless they say wall; opening is wall time. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megacontext import precision
from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.gist_function import MeanGist, build_levels
from megacontext.context.tree import Tree, all_records
from megacontext.model import flops
from megacontext.model.gpt import GPT


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print; returns what was printed as JSON."""
    args = _parser().parse_args(argv)
    precision.set_threads(args.threads)
    result: dict[str, Any] = {"tokens": args.tokens, "width": args.width, "block_size": args.block_size}
    table = torch.randn(args.vocab, args.width, generator=torch.Generator().manual_seed(0))
    gist = MeanGist(table, args.block_size, args.width)
    result.update(measure_build(gist, table, args))
    result.update(measure_gistnet(args))
    with tempfile.TemporaryDirectory(prefix="bench-tree-", dir=args.dir or None) as folder:
        result.update(measure_disk(gist, folder, args))
    for key, value in result.items():
        print(f"{key:>34}  {value:,.3f}" if isinstance(value, float) else f"{key:>34}  {value}")
    print(json.dumps(result))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens appended to the tree on disk")
    parser.add_argument("--append_tokens", type=int, default=256, help="tokens of an append")
    parser.add_argument("--build_tokens", type=int, default=262_144, help="tokens of the tree built in memory")
    parser.add_argument("--width", type=int, default=64, help="floats of a record")
    parser.add_argument("--block_size", type=int, default=32, help="children of a gist")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens in the vocabulary")
    parser.add_argument("--gist_width", type=int, default=256, help="width of the GPT whose GistNet is measured")
    parser.add_argument("--gist_tokens", type=int, default=8192, help="tokens of the tree that GistNet makes")
    parser.add_argument("--dir", default="", help="folder for the tree; the system's temporary folder unless given")
    parser.add_argument("--repeats", type=int, default=3, help="turns of building; the fastest of each is shown")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0 is all cores")
    return parser


def measure_gistnet(args: argparse.Namespace) -> dict[str, float]:
    """GFLOP/s of the default GistNet and router on a whole tree, and of the matrix product that is most of their work."""
    width, tokens = args.gist_width, args.gist_tokens
    gpt = GPTConfig.from_depth(4, vocab_size=args.vocab, sequence_len=1024, width=width)
    model = GPT(gpt)
    memory = model.attach_memory(MemoryConfig(mc=1))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, args.vocab, (1, tokens), generator=torch.Generator().manual_seed(0))
    x, weight = torch.randn(tokens, width), torch.randn(4 * width, width)
    with torch.no_grad():
        product = _best(lambda: torch.nn.functional.linear(x, weight), 3 * args.repeats)
        tree = _best(lambda: build_levels(ids, memory, memory.config.max_lod), args.repeats)
    matmul, gistnet = 2 * tokens * width * 4 * width / product, flops.tree_flops(gpt, memory.config, tokens) / tree
    return {"matmul_gflops": matmul / 1e9, "gistnet_gflops": gistnet / 1e9, "gistnet_over_matmul": gistnet / matmul}


def measure_disk(gist: MeanGist, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Append, reopen and read a long history on disk."""
    path, rng = os.path.join(folder, "tree"), np.random.default_rng(0)
    ids = rng.integers(0, args.vocab, args.append_tokens * 256)
    resident = [_resident_mib()]
    tree = Tree.open(path, gist, vocab_size=args.vocab)
    tenth = args.tokens // 10
    began = time.perf_counter()
    while tree.tokens < args.tokens - tenth:
        if tree.tokens % (args.append_tokens * 1024) == 0:
            resident.append(_resident_mib())
        tree.append(ids[: min(args.append_tokens, args.tokens - tenth - tree.tokens)])
    wall = time.perf_counter() - began
    with Tree.open(os.path.join(folder, "young"), gist, vocab_size=args.vocab) as young:
        first, last = _in_turns((young, tree), tenth, args.append_tokens, ids)
        resident.append(_resident_mib())
        singles = _in_turns((young, tree), 2000, 1, ids)
    tree.close()
    open_s = _open_seconds(path, gist, args.vocab)
    after_crash = _append_and_die(path, gist, args.vocab, min(tenth, 1_000_000), ids)
    crash_s = _open_seconds(path, gist, args.vocab)
    with Tree.open(path, gist, vocab_size=args.vocab) as tree:
        wanted = rng.integers(0, tree.count(1), 512)
        gather_us = 1e6 * _best(lambda: tree.records(1, wanted), 20)
        scan_s = _best(lambda: _scan(tree), 2)
        resident.append(_resident_mib())
    return {
        "append_us_per_token_first_tenth": first, "append_us_per_token_last_tenth": last,
        "append_last_over_first": last / first,
        "single_append_us_first": singles[0], "single_append_us_last": singles[1],
        "single_append_last_over_first": singles[1] / singles[0],
        "append_wall_us_per_token": 1e6 * wall / max(1, args.tokens - tenth),
        "resident_mib_before": resident[0], "resident_mib_most": max(resident),
        "resident_growth_mib": max(resident) - resident[0],
        "disk_mib": sum(entry.stat().st_size for entry in os.scandir(path)) / 2**20,
        "open_s": open_s, "open_after_crash_s": crash_s, "tokens_after_crash": after_crash,
        "gather_512_us": gather_us, "scan_level_1_s": scan_s,
    }  # fmt: skip


def _in_turns(trees: Sequence[Tree], count: int, append_tokens: int, ids: np.ndarray[Any, Any]) -> list[float]:
    """CPU microseconds per token of appending `count` tokens to each tree, in turns of at most 64 appends.

    Turns give both trees the same neighbours on the machine; medians over the turns drop those that were disturbed.
    """
    turn = min(count, 64 * append_tokens)
    times: list[list[float]] = [[] for _ in trees]
    for _ in range(count // turn):
        for tree, kept in zip(trees, times, strict=True):
            began = time.process_time_ns()
            for start in range(0, turn, append_tokens):
                tree.append(ids[start : min(start + append_tokens, turn)])
            kept.append((time.process_time_ns() - began) / turn / 1e3)
    for tree in trees:
        tree.append(ids[: count % turn])
    return [statistics.median(kept) for kept in times]


def measure_build(gist: MeanGist, table: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per CPU second of building a tree: at once, block by block, and block by block with concatenation."""
    ids = torch.randint(0, args.vocab, (args.build_tokens,), generator=torch.Generator().manual_seed(1))
    few = ids[: min(len(ids), 65_536)]  # concatenation is quadratic: give it less

    def at_once() -> Tree:
        tree = Tree(gist)
        tree.append(ids)
        return tree

    found, expected = all_records(at_once()), block_loop(ids, table, args.block_size)
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    grown = concat_loop(few, table, args.block_size)
    assert all(torch.allclose(a[: len(b)], b, atol=1e-5) for a, b in zip(found, grown, strict=False))
    rates = {
        "at_once": len(ids) / _best(at_once, args.repeats),
        "loop": len(ids) / _best(lambda: block_loop(ids, table, args.block_size), args.repeats),
        "concat_loop": len(few) / _best(lambda: concat_loop(few, table, args.block_size), args.repeats),
    }
    return {
        **{f"build_{name}_tokens_per_cpu_s": rate for name, rate in rates.items()},
        "build_speedup_over_loop": rates["at_once"] / rates["loop"],
        "build_speedup_over_concat_loop": rates["at_once"] / rates["concat_loop"],
        "concat_loop_tokens": len(few),
    }


def block_loop(ids: Tensor, table: Tensor, block_size: int) -> list[Tensor]:
    """The slow reference: one gist at a time, kept in lists."""
    below = [
        table[ids[start : start + block_size]].mean(0) for start in range(0, len(ids) - block_size + 1, block_size)
    ]
    levels = []
    while below:
        levels.append(torch.stack(below))
        starts = range(0, len(below) - block_size + 1, block_size)
        below = [torch.stack(below[start : start + block_size]).mean(0) for start in starts]
    return levels


def concat_loop(ids: Tensor, table: Tensor, block_size: int) -> list[Tensor]:
    """The slow reference as a stream: at every block, embeddings and levels grow by concatenation."""
    embedded = table[:0]
    levels: list[Tensor] = []
    for start in range(0, len(ids) - block_size + 1, block_size):
        embedded = torch.cat([embedded, table[ids[start : start + block_size]]])
        below = embedded
        for level in range(1, 64):
            if len(below) % block_size or not len(below):
                break
            if level > len(levels):
                levels.append(table[:0])
            levels[level - 1] = torch.cat([levels[level - 1], below[-block_size:].mean(0, keepdim=True)])
            below = levels[level - 1]
    return levels


def _append_and_die(path: str, gist: MeanGist, vocab: int, count: int, ids: np.ndarray[Any, Any]) -> int:
    """Append in a child that ends without closing; tokens of the tree then."""
    child = os.fork()
    if child == 0:
        tree = Tree.open(path, gist, vocab_size=vocab)
        for start in range(0, count, 4096):
            tree.append(ids[: min(4096, count - start)])
        os._exit(0)
    os.waitpid(child, 0)
    with Tree.open(path, gist, vocab_size=vocab, writable=False) as tree:
        return tree.tokens


def _open_seconds(path: str, gist: MeanGist, vocab: int) -> float:
    began = time.perf_counter()
    tree = Tree.open(path, gist, vocab_size=vocab)
    took = time.perf_counter() - began
    tree.close()
    return took


def _scan(tree: Tree) -> None:
    """Read every record of level 1, in constant memory."""
    for start in range(0, tree.count(1), 8192):
        tree.record_range(1, start, min(tree.count(1), start + 8192))


def _best(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
