"""MegaContext: small LLMs whose context is virtual. The public API; importing it does no work.

import megacontext as mc
model, tokenizer = mc.load(path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacontext.api import load, save_nanochat

__all__ = ["load", "save_nanochat"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays free."""
    if name in __all__:
        from megacontext import api

        return getattr(api, name)
    raise AttributeError(f"module 'megacontext' has no attribute {name!r}")
