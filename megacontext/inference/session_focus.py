"""The focus of a session: its working context, and the rules by which tokens and refocuses change it.

Nothing here touches a disk. What changes is a function of the calls alone, never of time or chance, so a stored focus and
the tokens after it give the same focus again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megacontext.context.allocator import FocusAllocator
from megacontext.context.focus_report import FocusReport
from megacontext.context.working_context import InvariantError, WorkingContext
from megacontext.errors import DamagedError, DataError
from megacontext.inference.focus import LensScorer, score_function
from megacontext.inference.session_options import SessionOptions
from megacontext.inference.session_state import APPENDED, SessionState, damaged, lod_runs

if TYPE_CHECKING:
    from megacontext.context.tree import Tree
    from megacontext.model.gpt import GPT


@dataclass
class SessionFocus:
    """The live form of `SessionState`.

    `since_refocus`: tokens generated since the last refocus. `refocused_at`: tokens of the history at that refocus.
    `stale`: tokens were appended since. `following`: how the tokens came that the tree has beyond the context, APPENDED
    or GENERATED.
    """

    options: SessionOptions
    context: WorkingContext
    allocator: FocusAllocator
    since_refocus: int = 0
    refocused_at: int = 0
    stale: bool = False
    following: str = APPENDED

    @classmethod
    def new(cls, options: SessionOptions) -> SessionFocus:
        """The focus of an empty history."""
        return cls(options, WorkingContext.all_raw(0, options.block_size), FocusAllocator(options))

    @classmethod
    def restored(cls, stored: SessionState, options: SessionOptions, folder: Path) -> SessionFocus:
        """The focus that was stored in a folder. Raises DamagedError when its context or its allocator cannot be."""
        allocator = FocusAllocator(options)
        try:
            context = stored.context(options.block_size)
            allocator.restore(stored.allocator, options.block_size)
        except (DataError, InvariantError, OverflowError, MemoryError) as error:
            raise DamagedError(damaged(folder, str(error) or type(error).__name__)) from error
        times = stored.since_refocus, stored.refocused_at
        return cls(options, context, allocator, *times, stored.stale, stored.following)

    @property
    def refocus_due(self) -> bool:
        """Whether the model refocuses before the next token: after an append, after an interval, and in a full budget."""
        full = len(self.context) >= self.options.budget
        return self.stale or self.since_refocus >= self.options.refocus_interval or full

    def follow(self, tokens: int) -> bool:
        """Take the history's tokens up to `tokens` into the context, by how they came.

        Returns whether entries were edited: the stored focus is out of date then.
        """
        new = tokens - self.context.tokens
        if new and (self.following == APPENDED or len(self.context) + new > self.options.budget):
            self.context, self.stale = self.allocator.extend(self.context, new), True
            return True
        if new:
            self.context = self.context.append(new)
            self.since_refocus += new
        return False

    def refocus(self, model: GPT, tree: Tree, headroom: int | None = None) -> tuple[FocusReport, LensScorer | None]:
        """Score the entries for the newest tokens and edit the context; also returns the scorer, if the model has one.

        `headroom`: entries of the budget that stay free; unless given, room for the tokens up to the next refocus.
        """
        headroom = self.options.headroom(self.context.tokens) if headroom is None else headroom
        score, scorer = score_function(model, tree, self.context, self.options, headroom)
        self.context, report = self.allocator.refocus(self.context, score, headroom)
        self.since_refocus, self.refocused_at, self.stale = 0, self.context.tokens, False
        return report, scorer

    def stored(self, model_digest: str, following: str) -> SessionState:
        """What session.json is to hold before tokens follow that come as `following` says."""
        return SessionState(
            options=self.options.stored(),
            model_digest=model_digest,
            tokens=self.context.tokens,
            lods=lod_runs(self.context),
            since_refocus=self.since_refocus,
            refocused_at=self.refocused_at,
            stale=self.stale,
            following=following,
            allocator=self.allocator.state(),
        )
