"""A setting: a dataclass field that is also a command-line flag, with its limits and the stages that read it.

A section of settings is a frozen dataclass that inherits from `Section`; its values are checked when it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar

from megacontext import arguments
from megacontext.errors import UserError
from megacontext.stages import Stage, among


def flag(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    low: float | None = 0,
    high: float | None = None,
    above: float | None = None,
    off: float | None = None,
    stages: tuple[str, ...] | None = None,
    decides: tuple[str, ...] | None = None,
    machine: bool = False,
    shape: bool = False,
    first: bool = False,
) -> Any:
    """A field of a section that is a command-line flag as well.

    low, high: the smallest and the largest number allowed. above: numbers must be larger than this one; replaces `low`.
    off: a number outside these limits that is allowed too (-1 where it means "off").
    stages: the stages, or kinds of stages, that read the setting; unless given, those of the section.
    decides: those whose result depends on the setting; unless given, all that read it.
    machine: the setting says where or how one job runs. A later job of the run does not take it over.
    shape: the setting decides which weights a model has, so `--init_from` takes it from the model.
    first: `--help` shows the flag. `--help_all` shows every flag.
    """
    limits = {"low": None if above is not None else low, "high": high, "above": above, "off": off}
    metadata = {"help": help, "choices": choices, **limits, "stages": stages, "decides": () if machine else decides,
                "machine": machine, "shape": shape, "first": first}  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base class of a section. `class Data(Section, stages=…)` names the stages that read its settings."""

    stages: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, stages: tuple[str, ...] = (), **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.stages = stages

    def __post_init__(self) -> None:
        """Raises UserError naming the first setting whose value is outside its limits."""
        for item in fields(self):
            check_value(item, getattr(self, item.name))


def own_fields(section: type[Section]) -> list[Field[Any]]:
    """The settings that a section defines itself, not those that it inherits from another section."""
    return [item for item in fields(section) if item.name in section.__annotations__]


def reads(stage: Stage, section: type[Section], item: Field[Any]) -> bool:
    """Whether a stage reads a setting."""
    readers = item.metadata["stages"]
    return among(stage, section.stages if readers is None else readers)


def decides(stage: Stage, section: type[Section], item: Field[Any]) -> bool:
    """Whether the result of a stage depends on a setting."""
    deciding = item.metadata["decides"]
    return reads(stage, section, item) if deciding is None else among(stage, deciding)


def free_flags(section: type[Section], stage: Stage) -> frozenset[str]:
    """Names of a section's settings on which the result of a stage does not depend."""
    return frozenset(item.name for item in fields(section) if not decides(stage, section, item))


def check_value(item: Field[Any], value: Any) -> None:
    """Raises UserError when a setting has a value of the wrong type or outside its limits."""
    name, choices = f"--{item.name}", item.metadata["choices"]
    if isinstance(item.default, str):
        if "\0" in arguments.text(name, value):
            raise UserError(f"{name} is {value!r}; it must not contain a null character.")
        if choices:
            arguments.choice(name, value, choices)
    elif not (is_switch(item) and isinstance(value, bool)):  # a YAML file may say true
        check = arguments.whole_number if isinstance(item.default, int) else arguments.number
        check(name, value, **{limit: item.metadata[limit] for limit in ("low", "high", "above", "off")})


def is_switch(item: Field[Any]) -> bool:
    """Whether a setting is 0 or 1; its flag may stand alone, which is 1."""
    return isinstance(item.default, int) and (item.metadata["low"], item.metadata["high"]) == (0, 1)


def from_flat(section: type[Any], values: Mapping[str, Any]) -> Any:
    """Build one section from a flat mapping; keys of other sections are ignored. Raises UserError for impossible values."""
    names = {item.name for item in fields(section)}
    return replace(section(), **{name: value for name, value in values.items() if name in names})
