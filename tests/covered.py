"""A plugin of pytest that measures which lines of the sources run: python -m pytest -p tests.covered …

What a test does again and again is measured once, with its first parameters and the first examples that hypothesis draws:
before Python 3.12 to measure all of it makes the suite a third slower. Processes that tests start are not measured.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = "MC_COVERAGE_FILE"  # variable that names the data files, without their suffix
PARAMETERS, EXAMPLES = 1, 5

if sys.version_info >= (3, 12):
    os.environ.setdefault("COVERAGE_CORE", "sysmon")  # costs next to nothing
_measured = coverage.Coverage(
    data_file=os.environ.get(FILE, ".coverage"),
    data_suffix=True,
    config_file=False,
    source=[str(ROOT / folder) for folder in ("megacontext", "jobs", "serve", "tune") if (ROOT / folder).is_dir()],
)
_runs: Counter[str] = Counter()
_on = False


def _measure(on: bool) -> None:
    global _on
    if on != _on:
        (_measured.start if on else _measured.stop)()
        _on = on


_measure(True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    test = item.nodeid.split("[")[0]
    _runs[test] += 1
    drawn = getattr(getattr(item, "obj", None), "hypothesis", None)
    if drawn is not None and _runs[test] == 1:
        drawn.inner_test = _first_examples(drawn.inner_test)
    _measure(_runs[test] <= PARAMETERS)
    try:
        return (yield)
    finally:
        _measure(True)


def _first_examples(inner: Callable[..., Any]) -> Callable[..., Any]:
    """A hypothesis test that is measured for its first examples."""
    left = EXAMPLES

    @functools.wraps(inner)
    def test(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            _measure(False)
        return inner(*arguments, **named)

    return test


def pytest_unconfigure() -> None:
    _measure(False)
    _measured.save()
