"""Talk to a model in the terminal.

    python jobs/chat_cli.py -p "Why is the sky blue?"
    python jobs/chat_cli.py --run mine
    python jobs/chat_cli.py --run mine --session ada

Without -p it is a conversation: `clear` starts anew, `quit` ends, Ctrl-C cuts an answer short. A base model has not
learned to chat; it simply continues the text.

A model with a memory talks in a session: a conversation of any length, of which the model sees a budget of entries, and
which is kept on disk, in <run>/sessions/<NAME>. The next start with the same name goes on where it ended. `clear` keeps
the old conversation under another name.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields

import megacontext as mc
from jobs.runtime import cli, environment
from jobs.runtime.parser import Parser
from jobs.runtime.user_paths import base_folder, resolve_paths
from megacontext import storage
from megacontext.checkpoint import latest_checkpoint, list_checkpoints
from megacontext.config import FocusConfig
from megacontext.errors import CheckpointError, UserError
from megacontext.inference.chat import Chat
from megacontext.inference.engine import Engine
from megacontext.inference.sampling import check_sampling
from megacontext.inference.session import Session
from megacontext.inference.session_folder import load_state
from megacontext.inference.session_host import SessionHost
from megacontext.inference.session_options import options_of_flags
from megacontext.stages import BY_CHECKPOINT, NEWEST_FIRST
from megacontext.train.worker import choose_device

DEFAULT, NONE = "default", "none"  # names of sessions: of a conversation without --session, and of none at all
_TAUGHT = [stage for stage in BY_CHECKPOINT.values() if stage.after]  # the stages that follow base training


class Conversation:
    """The chat that is going on, and how to begin another one. `begin` gives an empty engine or the session by its name."""

    def __init__(
        self, begin: Callable[[], Engine | Session], folder: Path | None, args: argparse.Namespace, chat: bool
    ) -> None:
        self._begin, self._folder, self._args, self._template = begin, folder, args, chat
        self._open()

    def _open(self) -> None:
        self.over = self._begin()
        args = self._args
        self.chat = Chat(
            self.over, template=self._template, max_tokens=args.max_tokens, temperature=args.temperature,
            top_k=args.top_k or None, seed=args.seed, stop=args.stop,
        )  # fmt: skip
        if isinstance(self.over, Session):
            where = f"kept in {self._folder}" if self._folder else "kept until the end of this program"
            say(f"session of {self.over.tokens:,} tokens, {where}")

    def clear(self) -> None:
        """Start anew. A session on disk is kept under the next free name NAME.1, NAME.2, …"""
        self.close()
        if self._folder is not None:
            number = next(
                n for n in range(1, 1 << 30) if not self._folder.with_name(f"{self._folder.name}.{n}").exists()
            )
            kept = self._folder.rename(self._folder.with_name(f"{self._folder.name}.{number}"))
            say(f"the conversation so far is kept: --session {kept.name} goes on with it")
        self._open()

    def close(self) -> None:
        """Store what is not stored yet."""
        if isinstance(self.over, Session):
            self.over.close()


def say(line: str) -> None:
    """Print a line about the conversation; stdout holds the answers alone."""
    print(line, file=sys.stderr, flush=True)


def locate(path: str) -> tuple[str, bool]:
    """What to load for a path, and whether it has learned to chat.

    Of a run folder it is the newest checkpoint of the most taught stage; other paths are loaded as they are given.
    """
    for folder in (storage.join(path, "checkpoints"), path):
        for stage in NEWEST_FIRST:
            newest = latest_checkpoint(folder, stage)
            if newest is not None:
                return newest, bool(BY_CHECKPOINT[stage].after)
    # A checkpoint of ours, a model folder of nanochat's (x_checkpoints/tag), or the directory that holds those.
    names = {*path.rstrip("/").split("/")[-2:], *storage.list_dir(path)}
    ours = tuple(f"megacontext_{stage.checkpoint}_" for stage in _TAUGHT)
    return path, any(
        name.startswith(ours) or name in {f"{stage.nanochat}_checkpoints" for stage in _TAUGHT} for name in names
    )


def sessions_folder(path: str, base_dir: str) -> str:
    """Where the sessions of a model are: in the folder of its run; below the base folder for a run in an object store."""
    parts = path.rstrip("/").split("/")
    if parts[-1].startswith("megacontext_"):
        parts.pop()
    run = "/".join(parts[:-1] if parts[-1] == "checkpoints" else parts)
    if not storage.is_local(run):
        run = storage.join(base_dir, "runs", run.rsplit("/", 1)[-1])
    return storage.join(run, "sessions")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Unknown flags end the program with status 2."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("-p", "--prompt", default="", help="answer this and exit [default: converse]")
    add(
        "--session", default="", metavar="NAME",
        help=f"name of the session that the conversation goes on with; {NONE!r} keeps nothing on disk [default: {DEFAULT!r} for a "
        f"model with a memory, {NONE!r} with -p and for a model without one]",
    )  # fmt: skip
    add("--checkpoint", default="", help="checkpoint or nanochat base directory [default: newest of --run]")
    add("--run", default="speedrun", help="run whose newest checkpoint is used [default 'speedrun']")
    add("--base_dir", default="", help="base folder of runs [default: NANOCHAT_BASE_DIR or ~/.cache/nanochat]")
    add("--storage", default="", help="folder or URI that holds runs [default: <base_dir>/runs]")
    add("--temperature", type=float, default=0.6, help="0 is greedy, higher is more varied [default 0.6]")
    add("--top_k", type=int, default=50, help="sample among the k likeliest tokens; 0 is all [default 50]")
    add("--max_tokens", type=int, default=256, help="most tokens of an answer [default 256]")
    add(
        "--stop",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="texts that end an answer and are not shown [default: none]",
    )
    add("--seed", type=int, default=42, help="seed of sampling [default 42]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run [default auto]")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="compute dtype [default auto]")
    budget = {"mc_eval_soft_max_length": ("--budget",)}  # as the evaluations call it
    cli.add_section(parser, FocusConfig, budget, note="default: the checkpoint's, or that of the stored session")
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> Conversation:
    """Load the model, say what it is, and open the conversation."""
    check_sampling(args.temperature, args.top_k or None)
    if "/" in args.session or args.session.startswith("."):
        raise UserError(
            f"--session is {args.session!r}; it must be the name of a folder, without '/' and not beginning with '.'."
        )
    path = args.checkpoint
    if not path:
        given = {name: getattr(args, name) for name in ("run", "base_dir", "storage") if getattr(args, name)}
        path = cli.run_folder(given)
        if not list_checkpoints(storage.join(path, "checkpoints")):
            raise CheckpointError(f"run {path} has no checkpoint; train it first, or give --checkpoint PATH.")
    path, chat = locate(path)
    device = choose_device(args.device)
    model, tokenizer = mc.load(path, dtype=args.dtype, device=str(device))
    model.prepare_inference()
    say(f"{path} on {device}" + ("" if chat else ": a base model, it continues text"))
    flags = {item.name: vars(args)[item.name] for item in fields(FocusConfig) if item.name in vars(args)}
    if model.memory is None and args.session in ("", NONE):
        if flags:
            raise UserError(
                f"--{next(iter(flags))} says what a session shows a model, and this model has no memory. Leave it out, or "
                "give --session NAME: a session without a trained memory shows means of embeddings."
            )
        return Conversation(lambda: Engine(model, tokenizer), None, args, chat)
    name = args.session or (NONE if args.prompt else DEFAULT)
    folder = (
        None
        if name == NONE
        else storage.local_folder(storage.join(sessions_folder(path, base_folder(args.base_dir)), name))
    )
    host, options = SessionHost(model, tokenizer), options_of_flags(flags)
    return Conversation(lambda: open_session(host, folder, options), folder, args, chat)


def open_session(host: SessionHost, folder: Path | None, options: dict[str, object]) -> Session:
    """The session in a folder, or a new one. One of another model, trained further since, goes on with gists made anew."""
    stored = None if folder is None else load_state(folder, tolerant=False)
    other = stored is not None and stored.model_digest != host.digest
    if other:
        say("the session was held with another model: its tokens stay, its gists are made anew")
    return Session(host.model, host.tokenizer, path=folder, host=host, replace_gists=other, **options)


def answer(conversation: Conversation, text: str) -> None:
    """Print a reply as it is made; Ctrl-C cuts it short and keeps the conversation."""
    reply = conversation.chat.reply(text)
    try:
        for piece in reply:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        reply.close()
    print(flush=True)


def converse(conversation: Conversation) -> None:
    """Read a line, answer it, until `quit`, `exit` or the end of input."""
    print("Type clear to start anew, quit to leave.", flush=True)
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
            answer(conversation, text)


def main(argv: Sequence[str] | None = None) -> None:
    cli.finish(environment.load)  # .mc_env may name the base folder
    args = parse(argv)

    def work() -> None:
        resolve_paths(args, "checkpoint", "storage")
        conversation = start(args)
        try:
            if args.prompt:
                answer(conversation, args.prompt)
            else:
                converse(conversation)
        finally:
            conversation.close()

    cli.finish(work)


if __name__ == "__main__":
    main()
