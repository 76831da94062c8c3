"""A session: a history of any length that a model sees through a working context of at most `budget` entries.

The tree holds every id and gist. The working context, what the model attends to, tiles the whole history; a refocus
edits it, and between refocuses it grows by raw tokens. Which tokens and edits there are is a function of the calls
alone, never of time or chance, so a session on disk continues after a crash as if it had never stopped.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from megacontext import arguments
from megacontext.context.focus_report import FocusReport
from megacontext.context.working_context import WorkingContext
from megacontext.errors import DamagedError, UserError
from megacontext.inference import session_state
from megacontext.inference.entry_cache import CachedEntries, EntryCache, NextInput
from megacontext.inference.sampling import check_sampling, check_seed, row_generators, sample
from megacontext.inference.session_focus import SessionFocus
from megacontext.inference.session_folder import (
    check_model,
    folder_of,
    keep_aside,
    load_state,
    missing,
    open_tree,
    stored_state,
)
from megacontext.inference.session_host import SessionHost
from megacontext.inference.session_options import SessionOptions, resolve_options
from megacontext.inference.session_state import APPENDED, GENERATED, SessionState
from megacontext.inference.session_stats import SessionStats
from megacontext.telemetry import otel

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer
    from megacontext.model.gpt import GPT

_log = logging.getLogger(__name__)

OnRefocus = Callable[[FocusReport, WorkingContext], object]


class Session:
    """A growing history with a bounded working context. One thread uses a session at a time.

        with mc.Session(model, tokenizer, budget=512, path="chats/ada") as session:
            session.append(text)
            for token in session.generate(max_tokens=64): ...

    A model with a memory (trained with `--mc`) refocuses by its LensNet and routing keys. Any other, nanochat's too,
    gets the mean of embeddings as gists and a focus by age: it can be tried at once, but was not trained to read gists.

    The model refocuses before the first token after an append, then every `refocus_interval` generated tokens, and
    earlier when the budget is full. A refocus leaves room for the next interval, so between refocuses each token
    computes one entry; after an edit everything behind it is computed again: **at most `budget` entries per refocus**,
    whatever the history's length (`stats.entries_recomputed`). Appending computes no entry at all: text that is folded
    into gists before the next token is never seen by the GPT.

    `path`: a local folder that holds the session (`tree/`, `session.json`); opened again it is as it was, after a kill
    too. The greedy continuation is the same up to rounding: a cache built in one piece and one built token by token
    differ in the last bits. `durable`: every token survives a power cut, at the cost of a flush each (a killed process
    loses nothing either way). `replace_gists`: continue a stored session with another model, making its gists anew.
    `read_only`: look at a stored session. Nothing on the disk changes, and of a damaged session what is intact is shown.
    `salvage`: go on from what is intact of a damaged session. What it cuts or replaces is kept in files named
    `*.damaged-<n>`. Damage that costs no ids, of gists or checksums, is mended without it. `verify` checks everything.
    `on_refocus(report, context)` is called after every refocus. `host`: what the sessions of one model share, for many
    sessions of one model. Other options: `SessionOptions`; those of a stored session are its own and need not be repeated.

    `generate` computes in a cache of the session's own. An engine that decodes many sessions together drives each of them
    by `next_input`, `accept` and `park`, and gets the tokens that `generate` gives.

    Entries are numbered positions for the model (`positional_type` slot), which its tables hold at any budget; a budget
    above the length it was trained at is allowed, and said in the log.

    Raises UserError for options that cannot be or are not the stored session's, and when it is open for writing
    elsewhere; DamagedError when a file that was stored safely is missing, incomplete or has changed; DataError when it is
    of another model or block size; StorageError when the folder cannot be used.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        budget: int | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        host: SessionHost | None = None,
        on_refocus: OnRefocus | None = None,
        durable: bool = False,
        replace_gists: bool = False,
        read_only: bool = False,
        salvage: bool = False,
        **options: Any,
    ) -> None:
        host = SessionHost(model, tokenizer) if host is None else host
        if not isinstance(host, SessionHost) or host.model is not model or host.tokenizer is not tokenizer:
            raise UserError(
                "host is not of this model and this tokenizer; make it by mc.SessionHost(model, tokenizer)."
            )
        durable, replace_gists = arguments.truth("durable", durable), arguments.truth("replace_gists", replace_gists)
        read_only, salvage = arguments.truth("read_only", read_only), arguments.truth("salvage", salvage)
        path = None if path is None else arguments.path("path", path)
        if (read_only and salvage) or (path is None and (read_only or salvage)):
            raise UserError("read_only and salvage open a stored session; give its path and one of the two.")
        if on_refocus is not None and not callable(on_refocus):
            raise UserError(f"on_refocus is {on_refocus!r}; it must be a function of a report and a context.")
        self.model, self.tokenizer, self.host, self.on_refocus = model, tokenizer, host, on_refocus
        self.stats = SessionStats()
        self._folder: Path | None = None if path is None else folder_of(path)
        self._read_only, self._salvage = read_only, salvage
        options["budget"] = budget
        stored = None if self._folder is None else stored_state(self._folder, model, options, read_only, salvage)
        self._focus = SessionFocus.new(resolve_options(model, options, stored.options if stored else None, str(path)))
        self._dirty = True  # session.json is out of date
        self._closed = False
        if salvage and self._folder is not None and not replace_gists:
            check_model(self._folder, stored, host.digest)  # before anything is cut
        how = {"durable": durable, "replace_gists": replace_gists, "read_only": read_only, "salvage": salvage}
        self.tree = open_tree(host, self.options, self._folder, **how)
        try:
            if self._folder is not None:
                self._reopen(self._folder, stored, replace_gists)
        except BaseException:
            self.tree.close()
            raise
        self._cache, self._cached = (
            EntryCache(model, self.tree, self.options.budget),
            CachedEntries(model, self.tree.block_size),
        )
        self._input: NextInput | None = None
        self._began = 0.0  # when the next input was asked for
        if self.options.budget > model.config.sequence_len:
            text = "a budget of %d entries is beyond the %d that the model was trained with: expect worse predictions"
            _log.warning(text, self.options.budget, model.config.sequence_len)

    @property
    def options(self) -> SessionOptions:
        """What the session was told, and the defaults of the rest."""
        return self._focus.options

    @property
    def context(self) -> WorkingContext:
        """What the model attends to."""
        return self._focus.context

    @property
    def tokens(self) -> int:
        """T, tokens of the history."""
        return self.context.tokens

    @property
    def entries(self) -> list[tuple[int, int]]:
        """[(lod, index), ...] of the working context, tiling [0, tokens)."""
        return self.context.entries

    def append(self, text_or_ids: str | Sequence[int] | npt.NDArray[np.integer] | torch.Tensor) -> int:
        """Add text (encoded as it is, without BOS) or ids at the end; returns the tokens of the history.

        Memory beyond the ids themselves does not grow with their number, and the GPT computes nothing. Raises DataError
        for an id outside the vocabulary and for what is no flat list of ids, UserError when the budget cannot hold so long a history (nothing is added then),
        StorageError when the disk is full: `tokens` says what was added before.
        """
        self._ready()
        given = self.tokenizer.encode_numpy(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        ids = arguments.array_of_ids("the append", given)
        if not ids.size:
            return self.tokens
        self.options.check_room(self.tokens + ids.size)
        self._announce(APPENDED)
        before = self.tokens
        try:
            with otel.span("session_append", tokens=ids.size):
                self.tree.append(ids)
        finally:
            self._follow()
            self.stats.appended += self.tokens - before
        return self.tokens

    def refocus(self) -> FocusReport:
        """Score the entries and edit the working context now; returns what was done.

        Room for the next `refocus_interval` tokens is made as far as the budget allows.
        """
        self._ready()
        with otel.span("session_refocus", tokens=self.tokens) as span:
            report, _ = self._focus.refocus(self.model, self.tree)
            span.set(entries=report.entries, edits=report.edits)
        self._dirty = True
        if not self._read_only:
            self._announce(GENERATED)
        self.stats.add_refocus(report)
        if self.on_refocus is not None:
            self.on_refocus(report, self.context)
        return report

    def generate(
        self,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Yield up to `max_tokens` ids that continue the history; each is part of it when it is yielded.

        Ends after an id of `stop`, which is yielded too: <|assistant_end|> and <|bos|> unless given, () never stops.
        An empty history begins with BOS. Temperature 0 is greedy; otherwise draws depend on `seed` alone. Raises
        UserError for settings out of range, a closed session, and when the budget can't hold another token;
        NonFiniteError, before a token is added, when the model computes NaN.
        """
        self._ready()
        check_sampling(temperature, top_k)
        check_seed(seed)
        max_tokens = arguments.whole_number("max_tokens", max_tokens, 0)
        ends = self.host.stop_ids
        if stop is not None:
            ids = arguments.items("stop", stop, "token ids; () never stops")
            ends = frozenset(arguments.token_ids("stop", ids, self.model.config.vocab_size).tolist())
        made = self._generate(max_tokens, temperature, top_k, seed, ends)
        return otel.traced("session_generate", made, tokens=self.tokens)

    def verify(self) -> None:
        """Check everything that is stored of the session against its checksums: session.json, every id, every gist.

        Opening checks the newest 8 MiB of each file and every read checks what it reads; this takes one pass over the
        files, in constant memory. Raises DamagedError that names the file, what has changed in it and the remedy.
        """
        self._ready()
        if self._folder is not None:
            SessionState.load(self._folder)
        self.tree.verify()

    def close(self) -> None:
        """Store what is not stored yet and release the folder. Closing twice is fine."""
        if self._closed:
            return
        try:
            self._ready()
            if self._dirty and not self._read_only:
                self._announce(self._focus.following)
        finally:
            self._closed = True
            self.tree.close()

    def __repr__(self) -> str:
        where = "in memory" if self._folder is None else f"at {str(self._folder)!r}"
        return (
            f"<Session: {self.tokens:,} tokens, {len(self.context)} of {self.options.budget} entries, levels 0 to "
            f"{int(self.context.lod.max(initial=0))}, {where}{', closed' if self._closed else ''}>"
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # One token: what to compute, and what was chosen

    @property
    def refocus_due(self) -> bool:
        """Whether `next_input` refocuses: after an append, every `refocus_interval` tokens, and when the budget is full."""
        self._ready()
        return self._focus.refocus_due

    def next_input(self) -> NextInput:
        """What has to be computed for the next token: a context, and the number of its first entry that is not cached.

        Refocuses if that is due; an empty history begins with BOS. The driver computes these entries (`entry_inputs`)
        behind the ones that its cache holds of this session, samples from the logits of the last, and calls `accept`.
        Called again before that, it says the same. Raises UserError for a closed session, and when the budget cannot
        hold another token.
        """
        self._began = time.perf_counter()
        self._ready()
        if not self.tokens:
            self.append([self.tokenizer.bos_id])
        self.options.check_room(self.tokens + 1)
        if self._focus.refocus_due:
            self.refocus()
        self._input = self._cached.next_input(self.context, self._focus.refocused_at)
        return self._input

    def accept(self, token: int) -> None:
        """Add the token that was chosen after `next_input`. When this returns it is part of the history, on the disk too.

        Raises UserError unless `next_input` was called since the last append, refocus or token; DataError for an id
        outside the vocabulary; StorageError when the disk is full: the token was not added, and the call may be repeated.
        """
        self._ready()
        given = self._input
        if given is None or given.context is not self.context:
            raise UserError(
                "accept needs a token that follows the newest next_input; call next_input and compute it first."
            )
        self._computed(given)
        self._announce(GENERATED)
        try:
            self.tree.append([token])
        finally:
            self._follow()
        self.stats.add_token(len(given.context), self.options.budget, 1e3 * (time.perf_counter() - self._began))

    def park(self) -> None:
        """Drop the KV cache, the session's own and the driver's. The next token computes at most `budget` entries for it."""
        self._cache.release()
        self._cached.forget()
        self._input = None

    def _computed(self, given: NextInput) -> None:
        """The entries of an input are in the cache."""
        self._cached.add(given)
        self.stats.entries_computed, self.stats.entries_recomputed = self._cached.computed, self._cached.recomputed

    def _generate(
        self, max_tokens: int, temperature: float, top_k: int | None, seed: int, stop: frozenset[int]
    ) -> Generator[int, None, None]:
        draws = row_generators(seed, 1)
        for _ in range(max_tokens):
            if len(self._cache) != len(self._cached):
                self.park()  # an engine computed what is said to be cached
            given = self.next_input()
            logits = self._cache.logits(given)
            self._computed(given)
            token = int(sample(logits[None], temperature, top_k, draws))
            self.accept(token)
            yield token
            if token in stop:
                return

    # The tree is the source of truth; session.json is replayed against it

    def _ready(self) -> None:
        """Before every operation: the session is open, and has caught up with its tree if it was interrupted."""
        if self._closed:
            raise UserError("the session is closed; open it again with the same path, or make a new one.")
        self._follow()

    def _follow(self) -> None:
        """Take the tokens that the tree has beyond the working context into it, by how they came."""
        if self._focus.follow(self.tree.tokens):
            self._dirty = True

    def _announce(self, following: str) -> None:
        """Write-ahead: store the focus, and how the next tokens come (APPENDED or GENERATED), before the tree takes them.

        Raises UserError for a reader.
        """
        if self._read_only:
            raise UserError("the session was opened with read_only=True; open it without to append or generate.")
        if (self._dirty or following != self._focus.following) and self._folder is not None:
            self._focus.stored(self.host.digest, following).save(self._folder)
        self._dirty, self._focus.following = False, following

    # Opening

    def _reopen(self, folder: Path, stored: SessionState | None, replace_gists: bool) -> None:
        """Take up the stored focus, now that the folder is ours, and what the tree has beyond it."""
        held, salvage = self.tree.tokens, self._salvage
        if not self._read_only:  # a reader keeps the state that it read before the tree: never ahead of it
            session_state.remove_leftovers(folder)
            stored = load_state(folder, tolerant=salvage)
        if not replace_gists:
            check_model(folder, stored, self.host.digest)
        if stored is not None and stored.tokens and not held and not (salvage or self._read_only):
            raise DamagedError(missing(folder, stored, "the tree holds no tokens"))
        if stored is not None and stored.tokens <= held:
            self._focus = SessionFocus.restored(stored, self.options, folder)
            self._dirty = stored.model_digest != self.host.digest
        elif held or salvage:  # the state was lost, or a power cut took ids that it counts with
            kept = "" if self._read_only else keep_aside(folder)
            text = "the session at %s keeps its %d tokens; its stored focus is lost and starts anew%s"
            _log.warning(text, folder, held, kept)
        self._follow()
        if self._dirty and not self._read_only:
            self._announce(self._focus.following)
