"""The words that recall tasks are written with: single tokens of any vocabulary, and the grammar of facts and questions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megacontext.errors import UserError

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer

I64 = npt.NDArray[np.int64]

FACT_TOKENS = 5  # TELL key key value END
QUESTION_TOKENS = 3  # ASK key key
MIN_WORDS = 64
MAX_WORDS = 256  # key words and value words at most: as many as small models learn in minutes
_WORD = re.compile(rb" [a-z]{3,}")


@dataclass(frozen=True, eq=False)
class WordList:
    """Ids of words, int64: `keys` [n] with n even, `values` [n], `filler`, and the grammar `ask`, `tell`, `end`.

    `bos` begins a text. A key is a number below `num_keys`; it stands for two key words. Half of all pairs are keys of
    evaluation alone (`held_out`), the other half of training.
    """

    keys: I64
    values: I64
    filler: I64
    ask: int
    tell: int
    end: int
    bos: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, max_words: int = MAX_WORDS) -> WordList:
        """The words of a vocabulary: tokens that are a space and three or more lowercase letters, rarest first.

        Rare words are hardly part of ordinary text, so text neither asks nor answers. Raises UserError when there are
        fewer than 64.
        """
        special = tokenizer.vocab_size - len(tokenizer.encoding.special_tokens_set)
        words = [i for i in reversed(range(special)) if _WORD.fullmatch(tokenizer.decode_bytes([i]))]
        return cls.from_ids(np.array(words, np.int64), tokenizer.bos_id, max_words)

    @classmethod
    def from_ids(cls, words: I64, bos: int, max_words: int = MAX_WORDS) -> WordList:
        """From ids of words in a fixed order: three for the grammar, then keys and values in turn, filler from the rest."""
        if len(words) < MIN_WORDS:
            raise UserError(
                f"the vocabulary has {len(words)} tokens that are whole words (a space and three or more lowercase "
                f"letters); recall tasks need {MIN_WORDS}. Use a larger vocabulary."
            )
        ask, tell, end = words[:3].tolist()
        rest = words[3:]
        count = min(max_words, len(rest) // 2) // 2 * 2
        filler = rest[2 * count :] if len(rest) - 2 * count >= MIN_WORDS else rest
        return cls(rest[: 2 * count : 2], rest[1 : 2 * count : 2], filler, ask, tell, end, bos)

    @property
    def num_keys(self) -> int:
        """Keys of training, and as many of evaluation."""
        return len(self.keys) ** 2 // 2

    @property
    def grammar(self) -> I64:
        """Ids that stand in facts and questions alone."""
        return np.array([self.ask, self.tell, self.end], np.int64)

    def key_ids(self, key: I64, *, held_out: bool) -> I64:
        """Ids [..., 2] of keys [...]. The numbers of the two words add up to an odd number in evaluation keys."""
        first, half = np.divmod(key, len(self.keys) // 2)
        second = 2 * half + (first + held_out) % 2
        ids: I64 = self.keys[np.stack([first, second], -1)]
        return ids

    def fact(self, key: I64, value: I64, *, held_out: bool) -> I64:
        """Ids [n, 5] of facts: keys [n] and numbers of value words [n]."""
        return self._row(self.tell, self.key_ids(key, held_out=held_out), self.values[value][:, None], self.end)

    def link(self, key: I64, to: I64, *, held_out: bool) -> I64:
        """Ids [n, 6] of facts whose value is another key [n]."""
        keys = self.key_ids(key, held_out=held_out), self.key_ids(to, held_out=held_out)
        return self._row(self.tell, *keys, self.end)

    def question(self, key: I64, *, held_out: bool) -> I64:
        """Ids [n, 3] of questions about keys [n]."""
        return self._row(self.ask, self.key_ids(key, held_out=held_out))

    def _row(self, *parts: I64 | int) -> I64:
        """Parts [n, m] and single ids side by side."""
        rows = next(len(part) for part in parts if not isinstance(part, int))
        return np.concatenate([np.full((rows, 1), p) if isinstance(p, int) else p for p in parts], 1)
