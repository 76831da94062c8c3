"""Arguments of the public API, checked in one way: what is given, as plain Python; or a UserError that names it.

`name` is the argument's name in the message. numpy's numbers count as numbers. True and False do not.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from megacontext.errors import DataError, NonFiniteError, UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

MAX_SEED = (1 << 64) - 1


def whole_number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    remedy: str = "",
    *,
    above: float | None = None,
    off: float | None = None,
) -> int:
    """An int from `low` to `high`, larger than `above`, or `off`. Raises UserError for anything else, 2.0 and "2" included."""
    right = isinstance(value, Integral) and not isinstance(value, bool)
    if not right or not _within(value, low, high, above, off):
        raise UserError(_wrong(name, value, "a whole number", low, high, remedy, above, off))
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(
    name: str,
    value: object,
    low: float | None = None,
    high: float | None = None,
    remedy: str = "",
    *,
    above: float | None = None,
    off: float | None = None,
) -> float:
    """A finite float from `low` to `high`, larger than `above`, or `off`. Raises UserError for anything else, NaN included."""
    try:
        found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or not _within(found, low, high, above, off):
        raise UserError(_wrong(name, value, "a finite number", low, high, remedy, above, off))
    return found


def truth(name: str, value: object) -> bool:
    """True or False; 1 and 0 count as them. Raises UserError for anything else."""
    if isinstance(value, (bool, Integral)) and value in (0, 1):
        return bool(value)
    raise UserError(_wrong(name, value, "True or False"))


def text(name: str, value: object, remedy: str = "") -> str:
    """A str. Raises UserError for anything else."""
    if not isinstance(value, str):
        raise UserError(_wrong(name, value, "a text", remedy=remedy))
    return value


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """One of the names in `choices`. Raises UserError for anything else."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} {_shown(value)} is unknown; choose one of {', '.join(known)}.")
    return value


def path(name: str, value: object) -> str:
    """A path or URI, given as a str or an `os.PathLike`. Raises UserError for anything else, and for an empty one."""
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str) or not found:
        raise UserError(_wrong(name, value, "a path, as a text or a pathlib.Path"))
    return found


def items(name: str, value: object, what: str) -> list[Any]:
    """What a collection holds, in its order. Raises UserError for a single value, a text or a mapping."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise UserError(_wrong(name, value, f"a list of {what}"))
    return list(value)


def array_of_ids(name: str, value: object) -> npt.NDArray[np.integer[Any]]:
    """Ids as an array [n] of whole numbers: of a sequence, an iterator, an array or a tensor, of any device.

    Raises DataError for anything else: a ragged or nested list, floats, a text.
    """
    import numpy as np

    given: Any = value
    if hasattr(given, "detach"):  # a tensor
        given = given.detach().cpu()
    elif isinstance(given, Iterable) and not isinstance(given, (Sequence, AbstractSet, Mapping, np.ndarray)):
        given = list(given)
    try:
        found = np.asarray(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(_no_ids(name, f"{_shown(value)} ({error})")) from error
    if found.ndim == 1 and not found.size:
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(_no_ids(name, f"{found.dtype} {list(found.shape)}"))
    return found


def token_ids(name: str, value: object, vocab_size: int) -> npt.NDArray[np.integer[Any]]:
    """Ids as an array [n], each from 0 to `vocab_size` - 1. Raises DataError for anything else."""
    found = array_of_ids(name, value)
    if found.size and not (int(found.min()) >= 0 and int(found.max()) < vocab_size):
        at = int(((found < 0) | (found >= vocab_size)).argmax())
        raise DataError(
            f"token id {int(found[at])} at position {at} of {name} is outside the vocabulary of {vocab_size} tokens; "
            f"ids are 0 to {vocab_size - 1}. Encode the text with this model's tokenizer."
        )
    return found


def same_vocabulary(model: object, tokenizer: object) -> None:
    """Raise UserError unless these are a model and a tokenizer with as many tokens as the model was made for."""
    of_model = getattr(getattr(model, "config", None), "vocab_size", None)
    of_tokenizer = getattr(tokenizer, "vocab_size", None)
    if of_model is None or of_tokenizer is None:
        raise UserError(
            f"model is a {type(model).__name__} and tokenizer is a {type(tokenizer).__name__}; give a GPT and its "
            "Tokenizer, in this order, as mc.load returns them."
        )
    if of_model != of_tokenizer:
        raise UserError(
            f"the tokenizer has {of_tokenizer} tokens, the model was made for {of_model}; use the tokenizer that mc.load "
            "returns with this model."
        )


def plain_fields(section: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain Python, each checked by its annotated type. Raises UserError for a wrong type."""
    return {field.name: of_type(field.name, getattr(section, field.name), str(field.type)) for field in fields(section)}


def of_type(name: str, value: Any, annotation: str) -> Any:
    """A value of the type that an annotation names: bool, int, float or str, with `| None`; others stay unchecked."""
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    checked: dict[str, Callable[[str, object], Any]] = {
        "bool": truth, "int": whole_number, "float": number, "str": text,
    }  # fmt: skip
    return checked[kind](name, value) if kind in checked else value


def finite(what: str, *values: torch.Tensor) -> None:
    """Raise NonFiniteError when one of the values that a model computed is NaN or infinite."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise NonFiniteError(
            f"{what} is not a finite number, so the model can choose nothing. Its weights hold NaN or infinity, or "
            "overflow in this dtype: load an earlier checkpoint, or use dtype fp32."
        )


def _within(value: Any, low: float | None, high: float | None, above: float | None, off: float | None) -> bool:
    if off is not None and value == off:
        return True
    return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


def _wrong(
    name: str,
    value: object,
    wanted: str,
    low: float | None = None,
    high: float | None = None,
    remedy: str = "",
    above: float | None = None,
    off: float | None = None,
) -> str:
    if above is not None:
        limits = f" above {above}" + (f" and at most {high}" if high is not None else "")
    elif low is not None and high is not None:
        limits = f" from {low} to {high}"
    else:
        limits = f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else ""
    limits += f", or {off}" if off is not None else ""
    return f"{name} is {_shown(value)}; it must be {wanted}{limits}." + (f" {remedy}" if remedy else "")


def _no_ids(name: str, found: str) -> str:
    return (
        f"{name} must be whole numbers in one dimension, not {found}. Give a flat list, array or tensor of token ids, "
        "as tokenizer.encode makes it."
    )


def _shown(value: object) -> str:
    """A value as it was given, short."""
    return reprlib.repr(value)
