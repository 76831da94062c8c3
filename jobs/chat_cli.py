"""Talk to a model in the terminal.

    python jobs/chat_cli.py -p "Why is the sky blue?"
    python jobs/chat_cli.py --run mine

Without -p it is a conversation: `clear` starts anew, `quit` ends. What was said stays in the KV cache, so a turn costs
what it adds. A base model has not learned to chat; it simply continues the text.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import codecs
from collections.abc import Generator, Sequence

import megacontext as mc
from jobs.runtime import cli, environment
from jobs.runtime.parser import Parser
from jobs.runtime.user_paths import resolve_paths
from megacontext import storage
from megacontext.checkpoint import latest_checkpoint, list_checkpoints
from megacontext.errors import CheckpointError
from megacontext.inference.engine import Engine
from megacontext.inference.sampling import check_sampling
from megacontext.train.worker import choose_device

STAGES = ("rl", "sft", "mid", "base")  # most taught first


class Conversation:
    """Turns of one chat: ids so far, and the cache that holds their keys and values."""

    def __init__(self, engine: Engine, *, chat: bool, max_tokens: int, temperature: float, top_k: int | None) -> None:
        self.engine, self.chat = engine, chat
        self.max_tokens, self.temperature, self.top_k = max_tokens, temperature, top_k
        self.clear()

    def clear(self) -> None:
        """Forget everything said."""
        self.ids = [self.engine.tokenizer.bos_id]
        self.cache = self.engine.new_cache()

    def reply(self, text: str, seed: int) -> Generator[str, None, None]:
        """Take a user's text and stream the answer; every id of both stays part of the conversation."""
        tokenizer = self.engine.tokenizer
        if self.chat:
            frame = [tokenizer.special(f"<|{name}|>") for name in ("user_start", "user_end", "assistant_start")]
            self.ids += [frame[0], *tokenizer.encode(text), *frame[1:]]
        else:
            self.ids += tokenizer.encode(text)
        columns = self.engine.generate(
            self.ids, 1, self.max_tokens, self.temperature, self.top_k, seed, cache=self.cache
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
        try:
            for (token,), _ in columns:
                if token not in self.engine.stop_ids:
                    self.ids.append(token)
                    yield decoder.decode(tokenizer.decode_bytes([token]))
            yield decoder.decode(b"", final=True)
        finally:  # also when max_tokens ran out or the user interrupts
            if self.chat:
                self.ids.append(tokenizer.special("<|assistant_end|>"))


def locate(path: str) -> tuple[str, bool]:
    """What to load for a path, and whether it has learned to chat.

    Of a run folder it is the newest checkpoint of the most taught stage; other paths are loaded as they are given.
    """
    for folder in (storage.join(path, "checkpoints"), path):
        for stage in STAGES:
            newest = latest_checkpoint(folder, stage)
            if newest is not None:
                return newest, stage != "base"
    # A checkpoint of ours, a model folder of nanochat's (x_checkpoints/tag), or the directory that holds those.
    names = {*path.rstrip("/").split("/")[-2:], *storage.list_dir(path)}
    taught = any(name.startswith(("megacontext_mid_", "megacontext_sft_", "megacontext_rl_")) for name in names)
    return path, taught or bool(names & {"mid_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints"})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Unknown flags end the program with status 2."""
    parser = Parser(__doc__)
    parser.add_argument("-p", "--prompt", default="", help="answer this and exit [default: converse]")
    parser.add_argument(
        "--checkpoint", default="", help="checkpoint or nanochat base directory [default: newest of --run]"
    )
    parser.add_argument("--run", default="speedrun", help="run whose newest checkpoint is used [default 'speedrun']")
    parser.add_argument(
        "--base_dir", default="", help="base folder of runs [default: NANOCHAT_BASE_DIR or ~/.cache/nanochat]"
    )
    parser.add_argument("--storage", default="", help="folder or URI that holds runs [default: <base_dir>/runs]")
    parser.add_argument(
        "--temperature", type=float, default=0.6, help="0 is greedy, higher is more varied [default 0.6]"
    )
    parser.add_argument(
        "--top_k", type=int, default=50, help="sample among the k likeliest tokens; 0 is all [default 50]"
    )
    parser.add_argument("--max_tokens", type=int, default=256, help="most tokens of an answer [default 256]")
    parser.add_argument("--seed", type=int, default=42, help="seed of sampling [default 42]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run [default auto]")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="compute dtype [default auto]"
    )
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> Conversation:
    """Load the model and say what it is."""
    top_k = args.top_k or None
    check_sampling(args.temperature, top_k)
    path = args.checkpoint
    if not path:
        given = {name: getattr(args, name) for name in ("run", "base_dir", "storage") if getattr(args, name)}
        path = cli.paths(cli.resolve(given | {"tier": "cpu"})).run_dir  # any tier: it does not change the folder
        if not list_checkpoints(storage.join(path, "checkpoints")):
            raise CheckpointError(f"run {path} has no checkpoint; train it first, or give --checkpoint PATH.")
    path, chat = locate(path)
    device = choose_device(args.device)
    model, tokenizer = mc.load(path, dtype=args.dtype, device=str(device))
    model.prepare_inference()
    print(f"{path} on {device}" + ("" if chat else ": a base model, it continues text"), file=sys.stderr, flush=True)
    return Conversation(
        Engine(model, tokenizer), chat=chat, max_tokens=args.max_tokens, temperature=args.temperature, top_k=top_k
    )


def answer(conversation: Conversation, text: str, seed: int) -> None:
    """Print a reply as it is made; Ctrl-C cuts it short and keeps the conversation."""
    reply = conversation.reply(text, seed)
    try:
        for piece in reply:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        reply.close()
    print(flush=True)


def converse(conversation: Conversation, seed: int) -> None:
    """Read a line, answer it, until `quit`, `exit` or the end of input."""
    print("Type clear to start anew, quit to leave.", flush=True)
    turn = 0
    while True:
        try:
            text = input("\nYou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.lower() in ("quit", "exit"):
            return
        if text.lower() == "clear":
            conversation.clear()
        elif text:
            print("Model: ", end="", flush=True)
            answer(conversation, text, seed + turn)
            turn += 1


def main(argv: Sequence[str] | None = None) -> None:
    cli.finish(environment.load)  # .mc_env may name the base folder
    args = parse(argv)

    def work() -> None:
        resolve_paths(args, "checkpoint", "storage")
        conversation = start(args)
        if args.prompt:
            answer(conversation, args.prompt, args.seed)
        else:
            converse(conversation, args.seed)

    cli.finish(work)


if __name__ == "__main__":
    main()
