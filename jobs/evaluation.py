"""What the evaluations of a checkpoint have in common on the command line: their flags, the model, their end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

import megacontext as mc
from jobs.runtime import cli, environment
from jobs.runtime.parser import Parser
from jobs.runtime.user_paths import resolve_paths
from megacontext.data.tokenizer import Tokenizer
from megacontext.model.gpt import GPT
from megacontext.train.worker import choose_device

PATH_FLAGS = ("checkpoint", "json", "docs", "haystack")  # of one evaluation or another


def parser(about: str | None) -> argparse.ArgumentParser:
    """Flags of every evaluation: the checkpoint, the seed, where results go and where the model runs."""
    made = Parser(about)
    add = made.add_argument
    add("--checkpoint", required=True, help="checkpoint, run folder or nanochat base directory; or a URI")
    add("--budget", type=int, default=0, help="most entries that the model is shown, W [default: its sequence length]")
    add("--seed", type=int, default=0, help="seed of what is asked, of random choices and of intervals [default 0]")
    add("--json", default="", help="file or URI for the results, and pictures beside it [default: none]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run [default auto]")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="compute dtype [default auto]")
    return made


def add_documents(made: argparse.ArgumentParser, required: bool = True) -> None:
    """Flags of evaluations over windows of long documents."""
    add = made.add_argument
    add(
        "--docs",
        required=required,
        default="",
        help=".txt, .md or .parquet file with long documents, or a folder of them; or a URI",
    )
    add("--horizon", type=int, default=32, help="tokens that are predicted after the history, H [default 32]")
    add("--windows", type=int, default=32, help="windows over the documents, K [default 32]")
    add("--tail", type=int, default=0, help="newest tokens that stay raw [default: as a session's]")


def load(args: argparse.Namespace) -> tuple[GPT, Tokenizer, torch.device]:
    """The model of `--checkpoint`, ready for inference, its tokenizer and its device. Raises as `mc.load` does."""
    device = choose_device(args.device)
    model, tokenizer = mc.load(args.checkpoint, dtype=args.dtype, device=str(device))
    model.prepare_inference()
    return model, tokenizer, device


def main(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], object],
    argv: Sequence[str] | None = None,
) -> None:
    """Run an evaluation as a command: errors of the user are one line, and `.mc_env` is read."""
    cli.finish(environment.load)
    args = parse(argv)
    cli.finish(lambda: resolve_paths(args, *(name for name in PATH_FLAGS if hasattr(args, name))))
    cli.finish(lambda: run(args))
