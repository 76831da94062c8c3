"""Allocator settings by the short names of focus options."""

from __future__ import annotations

from typing import Any

from megacontext.context.allocator import AllocatorConfig
from megacontext.memory_config import FocusConfig


def allocator_config(
    budget: int, recent_tokens: int, max_lod: int | None = None, seed: int = 0, **options: Any
) -> AllocatorConfig:
    """Few edits a refocus, unless told: what one does is easy to follow."""
    focus = FocusConfig.of(**{"max_replacements": 4, "iterations": 2, **options})
    return AllocatorConfig(budget=budget, recent_tokens=recent_tokens, max_lod=max_lod, seed=seed, focus=focus)
