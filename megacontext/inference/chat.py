"""A conversation with a model: a user's text goes in, pieces of the answer come out.

Over an `Engine` the model attends to every token of the conversation. Over a `Session` it attends to a working context,
so the conversation has no longest length, and on a disk it goes on after the process has ended.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import torch

from megacontext import arguments
from megacontext.errors import UserError
from megacontext.inference.engine import Engine
from megacontext.inference.sampling import check_sampling, check_seed
from megacontext.inference.session import Session
from megacontext.inference.tool_turn import Calculator, ToolTurn

_CHUNK_TOKENS = 1 << 16


class Chat:
    """One conversation over an `Engine` or a `Session`.

        chat = Chat(mc.Session(model, tokenizer, path="sessions/ada"))
        for piece in chat.reply("Why is the sky blue?"):
            print(piece, end="", flush=True)

    `template`: turns are rendered as in chat training (`data.conversation`). False adds the text as it is, and the model
    continues it: for base models. `max_tokens`: most tokens of an answer, the calculator's included. `stop`: texts that
    end an answer and are not shown. Draws depend on `seed` and on the number of tokens before the answer.

    Raises UserError for settings out of range.
    """

    def __init__(
        self,
        over: Engine | Session,
        *,
        template: bool = True,
        max_tokens: int = 256,
        temperature: float = 0.6,
        top_k: int | None = 50,
        seed: int = 42,
        stop: Sequence[str] = (),
    ) -> None:
        check_sampling(temperature, top_k)
        self.template = arguments.truth("template", template)
        self.max_tokens = arguments.whole_number("max_tokens", max_tokens, 0)
        self.temperature, self.top_k, self.seed = temperature, top_k, check_seed(seed)
        self.stop = StopStrings.checked(stop)
        self.tokenizer = over.tokenizer
        self._talk: _Talk = _SessionTalk(over) if isinstance(over, Session) else _EngineTalk(over)
        names = ("user_start", "user_end", "assistant_start", "assistant_end")
        self._user_start, self._user_end, self._start, self._end = (
            self.tokenizer.special(f"<|{name}|>") for name in names
        )

    @property
    def tokens(self) -> int:
        """Tokens of the conversation."""
        return self._talk.tokens

    def reply(self, text: str) -> Generator[str, None, None]:
        """Add a user's text to the conversation, and stream the answer in pieces of whole characters.

        Closing the generator cuts the answer short; what was said of it stays in the conversation, and the next turn ends
        it. The same holds for an answer whose process died. Raises UserError, DataError and StorageError as
        `Session.append` and `Session.generate` do.
        """
        ids = self.tokenizer.encode(arguments.text("text", text))
        if self.template:
            ids = [self._user_start, *ids, self._user_end, self._start]
            if self._talk.newest_of((self._start, self._end)) == self._start:
                ids = [self._end, *ids]
        self._talk.hear(ids if self.tokens else [self.tokenizer.bos_id, *ids])
        return self._answer()

    def _answer(self) -> Generator[str, None, None]:
        seed = (self.seed + self.tokens) & arguments.MAX_SEED
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be several tokens
        stops = StopStrings(self.stop)
        for token in self._talk.say(self.max_tokens, self.temperature, self.top_k, seed):
            piece = stops.take(decoder.decode(self.tokenizer.decode_bytes([token])))
            if piece:
                yield piece
            if stops.met:
                return
        rest = stops.take(decoder.decode(b"", final=True)) + ("" if stops.met else stops.held)
        if rest:
            yield rest


class StopStrings:
    """Finds the first of some texts in a text that comes in pieces. Text that may be the beginning of one is held back.

    `met`: one was found. `held`: what was taken and not yet returned.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self.held, self.met = stop, "", False

    @staticmethod
    def checked(stop: Sequence[str]) -> tuple[str, ...]:
        """The texts. Raises UserError for what is no list of texts, and for an empty one."""
        found = tuple(arguments.text("stop", text) for text in arguments.items("stop", stop, "texts"))
        if "" in found:
            raise UserError("stop has an empty text, which would end every answer at once; leave it out.")
        return found

    def take(self, piece: str) -> str:
        """Take the next piece; returns what can be shown by now: nothing of a stop text, nothing behind one."""
        text = self.held + piece
        places = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if places:
            self.held, self.met = "", True
            return text[: min(places)]
        lengths = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        shown = len(text) - max(lengths, default=0)
        self.held = text[shown:]
        return text[:shown]


class _Talk(Protocol):
    """What a conversation is held over."""

    @property
    def tokens(self) -> int: ...

    def hear(self, ids: list[int]) -> None:
        """Add ids to the history."""

    def say(self, max_tokens: int, temperature: float, top_k: int | None, seed: int) -> Iterator[int]:
        """The ids of an answer, each in the history when it is yielded. The id that stops it is in the history alone."""

    def newest_of(self, ids: tuple[int, ...]) -> int | None:
        """The one of these ids that is the newest in the history; None without any."""


class _EngineTalk:
    """The history is a list of ids; the cache holds its keys and values, so a turn computes what it adds."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ids, self.cache = engine, list[int](), engine.new_cache()

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def hear(self, ids: list[int]) -> None:
        self.ids += ids

    def say(self, max_tokens: int, temperature: float, top_k: int | None, seed: int) -> Iterator[int]:
        for (token,), _ in self.engine.generate(self.ids, 1, max_tokens, temperature, top_k, seed, cache=self.cache):
            self.ids.append(token)
            if token not in self.engine.stop_ids:
                yield token

    def newest_of(self, ids: tuple[int, ...]) -> int | None:
        return next((token for token in reversed(self.ids) if token in ids), None)


class _SessionTalk:
    """The history is the session's. What the calculator says is appended, so the model refocuses on it."""

    def __init__(self, session: Session) -> None:
        self.session, self.tool = session, Calculator(session.tokenizer)

    @property
    def tokens(self) -> int:
        return self.session.tokens

    def hear(self, ids: list[int]) -> None:
        self.session.append(ids)

    def say(self, max_tokens: int, temperature: float, top_k: int | None, seed: int) -> Iterator[int]:
        turn, left = ToolTurn(self.tool), max_tokens
        for token in self.session.generate(max_tokens, temperature, top_k, seed):
            if token in self.session.host.stop_ids:
                return
            left -= 1
            forced = turn.take(token)[:left]
            self.session.append(forced)
            yield token
            yield from forced
            left -= len(forced)
            if not left:
                return

    def newest_of(self, ids: tuple[int, ...]) -> int | None:
        for stop in range(self.tokens, 0, -_CHUNK_TOKENS):
            chunk = self.session.tree.ids(max(0, stop - _CHUNK_TOKENS), stop)
            at = torch.isin(chunk, torch.tensor(ids)).nonzero()
            if len(at):
                return int(chunk[int(at[-1])])
        return None
