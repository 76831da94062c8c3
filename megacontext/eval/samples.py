"""A few fixed prompts and what the model makes of them, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megacontext.inference.engine import Engine

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer
    from megacontext.model.gpt import GPT

PROMPTS = (
    "The largest ocean on Earth is",
    "Water boils when",
    "Once there was a lighthouse keeper who",
    "The days of the week are Monday, Tuesday,",
    "If a train leaves at 3 o'clock and takes two hours, it arrives at",
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
)


class Sample(NamedTuple):
    """A prompt and its greedy continuation."""

    prompt: str
    continuation: str


def continuations(
    model: GPT, tokenizer: Tokenizer, max_tokens: int = 32, prompts: Sequence[str] = PROMPTS
) -> list[Sample]:
    """Greedy continuations of at most max_tokens tokens, all prompts in one batch."""
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    done = Engine(model, tokenizer).generate_many(ids, max_tokens)
    return [Sample(prompt, tokenizer.decode(row.new_ids)) for prompt, row in zip(prompts, done, strict=True)]
