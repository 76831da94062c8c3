"""Byte-level BPE vocabulary: trained by rustbpe, served by tiktoken, stored in nanochat's layout.

A tokenizer folder holds `tokenizer.pkl` (a pickled `tiktoken.Encoding`) and `token_bytes.pt` (bytes per id), which is
what nanochat reads and writes. Reading never runs what is inside the pickle: see `_EncodingUnpickler`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megacontext import arguments, storage
from megacontext.data import conversation
from megacontext.errors import CheckpointError, UserError

if TYPE_CHECKING:
    import tiktoken
    import torch

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
PICKLE_NAME = "tokenizer.pkl"
TOKEN_BYTES_NAME = "token_bytes.pt"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_NO_SPECIAL: frozenset[str] = frozenset()
# The split regex recurses once per character of a whitespace run; a run of several hundred thousand overflows it.
_LONG_BLANK = re.compile(r"(\s{4096})")


class Tokenizer:
    """Text to token ids and back, and chats to ids with a loss mask.

    Ids 0..V-10 are byte sequences in merge order, the last nine are `SPECIAL_TOKENS`. Special tokens inside text are
    plain text. Encoding releases the GIL, so threads scale.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        """Serve a tiktoken encoding. Raises UserError if one of the nine special tokens is missing."""
        missing = [name for name in SPECIAL_TOKENS if name not in encoding._special_tokens]
        if missing:
            raise UserError(f"the vocabulary lacks the special tokens {missing}; train it with jobs/tok_train.py.")
        self.encoding = encoding
        self.vocab_size: int = encoding.n_vocab
        self.bos_id: int = self.special("<|bos|>")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` tokens (the nine special ones included) by byte-pair encoding.

        Raises UserError when `vocab_size` cannot hold the 256 bytes and the special tokens, and when the text is too
        small or too uniform to yield that many merges.
        """
        import rustbpe

        arguments.whole_number(
            "vocab_size", vocab_size, MIN_VOCAB_SIZE, remedy="256 bytes and 9 special tokens need ids."
        )
        if isinstance(texts, str):
            raise UserError("texts is one text; give a list of texts, or an iterator of them.")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(map(_valid_unicode, texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        size = len(ranks) + len(SPECIAL_TOKENS)
        if size < vocab_size:
            raise UserError(
                f"the text gave a vocabulary of {size} tokens, not {vocab_size}: too few different words. "
                f"Give more text, or set --vocab_size to at most {size}."
            )
        return cls(
            _build_encoding("rustbpe", SPLIT_PATTERN, ranks, {n: len(ranks) + i for i, n in enumerate(SPECIAL_TOKENS)})
        )

    @classmethod
    def load(cls, directory: str) -> Tokenizer:
        """Read `tokenizer.pkl` of a local folder or fsspec URI, ours or nanochat's.

        Raises CheckpointError when the file is absent, damaged, or holds anything but a tiktoken encoding with our
        special tokens.
        """
        path = storage.join(directory, PICKLE_NAME)
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            raise CheckpointError(f"no tokenizer at {path!r}; make one with jobs/tok_train.py.") from None
        return cls(_read_pickle(path, data))

    def save(self, directory: str) -> None:
        """Write `token_bytes.pt` and `tokenizer.pkl`, each atomically, so that nanochat can load them as its own."""
        import torch

        buffer = io.BytesIO()
        torch.save(self.token_bytes(), buffer)
        storage.write_bytes(storage.join(directory, TOKEN_BYTES_NAME), buffer.getvalue())
        storage.write_bytes(storage.join(directory, PICKLE_NAME), pickle.dumps(self.encoding, protocol=4))

    def special(self, name: str) -> int:
        """Id of a special token such as `<|user_start|>`. Raises UserError for an unknown name."""
        try:
            return self.encoding._special_tokens[name]
        except (KeyError, TypeError):
            raise UserError(f"{name!r} is no special token; there are {', '.join(SPECIAL_TOKENS)}.") from None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pattern, ranks and special tokens: two tokenizers with one digest give the same ids."""
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        for token, rank in sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1]):
            digest.update(b"\n%d %s" % (rank, token.hex().encode()))
        for name, rank in sorted(self.encoding._special_tokens.items(), key=lambda item: item[1]):
            digest.update(b"\n%d %s" % (rank, name.encode()))
        return digest.hexdigest()

    def token_bytes(self) -> torch.Tensor:
        """[V] int32: bytes that each id adds to the text, 0 for special tokens.

        A token that is not valid UTF-8 alone counts as its decoded form (three bytes per replacement character). That
        is nanochat's convention, kept so that bits per byte are comparable with it.
        """
        import torch

        special = set(self.encoding._special_tokens.values())
        sizes = [0 if i in special else len(self.encoding.decode([i]).encode()) for i in range(self.vocab_size)]
        return torch.tensor(sizes, dtype=torch.int32)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Token ids of a text, after the BOS id if asked for. Lone surrogates become U+FFFD."""
        ids: list[int] = self.encode_numpy(text).tolist()
        return [self.bos_id, *ids] if bos else ids

    def encode_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        """Token ids of a text as a read-only uint32 array, without a Python list in between."""
        arguments.text("text", text, "Encode the texts of a list one by one.")
        encode = self.encoding._core_bpe.encode_to_tiktoken_buffer
        try:
            return np.frombuffer(encode(text, _NO_SPECIAL), dtype=np.uint32)
        except UnicodeEncodeError:
            return self.encode_numpy(_valid_unicode(text))
        except ValueError as error:  # tiktoken's "Regex error while tokenizing"
            pieces = [piece for piece in _LONG_BLANK.split(text) if piece]
            if len(pieces) < 2:
                raise UserError(f"cannot tokenize a text of {len(text)} characters: {error}. Split it.") from error
            return np.concatenate([self.encode_numpy(piece) for piece in pieces])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not valid UTF-8 become U+FFFD. Raises DataError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exact bytes of token ids; special tokens give their names. Raises DataError for an unknown id."""
        return self.encoding.decode_bytes(arguments.token_ids("ids", ids, self.vocab_size).tolist())

    def render_conversation(
        self, conv: Mapping[str, Any], max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a chat and its loss mask (1 = the assistant is trained to say this id), see `conversation.render`."""
        return conversation.render(self, conv, max_tokens)

    def render_for_completion(self, conv: Mapping[str, Any]) -> list[int]:
        """Ids of a chat up to where the assistant is to answer, see `conversation.render_for_completion`."""
        return conversation.render_for_completion(self, conv)


class _Recorded:
    """Stands in for `tiktoken.Encoding` while unpickling: keeps the state instead of acting on it."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Knows one global, `tiktoken.core.Encoding`, and replaces it by a recorder: nothing in the file is executed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Recorded
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which a tokenizer has no use for")


def _read_pickle(path: str, data: bytes) -> tiktoken.Encoding:
    """Rebuild an encoding from untrusted bytes. Raises CheckpointError naming the file and what is wrong."""
    try:
        value = _EncodingUnpickler(io.BytesIO(data)).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
    ) as error:
        raise CheckpointError(f"{path!r} is not a tokenizer: {error}. Make it again with jobs/tok_train.py.") from error
    problem = _state_problem(value)
    if problem:
        raise CheckpointError(f"{path!r} is not a tokenizer: {problem}. Make it again with jobs/tok_train.py.")
    state = value.state
    try:
        return _build_encoding(state["name"], state["pat_str"], state["mergeable_ranks"], state["special_tokens"])
    except ValueError as error:
        raise CheckpointError(f"{path!r} holds an invalid vocabulary: {error}.") from error


def _state_problem(value: object) -> str:
    """Why an unpickled value cannot become an encoding; empty if it can."""
    state = value.state if isinstance(value, _Recorded) else None
    if not isinstance(state, dict):
        return "it holds no encoding with its own vocabulary"
    for key, kind in (("name", str), ("pat_str", str), ("mergeable_ranks", dict), ("special_tokens", dict)):
        if not isinstance(state.get(key), kind):
            return f"its {key} is missing or no {kind.__name__}"
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    if not all(type(token) is bytes and type(rank) is int for token, rank in ranks.items()):
        return "its ranks do not map bytes to integers"
    if not all(type(name) is str and type(rank) is int for name, rank in special.items()):
        return "its special tokens do not map names to integers"
    if not all(bytes([byte]) in ranks for byte in range(256)):
        return "its vocabulary lacks some of the 256 single bytes"
    if sorted([*ranks.values(), *special.values()]) != list(range(len(ranks) + len(special))):
        return "its ids have gaps or repeat"
    missing = [name for name in SPECIAL_TOKENS if name not in special]
    return f"it lacks the special tokens {missing}" if missing else ""


def _build_encoding(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    import tiktoken

    return tiktoken.Encoding(name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _valid_unicode(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD, as tiktoken does; other text is returned as it is."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
