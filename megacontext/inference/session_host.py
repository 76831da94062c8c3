"""What all sessions of one model share."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch

from megacontext import arguments
from megacontext.context.gist_function import GistFunction, check_block_size, mean_of_children
from megacontext.inference.session_state import model_digest, weights_digest
from megacontext.inference.tool_turn import stop_ids
from megacontext.model.norm import rms_norm

if TYPE_CHECKING:
    from megacontext.data.tokenizer import Tokenizer
    from megacontext.model.gpt import GPT


class EmbeddingMeans:
    """The gists of a model without a memory: means of its normed token embeddings, read from the model's own table.

    A `GistFunction`. Raises UserError for a block size below 2.
    """

    leaf_context_blocks = 1

    def __init__(self, model: GPT, block_size: int) -> None:
        check_block_size(block_size)
        self.block_size, self.record_width = block_size, model.config.n_embd
        self._weight = cast(torch.nn.Embedding, model.transformer["wte"]).weight.detach()

    @cached_property
    def digest(self) -> str:
        """Identity of the embeddings."""
        return weights_digest("mean of embeddings", [("wte", self._weight)])

    def leaf(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, m, r] int64 -> [n, m, D]."""
        used, rows = torch.unique(ids.to(self._weight.device), return_inverse=True)
        table = rms_norm(self._weight[used].float())  # of the tokens that occur: a copy of all is 168 MB at depth 20
        means = torch.nn.functional.embedding_bag(rows.flatten(0, -2), table, mode="mean")
        return means.view(*ids.shape[:-1], -1)

    def inner(self, records: torch.Tensor, level: int) -> torch.Tensor:
        """[n, r, D] -> [n, D]."""
        return mean_of_children(records)


class SessionHost:
    """What the sessions of one model share and need not each make: its identity and its gist functions.

        host = mc.SessionHost(model, tokenizer)
        sessions = [mc.Session(model, tokenizer, path=path, host=host) for path in paths]

    The weights of the model must not change while a host is in use. Raises UserError for a tokenizer of another
    vocabulary than the model's.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        arguments.same_vocabulary(model, tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = stop_ids(tokenizer)
        self._means: dict[int, EmbeddingMeans] = {}

    @cached_property
    def digest(self) -> str:
        """Identity of the model's weights; one pass over them, when it is first asked for."""
        return model_digest(self.model)

    def gist(self, block_size: int) -> GistFunction:
        """The model's memory; `EmbeddingMeans` of blocks of `block_size` for a model without one."""
        if self.model.memory is not None:
            return self.model.memory
        return self._means.setdefault(block_size, EmbeddingMeans(self.model, block_size))
