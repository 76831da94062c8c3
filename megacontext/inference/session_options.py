"""What a session can be told: defaults from its model, what a stored session was made with, and what the two forbid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megacontext import arguments
from megacontext.config import MemoryConfig
from megacontext.context.allocator import AllocatorConfig
from megacontext.context.gist_function import check_block_size, levels_of
from megacontext.errors import UserError

if TYPE_CHECKING:
    from megacontext.model.gpt import GPT

_OF_THE_TREE = ("block_size", "dtype")  # the tree's own header knows them, and what to do when they differ
_RECENT_SHARE = 8  # an unasked-for raw tail takes at most 1/8 of the budget: the rest has to reach down to tokens


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Options of a session; all are stored with it. Defaults are the model's `mc_infer_*` and `allocator_*` settings.

    `budget` entries of the working context at most; `recent_tokens` newest tokens that stay raw (128, or an eighth of a
    smaller budget); `refocus_interval` generated tokens between refocuses; `block_size` children per gist, of a model
    without a memory; `max_lod` highest level, None for as many as the history fills; `dtype` of the tree's records.
    The rest are those of `AllocatorConfig`. Raises UserError for values that cannot be. numpy's numbers are taken as
    Python's, so that every option can be stored as JSON.
    """

    budget: int
    recent_tokens: int
    refocus_interval: int = 32
    block_size: int = 32
    max_lod: int | None = None
    dtype: str = "float32"
    allocator_type: str = "greedy"
    expand_threshold: float = 0.1
    collapse_threshold: float = 0.1
    max_replacements: int = 8
    iterations: int = 8
    sample_top_k: int = 4
    sample_temperature: float = 1.0
    cooldown: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in arguments.plain_fields(self).items():
            object.__setattr__(self, name, value)
        check_block_size(self.block_size)
        if self.budget < 2:
            raise UserError(
                f"budget is {self.budget} entries; a session needs room for 2 at least, and better hundreds."
            )
        if self.refocus_interval < 1:
            raise UserError(f"refocus_interval is {self.refocus_interval} tokens; it must be at least 1.")
        if self.recent_tokens < 1:
            raise UserError(
                f"recent_tokens is {self.recent_tokens}; the newest token has to be raw, since the next is predicted "
                "from it. Use 1 or more."
            )
        self.allocator_config()  # says what else cannot be

    def allocator_config(self) -> AllocatorConfig:
        """The part that the focus allocator needs."""
        return AllocatorConfig(
            budget=self.budget,
            recent_tokens=self.recent_tokens,
            kind=self.allocator_type,
            expand_threshold=self.expand_threshold,
            collapse_threshold=self.collapse_threshold,
            max_replacements=self.max_replacements,
            iterations=self.iterations,
            sample_top_k=self.sample_top_k,
            sample_temperature=self.sample_temperature,
            cooldown=self.cooldown,
            max_lod=self.max_lod,
            seed=self.seed,
        )

    def entries_needed(self, tokens: int) -> int:
        """Entries that the coarsest tiling takes of whichever history of up to `tokens` tokens needs most."""
        return most_coarsest_entries(tokens, self.block_size, self.recent_tokens, self.max_lod)

    def check_room(self, tokens: int) -> None:
        """Raise UserError unless every history up to `tokens` tokens fits the budget with an entry to spare."""
        needed = self.entries_needed(tokens) + 1
        if needed > self.budget:
            raise UserError(
                f"a budget of {self.budget} entries cannot hold a history of {tokens} tokens: the raw tail of "
                f"{self.recent_tokens}, the coarsest nodes before it and one new token can take {needed}. Nothing was "
                f"added. Make the session with a budget of {needed} or more, a shorter recent_tokens, or more levels."
            )


def resolve_options(
    model: GPT, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None, path: str = ""
) -> SessionOptions:
    """Options of a new session, or of the stored one that `given` does not contradict. Raises UserError where it does.

    An option given as None counts as not given.
    """
    types = {f.name: str(f.type) for f in fields(SessionOptions)}
    unknown = sorted(set(given) - set(types))
    if unknown:
        raise UserError(f"a session has no option {', '.join(unknown)}; there are {', '.join(types)}.")
    asked = {name: arguments.of_type(name, value, types[name]) for name, value in given.items() if value is not None}
    if model.memory is not None and asked.get("block_size", model.memory.block_size) != model.memory.block_size:
        raise UserError(
            f"block_size {asked['block_size']} is not that of the model's memory, {model.memory.block_size}; leave it out."
        )
    if stored is None:
        return SessionOptions(**{**_defaults(model, asked), **asked})
    for name, value in asked.items():
        if name not in _OF_THE_TREE and value != stored[name]:
            raise UserError(
                f"the session at {path!r} was made with {name} {stored[name]!r}, but {value!r} is asked for. Leave "
                f"{name} out to continue it as it is, or use another folder."
            )
    tree = {name: asked[name] for name in _OF_THE_TREE if name in asked}
    if model.memory is not None:
        tree["block_size"] = model.memory.block_size
    return SessionOptions(**{**stored, **tree})


def _defaults(model: GPT, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's own settings say about a session."""
    config = MemoryConfig() if model.memory is None else model.memory.config
    budget = asked.get("budget", config.mc_eval_soft_max_length or model.config.sequence_len)
    return {
        "budget": budget,
        "recent_tokens": max(1, min(config.allocator_recent_tokens, budget // _RECENT_SHARE)),
        "refocus_interval": config.mc_infer_refocus_interval,
        "block_size": config.block_size,
        "allocator_type": config.allocator_type,
        "expand_threshold": config.allocator_expand_threshold,
        "collapse_threshold": config.allocator_collapse_threshold,
        "max_replacements": config.mc_infer_allocator_max_replacements,
        "iterations": config.mc_infer_allocator_iterations,
        "sample_top_k": config.allocator_sample_top_k,
        "sample_temperature": config.allocator_sample_temperature,
    }


def most_coarsest_entries(tokens: int, block_size: int, tail: int, max_lod: int | None = None) -> int:
    """Maximum of `smallest_budget` over all histories of up to `tokens` tokens.

    The coarsest tiling of n old tokens takes the digit sum of n in base r (its top digit unlimited under a cap of
    levels). The largest sum up to n is n's own, or that of n with one digit lowered by 1 and all below it r - 1.
    """
    old = max(0, tokens - tail)
    most = above = 0
    rest = old
    for level in range(levels_of(old, block_size, max_lod), -1, -1):
        digit, rest = divmod(rest, block_size**level)
        if digit:
            most = max(most, above + digit - 1 + level * (block_size - 1))
        above += digit
    return min(tokens, tail) + max(most, above)
