"""A session driven from outside, token by token, says what `generate` says; what sessions of one model share is made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from session_programs import OPTIONS, PLAIN, ids_of, make_model, make_tokenizer, one_thread, random_ids

import megacontext as mc
from megacontext.errors import DataError, StorageError, UserError
from megacontext.inference import session_host
from megacontext.inference.focus import entry_inputs
from megacontext.model.gpt import GPT

MEMORY_MODEL, PLAIN_MODEL = make_model(True), make_model(False)
GAUSSIAN_MODEL = make_model(True, positional_type="gaussian", seq=32)
MODELS = [PLAIN_MODEL, MEMORY_MODEL, GAUSSIAN_MODEL]
_threads = pytest.fixture(scope="module", autouse=True)(one_thread)


def open_session(model: GPT, **options: Any) -> mc.Session:
    return mc.Session(model, make_tokenizer(), **{**(OPTIONS if model.memory is not None else PLAIN), **options})


class Slot:
    """The least that an engine needs to drive a session: a cache of its own, filled two entries at a time."""

    def __init__(self, session: mc.Session) -> None:
        self.session = session
        self.cache = session.model.make_cache(1, 64, session.options.budget, entries=True)
        session.park()

    @torch.inference_mode()
    def token(self) -> int:
        model, step = self.session.model, self.session.next_input()
        assert step.first <= self.cache.length
        self.cache.truncate(step.first)
        x, rotary = entry_inputs(model, self.session.tree, step.context, step.first, step.end)
        for at in range(0, step.entries, 2):
            hidden = model.trunk(x[:, at : at + 2], rotary.span(at, at + 2), cache=self.cache)
        token = int(model.head(hidden[0, -1]).argmax())
        self.session.accept(token)
        return token


PROMPTS = [(random_ids(170, 1), random_ids(3, 2)), (random_ids(61, 3), random_ids(90, 4))]
COUNTS = (17, 25)


def generated(model: GPT, number: int) -> tuple[list[int], list[tuple[int, int]]]:
    session = open_session(model)
    for prompt, count in zip(PROMPTS[number], COUNTS, strict=True):
        session.append(prompt)
        list(session.generate(count, stop=()))
    return ids_of(session), session.entries


@pytest.mark.parametrize("model", MODELS)
def test_an_engine_that_drives_two_sessions_in_turn_says_what_generate_says(model: GPT) -> None:
    sessions = [open_session(model), open_session(model)]
    slots = [Slot(session) for session in sessions]
    for turn, count in enumerate(COUNTS):
        for session, prompts in zip(sessions, PROMPTS, strict=True):
            session.append(prompts[turn])
        for _ in range(count):
            for slot in slots:
                slot.token()
    for number, session in enumerate(sessions):
        assert (ids_of(session), session.entries) == generated(model, number)
        assert session.stats.generated == sum(COUNTS)
        assert session.stats.refocuses
        assert session.stats.entries_recomputed <= session.options.budget * session.stats.refocuses


@pytest.mark.parametrize("model", MODELS)
def test_parking_changes_no_token_and_costs_at_most_the_budget(model: GPT) -> None:
    session = open_session(model)
    session.append(PROMPTS[0][0])
    kept = list(session.generate(COUNTS[0], stop=()))
    assert session._cache._kv is not None
    session.park()
    assert session._cache._kv is None
    before, refocuses = session.stats.entries_computed, session.stats.refocuses
    assert not session.refocus_due
    kept += list(session.generate(1, stop=()))
    assert session.stats.refocuses == refocuses
    assert session.stats.entries_computed - before == len(session.entries) - 1 <= session.options.budget
    session.append(PROMPTS[0][1])
    for _ in range(COUNTS[1]):
        session.park()
        kept += list(session.generate(1, stop=()))
    without = open_session(model)
    without.append(PROMPTS[0][0])
    said = list(without.generate(COUNTS[0] + 1, stop=()))
    without.append(PROMPTS[0][1])
    assert kept == said + list(without.generate(COUNTS[1], stop=()))


def test_generate_goes_on_where_an_engine_stopped_and_an_engine_where_generate_stopped() -> None:
    session = open_session(MEMORY_MODEL)
    session.append(PROMPTS[0][0])
    list(session.generate(5, stop=()))
    slot = Slot(session)
    for _ in range(7):
        slot.token()
    list(session.generate(COUNTS[0] - 12, stop=()))
    session.append(PROMPTS[0][1])
    slot = Slot(session)
    for _ in range(COUNTS[1]):
        slot.token()
    assert (ids_of(session), session.entries) == generated(MEMORY_MODEL, 0)


def test_next_input_repeats_itself_and_accept_takes_only_what_follows_it() -> None:
    session = open_session(MEMORY_MODEL)
    with pytest.raises(UserError, match="call next_input"):
        session.accept(1)
    session.append(PROMPTS[0][0])
    assert session.refocus_due
    step = session.next_input()
    assert not session.refocus_due
    assert session.next_input() == step
    assert (step.context, step.end) == (session.context, session.tokens)
    assert (step.first, step.entries) == (0, len(session.context))
    session.append([5])
    with pytest.raises(UserError, match="call next_input"):
        session.accept(1)
    session.next_input()
    with pytest.raises(DataError, match="outside the vocabulary"):
        session.accept(10_000)
    session.accept(7)
    with pytest.raises(UserError, match="call next_input"):
        session.accept(7)
    assert ids_of(session)[-2:] == [5, 7]
    assert session.next_input().entries == 1
    session.close()
    with pytest.raises(UserError, match="closed"):
        session.next_input()


def test_a_token_that_could_not_be_stored_may_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(MEMORY_MODEL, path=tmp_path / "s")
    session.append(PROMPTS[0][0])
    session.next_input()
    tokens, append = session.tokens, session.tree.append

    def full(ids: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(session.tree, "append", full)
    with pytest.raises(StorageError):
        session.accept(9)
    monkeypatch.setattr(session.tree, "append", append)
    assert session.tokens == tokens
    session.accept(9)
    assert ids_of(session)[-1] == 9
    session.close()


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    real = session_host.model_digest

    def counted(model: GPT) -> str:
        made.append(real(model))
        return made[-1]

    monkeypatch.setattr(session_host, "model_digest", counted)
    return made


@pytest.mark.parametrize("model", [PLAIN_MODEL, MEMORY_MODEL])
def test_sessions_of_a_host_share_what_their_model_decides(model: GPT, tmp_path: Path, digests: list[str]) -> None:
    host = mc.SessionHost(model, make_tokenizer())
    for name in "abab":
        with open_session(model, path=tmp_path / name, host=host) as session:
            session.append(PROMPTS[0][0])
            list(session.generate(3))
            assert session.tree.gist is host.gist(session.options.block_size)
    assert len(digests) == 1
    with open_session(model, path=tmp_path / "a") as session:
        assert session.tokens > 2 * len(PROMPTS[0][0])


def test_a_model_without_a_memory_is_not_copied() -> None:
    """Gists are read from the embedding table itself, and are means of its normed rows."""
    gist = mc.SessionHost(PLAIN_MODEL, make_tokenizer()).gist(4)
    table: Any = PLAIN_MODEL.transformer["wte"].weight
    held = [value for value in vars(gist).values() if isinstance(value, torch.Tensor)]
    assert [value.data_ptr() for value in held] == [table.data_ptr()]
    ids = torch.from_numpy(np.asarray(random_ids(24)).reshape(2, 3, 4))
    normed = torch.nn.functional.rms_norm(table.detach().float(), (table.shape[1],))
    assert torch.allclose(gist.leaf(ids), normed[ids].mean(-2), atol=1e-6)


def test_a_host_is_of_one_model_and_one_tokenizer() -> None:
    host = mc.SessionHost(MEMORY_MODEL, make_tokenizer())
    with pytest.raises(UserError, match="host is not of this model"):
        open_session(PLAIN_MODEL, host=host)
    with pytest.raises(UserError, match="host is not of this model"):
        open_session(PLAIN_MODEL, host="a host")
    with pytest.raises(UserError, match="give a GPT and its Tokenizer"):
        mc.SessionHost(make_tokenizer(), MEMORY_MODEL)  # type: ignore[arg-type]
