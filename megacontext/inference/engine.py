"""Generation with a KV cache: many samples of one prompt, many prompts at once, and the calculator in between.

A shared prompt is prefilled once and its cache rows copied. Prompts of different lengths share a batch without left
padding: each starts at position 0, shorter ones leave a gap of unused cache slots behind them that attention skips.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from megacontext import arguments
from megacontext.errors import UserError
from megacontext.inference.sampling import check_sampling, check_seed, row_generators, sample
from megacontext.inference.tool_turn import Calculator, ToolTurn, stop_ids
from megacontext.model.rotary import Rotary

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer
    from megacontext.model.gpt import GPT
    from megacontext.model.kv_cache import KVCache

FINISHED = -1
"""Stands in a column of ids for a row that has stopped before."""


@dataclass(frozen=True)
class Generation:
    """A finished row: the prompt and what followed, without the id that stopped it."""

    ids: list[int]
    mask: list[int]  # 1 = sampled by the model, 0 = prompt or forced by a tool
    prompt_tokens: int
    stopped: bool  # by <|assistant_end|> or <|bos|>; False: max_tokens ran out

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_tokens :]


@dataclass
class PromptCache:
    """Keys and values of a conversation kept between calls of `generate`: only what is new is computed."""

    kv: KVCache
    ids: list[int] = field(default_factory=list)  # what the cache holds, one id a position

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep what the cache and a prompt begin with in common, but leave one id to compute; returns its length."""
        limit = min(len(self.ids), self.kv.length, len(prompt) - 1)
        same = next((i for i in range(limit) if self.ids[i] != prompt[i]), limit)
        self.kv.truncate(same)
        self.kv.last_ids = torch.tensor([prompt[same - 1]], device=self.kv.keys.device) if same else None
        del self.ids[same:]
        return same


class _Row:
    """What one row says next: the id sampled for it, or the next id that its tool turn forces."""

    def __init__(self, tool: Calculator, stop_ids: frozenset[int]) -> None:
        self._tool, self._stop_ids = ToolTurn(tool), stop_ids
        self._forced: deque[int] = deque()
        self.stopped = False

    def advance(self, sampled: int) -> tuple[int, int]:
        """Take the id sampled for this row; returns (the id that the row says, 1 if a tool forced it else 0)."""
        is_forced = bool(self._forced)
        token = self._forced.popleft() if is_forced else sampled
        self.stopped = token in self._stop_ids
        self._forced.extend(self._tool.take(token))
        return token, int(is_forced)


