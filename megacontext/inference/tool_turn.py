"""The calculator's turn in an answer: after `<|python_start|>expression<|python_end|>` its result is forced into the text.

Knows ids and the calculator only. `Engine` and `Chat` feed it the ids of an answer one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megacontext.inference.tools import calculate

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: <|assistant_end|> and <|bos|>."""
    return frozenset((tokenizer.special("<|assistant_end|>"), tokenizer.bos_id))


class Calculator:
    """The tool of one tokenizer: ids of an expression in, ids of its result out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.python_start, self.python_end = tokenizer.special("<|python_start|>"), tokenizer.special("<|python_end|>")
        self.output_start, self.output_end = tokenizer.special("<|output_start|>"), tokenizer.special("<|output_end|>")

    def output(self, expression: list[int]) -> list[int]:
        """<|output_start|> result <|output_end|> of an expression; nothing if it has no result."""
        result = calculate(self._tokenizer.decode(expression)) if expression else None
        return [] if result is None else [self.output_start, *self._tokenizer.encode(result), self.output_end]


class ToolTurn:
    """Where one answer is: outside an expression, or inside one."""

    def __init__(self, tool: Calculator) -> None:
        self._tool = tool
        self._expression: list[int] | None = None  # ids since <|python_start|>; None outside an expression

    def take(self, token: int) -> list[int]:
        """Take the next id of the answer; returns the ids to force after it, none in most cases."""
        if token == self._tool.python_start:
            self._expression = []
        elif token == self._tool.python_end and self._expression is not None:
            expression, self._expression = self._expression, None
            return self._tool.output(expression)
        elif self._expression is not None:
            self._expression.append(token)
        return []
