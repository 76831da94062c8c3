"""What a session refuses, and what its options are when nothing is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_programs import BLOCK, OPTIONS, PLAIN, VOCAB, make_model, make_tokenizer, random_ids

import megacontext as mc
from jobs import bench_session
from megacontext.context.invariants import check_working_context
from megacontext.context.working_context import smallest_budget
from megacontext.errors import DataError, UserError
from megacontext.inference.session_options import most_coarsest_entries
from megacontext.model.gpt import GPT

PLAIN_MODEL, MEMORY_MODEL = make_model(False), make_model(True)


def open_session(model: GPT, **options: Any) -> mc.Session:
    return mc.Session(model, make_tokenizer(), **{**(OPTIONS if model.memory is not None else PLAIN), **options})


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 700), st.integers(2, 7), st.integers(0, 20), st.sampled_from([None, 0, 1, 2]))
def test_room_is_that_of_the_worst_history_so_far(tokens: int, r: int, tail: int, max_lod: int | None) -> None:
    oracle = max(smallest_budget(t, r, tail, max_lod) for t in range(tokens + 1))
    assert most_coarsest_entries(tokens, r, tail, max_lod) == oracle


def test_a_budget_too_small_for_the_history_loses_nothing() -> None:
    session = open_session(PLAIN_MODEL, budget=20, recent_tokens=12, refocus_interval=100)
    session.append(random_ids(30))
    entries = session.entries
    with pytest.raises(
        UserError, match=r"a budget of 20 entries cannot hold a history of 5030 tokens.*budget of 3\d or"
    ):
        session.append(random_ids(5000))
    assert (session.entries, session.tokens) == (entries, 30)
    with pytest.raises(UserError, match="budget of 20 entries cannot hold"):
        list(session.generate(500, stop=()))
    assert 30 < session.tokens == session.tree.tokens
    check_working_context(session.context, budget=20, tail=12, tokens=session.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(budget=8, recent_tokens=8), "leaves no room in a budget of 8"),
        (dict(recent_tokens=0), "newest token has to be raw"),
        (dict(refocus_interval=0), "refocus_interval is 0"),
        (dict(block_size=1), "block_size is 1"),
        (dict(budget=0), "budget is 0 entries"),
        (dict(dtype="int8"), "dtype 'int8'"),
        (dict(allocator_type="lucky"), "choose one of greedy"),
        (dict(bugdet=9), "a session has no option bugdet; there are budget, recent_tokens"),
        (dict(path="s3://bucket/session"), "lives in a local folder"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_session(PLAIN_MODEL, **options)


def test_block_size_is_the_memorys() -> None:
    with pytest.raises(UserError, match="block_size 8 is not that of the model's memory, 4"):
        open_session(MEMORY_MODEL, block_size=8)
    assert open_session(MEMORY_MODEL, block_size=4).options.block_size == 4


def test_defaults_come_from_the_model() -> None:
    model = make_model(
        True, seq=512, mc_infer_refocus_interval=7, mc_eval_soft_max_length=300, allocator_recent_tokens=5
    )
    options = mc.Session(model, make_tokenizer()).options
    assert (options.budget, options.recent_tokens, options.refocus_interval, options.block_size) == (300, 5, 7, BLOCK)
    plain = mc.Session(make_model(False, seq=512), make_tokenizer()).options
    assert (plain.budget, plain.recent_tokens, plain.refocus_interval, plain.block_size) == (512, 64, 32, 32)


def test_a_budget_beyond_training_is_said(caplog: pytest.LogCaptureFixture) -> None:
    open_session(PLAIN_MODEL, budget=65)
    assert "65 entries is beyond the 64" in caplog.text


@pytest.mark.parametrize("ids", [[3, VOCAB], [-1], np.array([[1, 2]]), [1.5], b"abc"])
def test_ids_that_cannot_be(ids: Any) -> None:
    session = open_session(PLAIN_MODEL)
    session.append("the cat")
    held = session.tokens
    with pytest.raises(DataError):
        session.append(ids)
    assert session.tokens == session.tree.tokens == held
    assert session.append([]) == held
    assert session.append("") == held


def test_calls_that_cannot_be() -> None:
    session = open_session(PLAIN_MODEL)
    with pytest.raises(UserError, match="max_tokens is -1"):
        session.generate(-1)
    with pytest.raises(UserError, match="temperature is -1"):
        session.generate(1, temperature=-1.0)
    assert session.refocus().edits == 0  # an empty history has nothing to edit
    tokens = session.generate(3, stop=())
    next(tokens)
    session.close()
    session.close()
    for call in (lambda: session.append("x"), lambda: session.generate(1), session.refocus, lambda: next(tokens)):
        with pytest.raises(UserError, match="session is closed"):
            call()
    assert session.tokens == 2  # what it was can still be read
    with open_session(PLAIN_MODEL) as session:
        session.append("the cat")
    with pytest.raises(UserError, match="session is closed"):
        session.append("sat")


def test_the_benchmark_measures_every_history() -> None:
    sizes = ["--histories", "128", "1024", "--budget", "96", "--tail", "16", "--tokens", "16", "--turn", "8"]
    result = bench_session.main([*sizes, "--depth", "1", "--width", "64"])
    assert [row["history"] for row in result["rows"]] == [128, 1024]
    assert all(row["ms_per_token"] > 0 and row["entries"] <= 96 for row in result["rows"])
    assert result["last_over_first"] > 0
