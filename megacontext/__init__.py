"""MegaContext: small LLMs whose context is virtual. The public API; importing it does no work.

import megacontext as mc
model, tokenizer = mc.load(path)

with mc.Session(model, tokenizer, budget=512, path="sessions/ada") as session:
    session.append(text)
    for token in session.generate(max_tokens=64): ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacontext.api import load, save_nanochat
    from megacontext.inference.session import Session
    from megacontext.inference.session_host import SessionHost

__all__ = ["Session", "SessionHost", "load", "save_nanochat"]

_HOME = {
    "Session": "inference.session", "SessionHost": "inference.session_host", "load": "api", "save_nanochat": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package stays free."""
    if name in _HOME:
        return getattr(import_module(f"megacontext.{_HOME[name]}"), name)
    raise AttributeError(f"module 'megacontext' has no attribute {name!r}")
