"""What a session can be told: defaults from its model, what a stored session was made with, and what the two forbid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from megacontext import arguments
from megacontext.context.allocator import AllocatorConfig
from megacontext.context.gist_function import check_block_size, levels_of
from megacontext.errors import UserError
from megacontext.memory_config import OPTIONS, FocusConfig

if TYPE_CHECKING:
    from megacontext.model.gpt import GPT

_OF_THE_TREE = ("block_size", "dtype")  # the tree's own header knows them, and what to do when they differ
_RECENT_SHARE = 8  # an unasked-for raw tail takes at most 1/8 of the budget: the rest has to reach down to tokens
# What session.json holds of every session, in order; of other options what differs from its default.
_ALWAYS_STORED = (
    "budget", "recent_tokens", "refocus_interval", "block_size", "max_lod", "dtype", "allocator_type", "expand_threshold",
    "collapse_threshold", "max_replacements", "iterations", "sample_top_k", "sample_temperature", "cooldown", "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SessionOptions(AllocatorConfig):
    """Options of a session, stored with it. Defaults are the focus settings of the model (`memory_config.OPTIONS`).

    `budget`: most entries of the working context. `recent_tokens`: newest tokens that stay raw (128, or an eighth of a
    smaller budget). `block_size`: children per gist, of a model without a memory. `max_lod`: highest level, None for as
    many as the history fills. `dtype`: of the tree's records. `focus`: all else. Raises UserError for values that cannot
    be. numpy's numbers are taken as Python's, so that every option can be stored as JSON.
    """

    block_size: int = 32
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, value in arguments.plain_fields(self).items():
            object.__setattr__(self, name, value)
        check_block_size(self.block_size)
        if self.budget < 2:
            raise UserError(
                f"budget is {self.budget} entries; a session needs room for 2 at least, and better hundreds."
            )
        if self.recent_tokens < 1:
            raise UserError(
                f"recent_tokens is {self.recent_tokens}; the newest token has to be raw, since the next is predicted "
                "from it. Use 1 or more."
            )
        super().__post_init__()  # says what else cannot be

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SessionOptions:
        """Options by name, as `stored` gives them; those left out have their defaults. Raises TypeError for other names."""
        focus = {name: value for name, value in options.items() if name in OPTIONS}
        return cls(focus=FocusConfig.of(**focus), **{name: options[name] for name in options.keys() - focus.keys()})

    def stored(self) -> dict[str, Any]:
        """The options by name, for session.json."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "focus"}
        values |= {name: getattr(self.focus, setting) for name, setting in OPTIONS.items()}
        plain = FocusConfig()
        changed = [name for name in OPTIONS if getattr(plain, OPTIONS[name]) != values[name]]
        return {name: values[name] for name in dict.fromkeys((*_ALWAYS_STORED, *changed))}

    @property
    def refocus_interval(self) -> int:
        """Generated tokens between refocuses."""
        return self.focus.mc_infer_refocus_interval

    def headroom(self, tokens: int) -> int:
        """Entries that a refocus of a history of `tokens` tokens leaves free for the tokens to come: at least 1."""
        return max(1, min(self.refocus_interval, self.budget - self.entries_needed(tokens)))

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


def options_of_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Focus settings by name of the flag as options of a session, by the session's names."""
    names = {setting: name for name, setting in OPTIONS.items()}
    names |= {"mc_eval_soft_max_length": "budget", "allocator_recent_tokens": "recent_tokens"}
    options = {names[flag]: value for flag, value in flags.items()}
    return {**options, "budget": options.get("budget") or None}  # 0 is the model's sequence length


def resolve_options(
    model: GPT, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None, path: str = ""
) -> SessionOptions:
    """Options of a new session, or of the stored one that `given` does not contradict. Raises UserError where it does.

    An option given as None counts as not given.
    """
    types = {item.name: str(item.type) for item in fields(SessionOptions) if item.name != "focus"}
    types |= {name: str(FocusConfig.__dataclass_fields__[setting].type) for name, setting in OPTIONS.items()}
    unknown = sorted(set(given) - set(types))
    if unknown:
        raise UserError(f"a session has no option {', '.join(unknown)}; there are {', '.join(types)}.")
    asked = {name: arguments.of_type(name, value, types[name]) for name, value in given.items() if value is not None}
    if model.memory is not None and asked.get("block_size", model.memory.block_size) != model.memory.block_size:
        raise UserError(
            f"block_size {asked['block_size']} is not that of the model's memory, {model.memory.block_size}; leave it out."
        )
    if stored is None:
        focus, own = model.focus, {} if model.memory is None else {"block_size": model.memory.block_size}
        budget = asked.get("budget", focus.mc_eval_soft_max_length or model.config.sequence_len)
        recent = max(1, min(focus.allocator_recent_tokens, budget // _RECENT_SHARE))
        known = {name: getattr(focus, setting) for name, setting in OPTIONS.items()}
        return SessionOptions.of({**known, **own, "budget": budget, "recent_tokens": recent, **asked})
    before = SessionOptions.of(stored).stored()
    for name, value in asked.items():
        if name not in _OF_THE_TREE and value != before.get(name, getattr(FocusConfig(), OPTIONS.get(name, ""), None)):
            raise UserError(
                f"the session at {path!r} was made with {name} {before.get(name)!r}, but {value!r} is asked for. Leave "
                f"{name} out to continue it as it is, or use another folder."
            )
    tree = {name: asked[name] for name in _OF_THE_TREE if name in asked}
    if model.memory is not None:
        tree["block_size"] = model.memory.block_size
    return SessionOptions.of({**before, **tree})


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
