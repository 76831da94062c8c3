"""Keys and values of what has been decoded, preallocated, so that a new token costs one row and not a recompute."""

from __future__ import annotations

import torch

from megacontext.errors import UserError


class KVCache:
    """Per layer: keys and values [B, H, capacity, K] (H key/value heads), of which `length` positions are filled.

    When it is full it doubles its capacity, up to `max_capacity` positions if that is given; beyond, it raises.
    """

    def __init__(
        self,
        batch: int,
        n_layer: int,
        n_kv_head: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_capacity: int | None = None,
    ) -> None:
        shape = (n_layer, batch, n_kv_head, max(1, capacity), head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.max_capacity = max_capacity
        self.last_ids: torch.Tensor | None = None  # [B] newest ids, for models whose embedding looks one token back

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [B, H, T, K] behind the filled part; returns all keys and values [B, H, length + T, K] as views.

        `length` moves only with `advance`, once all layers have written. Raises UserError beyond `max_capacity`, and
        when the batch differs.
        """
        if k.shape[0] != self.batch:
            raise UserError(
                f"KV cache holds {self.batch} rows, got {k.shape[0]}; use expand() or a cache of that batch."
            )
        end = self.length + k.shape[2]
        if end > self.capacity:
            self.reserve(end)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def previous_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The id before each of the new ids [B, T], -1 where there is none; remembers the last of them."""
        last = self.last_ids if self.last_ids is not None and self.length else ids.new_full((ids.shape[0],), -1)
        self.last_ids = ids[:, -1]
        return torch.cat([last[:, None], ids[:, :-1]], 1)

    def advance(self, tokens: int) -> None:
        """Count `tokens` positions, written in every layer, as filled."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises UserError when fewer are filled."""
        if not 0 <= length <= self.length:
            raise UserError(f"cannot truncate a KV cache of {self.length} positions to {length}.")
        self.length = length

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions in all, at least doubling. Raises UserError beyond `max_capacity`."""
        if self.max_capacity is not None and capacity > self.max_capacity:
            raise UserError(
                f"the context needs {capacity} positions and the KV cache may hold {self.max_capacity}; "
                "shorten the prompt or raise the limit."
            )
        if capacity <= self.capacity:
            return
        capacity = max(capacity, min(2 * self.capacity, self.max_capacity or 2 * self.capacity))
        self.keys, self.values = (self._grown(old, capacity) for old in (self.keys, self.values))

    def expand(self, batch: int) -> KVCache:
        """A cache of `batch` rows that all start as copies of this one's single row (a shared prompt).

        Raises UserError when this cache has more than one row.
        """
        if self.batch != 1:
            raise UserError(f"only a KV cache of one row can be expanded; this one has {self.batch}.")
        n_layer, _, n_kv_head, capacity, head_dim = self.keys.shape
        copy = KVCache(
            batch, n_layer, n_kv_head, head_dim, capacity, self.keys.dtype, self.keys.device, self.max_capacity
        )
        copy.keys[:, :, :, : self.length] = self.keys[:, :, :, : self.length]
        copy.values[:, :, :, : self.length] = self.values[:, :, :, : self.length]
        copy.length = self.length
        copy.last_ids = None if self.last_ids is None else self.last_ids.expand(batch)
        return copy

    def _grown(self, old: torch.Tensor, capacity: int) -> torch.Tensor:
        n_layer, batch, n_kv_head, _, head_dim = old.shape
        new = old.new_empty((n_layer, batch, n_kv_head, capacity, head_dim))
        new[:, :, :, : old.shape[3]] = old
        return new
