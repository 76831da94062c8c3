"""Windows over long documents: a history of tokens, and the tokens that really follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megacontext import storage
from megacontext.data import parquet
from megacontext.data.recall import RecallItem
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import DataError, UserError

I64 = npt.NDArray[np.int64]
SUFFIXES = (".txt", ".md", ".parquet")


@dataclass(frozen=True)
class LongDocument:
    """A text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Windows:
    """K windows. `ids` int64 [K, N - 1 + H]: what a history of N tokens holds after its BOS, then H tokens to predict.

    `document` [K] numbers `names`. Continuations never overlap; shorter histories end where the longest does.
    """

    ids: I64
    document: I64
    names: tuple[str, ...]
    horizon: int
    bos: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def history_tokens(self) -> int:
        """N, tokens of the longest history, its BOS included."""
        return int(self.ids.shape[1]) - self.horizon + 1

    def history(self, window: int, tokens: int | None = None) -> I64:
        """The last `tokens` (all) of a window's history: a BOS, then text, as every training row begins."""
        wanted = self.history_tokens if tokens is None else tokens
        if not 1 <= wanted <= self.history_tokens:
            raise UserError(f"a history of {wanted} tokens of windows that were sampled for {self.history_tokens}.")
        end = self.history_tokens - 1
        return np.concatenate([np.full(1, self.bos, np.int64), self.ids[window, end - (wanted - 1) : end]])

    def continuation(self, window: int) -> I64:
        """The H tokens that follow."""
        return self.ids[window, self.history_tokens - 1 :]


def read_long_documents(path: str) -> list[LongDocument]:
    """Documents of a file or folder: .txt and .md files whole, every row of .parquet files with a `text` column.

    Local or any fsspec URI. Raises DataError when there are none, or a file cannot be read as text.
    """
    if not storage.exists(path):
        raise DataError(f"--docs {path!r} does not exist; give a {', '.join(SUFFIXES)} file or a folder of them.")
    if path.endswith(SUFFIXES):
        paths = [path]
    else:
        paths = [storage.join(path, name) for name in storage.list_dir(path) if name.endswith(SUFFIXES)]
    found: list[LongDocument] = []
    for file in paths:
        name = file.rsplit("/", 1)[-1]
        if file.endswith(".parquet"):
            texts = [text for group in parquet.read_texts(file) for text in group]
            found += [LongDocument(f"{name}:{row}", text) for row, text in enumerate(texts)]
        else:
            try:
                found.append(LongDocument(name, storage.read_bytes(file).decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                raise DataError(f"{file!r} is not UTF-8 text: {error}. Convert it, or leave it out.") from error
    if not found:
        raise DataError(f"--docs {path!r} holds no {', '.join(SUFFIXES)} files.")
    return found


def sample_windows(
    documents: Sequence[LongDocument], tokenizer: Tokenizer, history: int, horizon: int, count: int, seed: int = 0
) -> Windows:
    """`count` windows, as evenly over the documents as their lengths allow, drawn without overlap of continuations.

    history: N in tokens, its BOS included; horizon: H. Raises UserError for sizes below 1, DataError when the documents
    are too short, naming how many windows they hold.
    """
    if history < 1 or horizon < 1 or count < 1:
        raise UserError(f"history {history}, horizon {horizon} and windows {count} must all be at least 1.")
    body = history - 1
    long_enough = [document for document in documents if len(document.text.encode()) >= body + horizon]
    ids = [np.asarray(tokenizer.encode(document.text), np.int64) for document in long_enough]
    room = np.array([max(0, (len(tokens) - body) // horizon) for tokens in ids], np.int64)
    if room.sum() < count:
        raise DataError(
            f"{len(documents)} documents hold {int(room.sum())} windows of {history} + {horizon} tokens, not {count}; "
            "use fewer windows, a shorter history, or longer documents."
        )
    rng = np.random.default_rng(seed)
    taken = _even_shares(room, count, rng.permutation(len(ids)))
    rows, owners = [], []
    for number, share in enumerate(taken.tolist()):
        for place in np.sort(rng.choice(room[number], share, replace=False)).tolist():
            rows.append(ids[number][place * horizon : place * horizon + body + horizon])
            owners.append(number)
    names = tuple(document.name for document in long_enough)
    return Windows(np.stack(rows), np.array(owners, np.int64), names, horizon, tokenizer.bos_id)


def question_windows(items: Sequence[RecallItem], bos: int) -> Windows:
    """Every question of recall items as a window of its own: the history ends with the question, its answer follows.

    Items are the documents. The BOS takes the place of an item's first token, so that no block is shifted. Raises
    UserError when there are no questions.
    """
    if not any(item.questions for item in items):
        raise UserError("there are no questions to make windows of; ask for at least one history with one question.")
    rows = [np.concatenate([item.ids[1:], asked.ids, asked.answer]) for item in items for asked in item.questions]
    owners = np.repeat(np.arange(len(items)), [len(item.questions) for item in items])
    names = tuple(f"history {number}" for number in range(len(items)))
    horizon = next(len(asked.answer) for item in items for asked in item.questions)
    return Windows(np.stack(rows), owners, names, horizon, bos)


def _even_shares(room: I64, count: int, order: I64) -> I64:
    """How many of `count` each gets, none more than its room: round after round in the given order."""
    taken = np.zeros_like(room)
    while (left := count - int(taken.sum())) > 0:
        open_ones = [number for number in order.tolist() if taken[number] < room[number]]
        taken[open_ones[:left]] += 1
    return taken
