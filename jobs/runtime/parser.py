"""A command line whose mistakes are told in two lines, with the flag that was most likely meant."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn


class FlagsAreRightError(Exception):
    """In place of a job's work, where only its flags are to be checked."""


class Parser(argparse.ArgumentParser):
    """`ArgumentParser` that shows its description as it is written, accepts no abbreviations, and limits its numbers.

    A mistake ends the program with status 2. `--help` leaves out the flags that were given to `hide`; `--help_all` shows
    every flag.
    """

    def __init__(self, description: str | None = None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self._hidden: list[argparse.Action] = []

    def add_argument(  # type: ignore[override]
        self, *names: str, low: float = 0, high: float = math.inf, **settings: Any
    ) -> argparse.Action:
        """As in `ArgumentParser`; a flag of type int or float takes finite numbers from `low` to `high`."""
        if settings.get("type") in (int, float):
            settings["type"] = _number(settings["type"], low, high)
        return super().add_argument(*names, **settings)

    only_check: ClassVar[bool] = False  # whether `parse_args` raises FlagsAreRightError instead of returning

    def parse_args(self, *given: Any) -> Any:  # type: ignore[override]
        found = super().parse_args(*given)
        if Parser.only_check:
            raise FlagsAreRightError
        return found

    def hide(self, action: argparse.Action) -> None:
        """Leave a flag out of `--help`."""
        if not self._hidden:
            super().add_argument("--help_all", action=_HelpAll, nargs=0, help="show every flag of this job and exit")
        self._hidden.append(action)

    def format_help(self) -> str:
        """The help without the hidden flags, and without the groups that have no other."""
        groups, shown = self._action_groups, {action: action.help for action in self._hidden}
        for action in self._hidden:
            action.help = argparse.SUPPRESS
        self._action_groups = [
            group for group in groups if any(action.help != argparse.SUPPRESS for action in group._group_actions)
        ]
        try:
            text = super().format_help()
        finally:
            self._action_groups = groups
            for action, help_text in shown.items():
                action.help = help_text
        return text + (f"\n--help_all shows {len(shown)} more flags.\n" if shown else "")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and which flag comes nearest to an unknown one."""
        self.exit(
            2,
            f"{self.prog}: {message}{self._meant(message)}.\n{self.prog} {'--help_all' if self._hidden else '--help'} lists all flags.\n",
        )

    def _meant(self, message: str) -> str:
        if not message.startswith("unrecognized arguments: "):
            return ""
        known = [option for action in self._actions for option in action.option_strings]
        found = []
        for word in message.split()[2:]:
            near = difflib.get_close_matches(word.partition("=")[0], known, 1) if word.startswith("-") else []
            if near and near[0] not in found:
                found.append(near[0])
        return f" (did you mean {', '.join(found)}?)" if found else ""


class _HelpAll(argparse.Action):
    """`--help_all`: show the help with every flag, and end the program with status 0."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        assert isinstance(parser, Parser)
        parser._hidden.clear()
        parser.print_help()
        parser.exit()


def _number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """The `type` of a numeric flag."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not (math.isfinite(value) and low <= value <= high):
            limits = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not allowed, it must be {limits}")
        return value

    return parse