@dataclass
class _Live:
    """The rows being decoded: their cache, and for prompts of different lengths where each one's gap is."""

    kv: KVCache
    lengths: torch.Tensor | None = None  # [B] prompt tokens of each row; None: no gaps
    padded: int = 0  # slots of the longest prompt

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these (places in the batch)."""
        index = torch.tensor(rows, device=self.kv.keys.device)
        self.kv.keys, self.kv.values = self.kv.keys[:, index], self.kv.values[:, index]
        if self.lengths is not None:
            self.lengths = self.lengths[index]


class Engine:
    """Generates from a GPT. One engine may serve many calls; it holds no state between them.

    Rows stop at <|assistant_end|> or <|bos|>. After <|python_start|>…<|python_end|> the expression goes to
    `tools.calculate`, and its result is forced into the row as <|output_start|>result<|output_end|>.

    Raises UserError for a tokenizer of another vocabulary than the model's. Generating raises NonFiniteError when the
    model computes NaN.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        arguments.same_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids, self.tool = stop_ids(tokenizer), Calculator(tokenizer)

    def new_cache(self, capacity: int = 256) -> PromptCache:
        """An empty cache for one conversation with this model; it grows."""
        return PromptCache(self.model.make_cache(1, capacity))

    def generate(
        self,
        prompt: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        cache: PromptCache | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (ids, forced) columns, one entry per sample: the next id, and 1 where a tool forced it.

        The id that stops a row is yielded; from then on the row has FINISHED in its place. max_tokens counts columns;
        None goes on to the model's sequence_len. Row i depends on (seed, i) alone, not on num_samples. With `cache`
        (one sample only) the part of the prompt that it holds is not computed again, and it holds this turn afterwards.

        Raises UserError for an empty prompt, ids outside the vocabulary, and settings out of range.
        """
        prompt = self._checked("the prompt", prompt)
        check_sampling(temperature, top_k)
        check_seed(seed)
        num_samples = arguments.whole_number("num_samples", num_samples, 1)
        if cache is not None and not isinstance(cache, PromptCache):
            raise UserError(f"cache is a {type(cache).__name__}; make one by engine.new_cache().")
        if cache is not None and num_samples != 1:
            raise UserError(f"num_samples is {num_samples}; with a cache it must be 1.")
        if max_tokens is None:
            max_tokens = max(0, self.model.config.sequence_len - len(prompt))
        max_tokens = arguments.whole_number("max_tokens", max_tokens, 0)
        return self._generate(prompt, num_samples, max_tokens, temperature, top_k, seed, cache)

    def _generate(
        self,
        prompt: Sequence[int],
        num_samples: int,
        max_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int,
        cache: PromptCache | None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        if max_tokens == 0:
            return
        cache = cache or self.new_cache(capacity=len(prompt) + max_tokens)
        start = cache.reuse(prompt)
        logits = self._forward(torch.tensor([list(prompt[start:])]), _Live(cache.kv))
        cache.ids.extend(prompt[start:])
        kv = cache.kv if num_samples == 1 else cache.kv.expand(num_samples)
        columns = self._decode(
            _Live(kv), logits.expand(num_samples, -1), max_tokens, temperature, top_k, row_generators(seed, num_samples)
        )
        for ids, forced in columns:
            yield ids, forced
            cache.ids.append(ids[0])
        del cache.ids[cache.kv.length :]  # the last id was said, but not fed

    def generate_batch(
        self,
        prompt: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> list[Generation]:
        """All samples of one prompt, finished: `generate` without the streaming."""
        prompt = self._checked("the prompt", prompt)
        columns = self.generate(prompt, num_samples, max_tokens, temperature, top_k, seed)
        return _collect([prompt] * num_samples, columns, self.stop_ids)

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 42,
        max_rows: int = 64,
    ) -> list[Generation]:
        """Continue prompts of any lengths, max_rows at a time, in batches of similar length; results in the order given.

        Prompt i draws from (seed, i), whatever it is batched with. Raises UserError as `generate` does.
        """
        given = arguments.items("prompts", prompts, "prompts, each a list of token ids")
        prompts = [self._checked(f"prompt {i}", prompt) for i, prompt in enumerate(given)]
        check_sampling(temperature, top_k)
        max_tokens = arguments.whole_number("max_tokens", max_tokens, 0)
        max_rows = arguments.whole_number("max_rows", max_rows, 1)
        generators = row_generators(seed, len(prompts))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        done: dict[int, Generation] = {}
        for at in range(0, len(order), max_rows):
            rows = order[at : at + max_rows]
            chosen = [prompts[i] for i in rows]
            live, logits = self._prefill(chosen, max_tokens)
            columns = self._decode(live, logits, max_tokens, temperature, top_k, [generators[i] for i in rows])
            done.update(zip(rows, _collect(chosen, columns, self.stop_ids), strict=True))
        return [done[i] for i in range(len(prompts))]

    def _checked(self, name: str, prompt: Sequence[int]) -> list[int]:
        """A prompt as a list of ids. Raises UserError for an empty one, DataError for what is no id of the vocabulary."""
        ids: list[int] = arguments.token_ids(name, prompt, self.model.config.vocab_size).tolist()
        if not ids:
            raise UserError(f"{name} is empty; begin it with the BOS id.")
        return ids

    def _prefill(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[_Live, torch.Tensor]:
        """Run prompts, padded on the right (harmless under causal attention); logits [B, V] after each one's last id."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = int(lengths.max())
        ids = torch.full((len(prompts), padded), self.tokenizer.bos_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        live = _Live(self.model.make_cache(len(prompts), padded + max_tokens))
        logits = self._forward(ids, live, last=lengths - 1)
        if int(lengths.min()) < padded:
            live.lengths, live.padded = lengths.to(logits.device), padded
        return live, logits

    def _decode(
        self,
        live: _Live,
        logits: torch.Tensor,
        max_tokens: int,
        temperature: float,
        top_k: int | None,
        generators: list[torch.Generator],
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Columns of (ids, forced) from the first logits [B, V] on; stopped rows leave the batch when half of it has."""
        rows = [_Row(self.tool, self.stop_ids) for _ in generators]
        batch = list(range(len(rows)))  # which row is at each place of the batch
        for left in range(max_tokens - 1, -1, -1):
            sampled = sample(logits, temperature, top_k, [generators[row] for row in batch]).tolist()
            ids, forced = [FINISHED] * len(rows), [0] * len(rows)
            for row, token in zip(batch, sampled, strict=True):
                if not rows[row].stopped:
                    ids[row], forced[row] = rows[row].advance(token)
            yield ids, forced
            places = [place for place, row in enumerate(batch) if not rows[row].stopped]
            if not places or not left:
                return
            if 2 * len(places) <= len(batch):
                live.keep(places)
                batch = [batch[place] for place in places]
            fed = [self.tokenizer.bos_id if rows[row].stopped else ids[row] for row in batch]
            logits = self._forward(torch.tensor(fed)[:, None], live)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, live: _Live, last: torch.Tensor | None = None) -> torch.Tensor:
        """Feed ids [B, T] into the cache; logits [B, V] at the last position, or at position last[b] of each row.

        The vocabulary is multiplied for one position per row, whatever T is.
        """
        model, kv = self.model, live.kv
        ids = ids.to(kv.keys.device)
        tokens = ids.shape[1]
        mask = None
        if live.lengths is None:
            rotary = model.rotary_table.slice(kv.length, tokens, ids.device)
        else:
            slots = torch.arange(kv.length + tokens, device=ids.device)
            gap = (slots >= live.lengths[:, None]) & (slots < live.padded)  # [B, slots]
            mask = ~gap[:, None, None, :]  # [B, 1, 1, slots]
            positions = live.lengths[:, None] + (kv.length - live.padded)  # [B, 1]
            rotary = rotary_at(model, positions, kv.length + tokens)
        rotary = rotary.to(model.compute_dtype)  # once, not in every layer
        hidden = model.trunk(model.embed(ids), rotary, cache=kv, mask=mask)  # [B, T, D]
        at = hidden[:, -1] if last is None else hidden[torch.arange(len(hidden)), last.to(ids.device)]
        return model.head(at)


def rotary_at(model: GPT, positions: torch.Tensor, limit: int) -> Rotary:
    """cos and sin [B, L, 1, K/2] for positions [B, L] int64, all below `limit` (known here, so no GPU is waited for)."""
    table = model.rotary_table.slice(0, limit, positions.device)
    return Rotary(table.cos[0][positions], table.sin[0][positions])


@torch.inference_mode()
def naive_generate(
    model: GPT,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 42,
) -> list[int]:
    """The oracle: recompute everything for every token, no cache, no tools, no stopping. New ids of one row."""
    generators = row_generators(seed, 1)
    ids = torch.tensor([list(prompt)], device=model.device)
    for _ in range(max_tokens):
        ids = torch.cat([ids, sample(model(ids)[:, -1], temperature, top_k, generators)[:, None]], dim=1)
    return ids[0, len(prompt) :].tolist()


def _collect(
    prompts: Sequence[Sequence[int]], columns: Iterator[tuple[list[int], list[int]]], stop_ids: frozenset[int]
) -> list[Generation]:
    """Put columns together to rows; stop ids are left out."""
    rows = [list(prompt) for prompt in prompts]
    masks = [[0] * len(prompt) for prompt in prompts]
    stopped = [False] * len(prompts)
    for ids, forced in columns:
        for row, (token, is_forced) in enumerate(zip(ids, forced, strict=True)):
            if token in stop_ids:
                stopped[row] = True
            elif token != FINISHED:
                rows[row].append(token)
                masks[row].append(1 - is_forced)
    return [
        Generation(ids, mask, len(prompt), stop)
        for ids, mask, prompt, stop in zip(rows, masks, prompts, stopped, strict=True)
    ]
