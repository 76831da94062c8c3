"""Each help text stands alone: a stranger reads one flag, not the flag before it."""

from __future__ import annotations

import re

import pytest

from jobs.runtime.run_settings import FLAGS

LEANS = re.compile(r"^(of|in that|this|that|these|those|it|its)\b|\bthe other\b|\bin that\b", re.IGNORECASE)


@pytest.mark.parametrize("name", FLAGS)
def test_no_help_text_leans_on_another(name: str) -> None:
    text = FLAGS[name][1].metadata["help"]
    assert not LEANS.search(text)
    assert len(text) > 10


def test_what_leans_is_found() -> None:
    for text in (
        "of its Bradley-Terry term; lower is sharper",
        "in that loss: weight of the scores",
        "above by this and the other",
    ):
        assert LEANS.search(text)
