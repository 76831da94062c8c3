r"""Read `.mc_env` as a shell reads assignments, without running anything.

A setting is `NAME=value` or `export NAME=value`. A value is made of pieces that stand side by side:

    plain      $NAME and ${NAME} are replaced; \c is the character c; ends at a space, a tab or the end of the line
    "double"   spaces and new lines stay; $NAME, ${NAME}, \$, \`, \" and \\ are read as in a plain piece
    'single'   every character stays as it is

`${NAME:-text}` is `text` where NAME is empty or not set. `~/` at the start of a plain value is the home folder. `#` begins
a comment at the start of a line and after a space; in `abc#def` it belongs to the value. Commands are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megacontext.errors import UserError

_BLANK = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]*(?:#[^\n]*)?")
_NAME = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=")
_END = re.compile(r"[ \t]*(?:(?<=[ \t])#[^\n]*)?(?:\n|\Z)")
_DOLLAR = r"(?P<dollar>\$(?![\w{('\"?@*#!$-]))"  # stands for itself
_VARIABLE = r"(?P<variable>\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*(?::-[^}\n]*)?\}))"
_PIECE = re.compile(
    rf"""'(?P<single>[^']*)'|"(?P<double>(?:[^"\\]|\\.)*)"|\\(?P<escaped>.)|{_VARIABLE}|{_DOLLAR}|(?P<plain>[^\s'"\\$`]+)""",
    re.DOTALL,
)
_IN_DOUBLE = re.compile(
    rf"""\\(?P<escaped>[$`"\\\n])|{_VARIABLE}|(?P<dollar>\$(?![\w{{('?@*#!$-]))|(?P<plain>[^$`\\]+|\\)""", re.DOTALL
)


def read_env_file(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The settings of a file. Raises UserError when it cannot be read; the message shows no value."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Make it readable, or remove it.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line} of {path} is not UTF-8 text. Save the file as UTF-8.") from None
    return parse_env_file(text, str(path), environment)


def parse_env_file(text: str, name: str = ".mc_env", environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """`{NAME: value}` of a text in the format above; $NAME is looked up in `environment`, then in the lines before.

    Raises UserError with the number of the line that is not in the format. Nothing of the line is shown: it may be secret.
    """
    return _Reader(text.replace("\r\n", "\n"), name, environment or {}).settings()


class _Reader:
    """One pass over a text."""

    def __init__(self, text: str, name: str, environment: Mapping[str, str]) -> None:
        self.text, self.name, self.environment = text, name, environment
        self.position = 0
        self.start = 0  # of the setting that is being read
        self.values: dict[str, str] = {}

    def settings(self) -> dict[str, str]:
        while True:
            self._take(_BLANK)
            if self.position == len(self.text):
                return self.values
            self.start = self.position
            head = self._take(_NAME)
            if head is None:
                raise self._refuse(
                    "is not NAME=value. A NAME is made of letters, digits and _, without a space before =."
                )
            value = self._value()
            if self._take(_END) is None:
                raise self._refuse(_reason(self.text[self.position :]))
            if "\0" in value:
                raise self._refuse("has a zero byte, which no variable can hold. Remove it.")
            self.values[head.group(1)] = value

    def _value(self) -> str:
        value, begin = "", self.position
        while piece := self._take(_PIECE):
            plain = piece["plain"]
            if plain and piece.start() == begin and (plain == "~" or plain.startswith("~/")):
                value += os.path.expanduser(plain)
            elif piece["double"] is not None:
                value += self._in_double(piece["double"])
            elif piece["escaped"] != "\n":  # a backslash at the end of a line joins it with the next one
                value += self._replaced(piece, "single", "escaped", "plain", "dollar")
        return value

    def _in_double(self, body: str) -> str:
        value, position = "", 0
        while position < len(body):
            piece = _IN_DOUBLE.match(body, position)
            if piece is None:
                raise self._refuse(_reason(body[position:]))
            position = piece.end()
            if piece["escaped"] != "\n":
                value += self._replaced(piece, "escaped", "plain", "dollar")
        return value

    def _replaced(self, piece: re.Match[str], *kinds: str) -> str:
        if piece["variable"] is None:
            return next(piece[kind] for kind in kinds if piece[kind] is not None)
        variable, has_default, default = piece["variable"].strip("${}").partition(":-")
        found = self.environment.get(variable) or self.values.get(variable)
        if found is None and not has_default and variable not in self.environment:
            raise self._refuse("uses a variable that is not set. Set it before, or keep the $ as it is: NAME='value'.")
        return found or default

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.position)
        if found:
            self.position = found.end()
        return found

    def _refuse(self, reason: str) -> UserError:
        return UserError(f"line {self.text.count(chr(10), 0, self.start) + 1} of {self.name} {reason}")


def _reason(rest: str) -> str:
    """Why a value cannot be read beyond this point."""
    if rest[:1] in ("'", '"'):
        return "has a quotation mark that is not closed. Close it, or write \\ before it."
    if rest[:1] in ("$", "`"):
        return "asks for a command or for something else that only a shell can do. To keep $ and ` as they are: NAME='value'."
    return "has a value with a space outside quotation marks, or a \\ at the end. Write NAME='value with spaces'."
