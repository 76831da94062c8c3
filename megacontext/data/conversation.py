"""Chats as token ids: nanochat's rendering, with the loss mask that goes with it.

`<|bos|> (<|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|>)*`. A system message is put
before the first user message, with a blank line between them. A part of an assistant message is text, a tool call
between `<|python_start|>` and `<|python_end|>`, or the tool's answer between `<|output_start|>` and `<|output_end|>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megacontext import arguments
from megacontext.errors import UserError

# part type -> (special token before, special token after, 1 if the assistant learns to say it)
PART_TYPES: Mapping[str, tuple[str, str, int]] = {
    "text": ("", "", 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


class Vocabulary(Protocol):
    """What rendering needs of a tokenizer."""

    bos_id: int

    def special(self, name: str) -> int: ...
    def encode(self, text: str, bos: bool = False) -> list[int]: ...


class _Rendering:
    """Ids and mask under construction."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.ids = [vocabulary.bos_id]
        self.mask = [0]

    def add_special(self, name: str, learned: int) -> None:
        self.ids.append(self.vocabulary.special(name))
        self.mask.append(learned)

    def add_text(self, text: str, learned: int) -> None:
        ids = self.vocabulary.encode(text)
        self.ids += ids
        self.mask += [learned] * len(ids)


def render(
    vocabulary: Vocabulary, conv: Mapping[str, Any], max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Render `{"messages": [{"role", "content"}, …]}` as (ids, mask), both of one length, cut after `max_tokens`.

    mask is 1 on what the assistant is trained to say: its text, `<|python_start|>…<|python_end|>` and
    `<|assistant_end|>`; 0 on everything else, tool output included. Content is a text, or for the assistant a list of
    parts `{"type": "text" | "python" | "python_output", "text": …}`.

    Raises UserError, naming the message, when roles do not alternate from user to assistant, or content is malformed.
    """
    if max_tokens is not None:
        arguments.whole_number("max_tokens", max_tokens, 1, remedy="None is no limit.")
    out = _Rendering(vocabulary)
    for role, content in _turns(_messages(conv)):
        out.add_special(f"<|{role}_start|>", 0)
        if isinstance(content, str):
            out.add_text(content, int(role == "assistant"))
        else:
            for part in content:
                before, after, learned = PART_TYPES[part["type"]]
                if before:
                    out.add_special(before, learned)
                out.add_text(part["text"], learned)
                if after:
                    out.add_special(after, learned)
        out.add_special(f"<|{role}_end|>", int(role == "assistant"))
    return out.ids[:max_tokens], out.mask[:max_tokens]


def render_for_completion(vocabulary: Vocabulary, conv: Mapping[str, Any]) -> list[int]:
    """Ids of a chat that ends with `<|assistant_start|>`, for the model to go on from.

    A last message of the assistant is left out: it is the answer to be found. Raises UserError as `render` does.
    """
    messages = _messages(conv)
    if _role(messages, len(messages) - 1) == "assistant":
        messages = messages[:-1]
    ids, _ = render(vocabulary, {"messages": messages})
    return [*ids, vocabulary.special("<|assistant_start|>")]


def _messages(conv: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The message list of a conversation. Raises UserError if there is none."""
    messages = conv.get("messages") if isinstance(conv, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError('a conversation is {"messages": [{"role": …, "content": …}, …]} with at least one message.')
    return messages


def _role(messages: Sequence[Mapping[str, Any]], index: int) -> Any:
    message = messages[index]
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise UserError(f"message {index} is {message!r}; a message has a role and a content.")
    return message["role"]


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Checked (role, content) pairs that alternate user, assistant; a system message is merged into the first."""
    system = ""
    first = 0
    if _role(messages, 0) == "system":
        system, first = _text(messages[0]["content"], 0, "system") + "\n\n", 1
        if len(messages) < 2 or _role(messages, 1) != "user":
            raise UserError(
                "message 0 is from 'system'; it must be followed by a user message, which it is put before."
            )
    turns = []
    for index in range(first, len(messages)):
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        role, content = _role(messages, index), messages[index]["content"]
        if role != expected:
            raise UserError(
                f"message {index} is from {role!r} but must be from {expected!r}: roles alternate, the user begins."
            )
        if role == "user":
            content = (system if index == first else "") + _text(content, index, role)
        elif not isinstance(content, str):
            _check_parts(content, index)
        turns.append((role, content))
    return turns


def _text(content: Any, index: int, role: str) -> str:
    if not isinstance(content, str):
        raise UserError(f"the content of message {index} ({role}) is a {type(content).__name__}; it must be a text.")
    return content


def _check_parts(content: Any, index: int) -> None:
    """Raise UserError unless the content is a list of known parts."""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(
            f"the content of message {index} (assistant) is a {type(content).__name__}; it must be a text or a list of parts."
        )
    for number, part in enumerate(content):
        where = f"part {number} of message {index}"
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(f'{where} is {part!r}; a part is {{"type": …, "text": "…"}}.')
        if part.get("type") not in list(PART_TYPES):  # a list: the type may be unhashable
            raise UserError(f"{where} has the type {part.get('type')!r}; known types are {', '.join(PART_TYPES)}.")
