"""Sessions against a reference that rebuilds everything for every token; budget, recomputation, stops, bad input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from session_programs import (
    BLOCK,
    OPTIONS,
    PLAIN,
    VOCAB,
    Call,
    ids_of,
    make_model,
    make_tokenizer,
    one_thread,
    play,
    random_ids,
)

import megacontext as mc
from megacontext.context.allocator import FocusAllocator
from megacontext.context.focus_report import FocusReport
from megacontext.context.invariants import check_working_context
from megacontext.context.tree import Tree
from megacontext.context.working_context import WorkingContext, smallest_budget
from megacontext.inference.engine import Engine, naive_generate
from megacontext.inference.entry_cache import NextInput
from megacontext.inference.focus import LensScorer
from megacontext.inference.session_host import EmbeddingMeans, SessionHost
from megacontext.inference.session_options import SessionOptions
from megacontext.model.gpt import GPT

PLAIN_MODEL, MEMORY_MODEL = make_model(False), make_model(True)
GAUSSIAN_MODEL = make_model(True, positional_type="gaussian", seq=32)
_threads = pytest.fixture(scope="module", autouse=True)(one_thread)


def open_session(model: GPT, **options: Any) -> mc.Session:
    base = OPTIONS if model.memory is not None else PLAIN
    return mc.Session(model, make_tokenizer(), **{**base, **options})


def full_logits(model: GPT, tree: Tree, context: WorkingContext, end: int) -> torch.Tensor:
    """Logits [V] after a context: entry by entry, without a cache."""
    ids, previous, lods, content, positions, sigmas = [], [], [], [], [], []
    for lod, index in context.entries:
        span = BLOCK**lod
        positions.append(index * span + (span - 1) / 2)
        sigmas.append(span / np.sqrt(12) if lod else 0.0)
        lods.append(lod)
        ids.append(int(tree.ids(index, index + 1)) if lod == 0 else 0)
        previous.append(int(tree.ids(index - 1, index)) if lod == 0 and index else -1)
        width = model.config.n_embd
        content.append(tree.records(lod, [index])[0, :width] if lod else torch.zeros(width))
    with torch.no_grad():
        x = model.embed_entries(
            torch.tensor([ids]), torch.tensor([previous]), torch.stack(content)[None], torch.tensor([lods])
        )
        at = torch.tensor([positions], dtype=torch.float64), torch.tensor([sigmas], dtype=torch.float64)
        rotary = model.entry_rotary(*at, torch.arange(len(ids))[None], torch.tensor([end]))
        return model.head(model.trunk(x, rotary)[0, -1])


class Slow:
    """The reference: its only state is the list of calls, and every token replays them all on a new tree."""

    def __init__(self, model: GPT, options: SessionOptions) -> None:
        self.model, self.options = model, options
        self.calls: list[tuple[str, list[int]]] = []

    def generate(self, count: int) -> None:
        for _ in range(count):
            tree, context, end = self.replay([*self.calls, ("due", [])])
            token = int(full_logits(self.model, tree, context, end).argmax())
            self.calls.append(("token", [token]))

    def replay(self, calls: list[tuple[str, list[int]]]) -> tuple[Tree, WorkingContext, int]:
        """Tree, context and where the last refocus was, after some calls."""
        options, r = self.options, self.options.block_size
        ids: list[int] = []
        context, allocator = WorkingContext.all_raw(0, r), FocusAllocator(options)
        since, stale, end = 0, False, 0
        for call, new in calls:
            due = stale or since == options.refocus_interval or len(context) == options.budget
            if call == "refocus" or (call in ("token", "due") and due):
                needed = max(smallest_budget(t, r, options.recent_tokens) for t in range(len(ids) + 1))
                room = max(1, min(options.refocus_interval, options.budget - needed))
                context, _ = allocator.refocus(context, self.scorer(self.tree(ids)), room)
                since, stale, end = 0, False, len(ids)
            ids += new
            if call == "append":
                context, stale = allocator.extend(context, len(new)), True
            elif call == "token":
                context, since = context.append(1), since + 1
        return self.tree(ids), context, end

    def tree(self, ids: list[int]) -> Tree:
        tree = Tree(SessionHost(self.model, make_tokenizer()).gist(self.options.block_size))
        tree.append(ids)
        return tree

    def scorer(self, tree: Tree) -> Any:
        if self.model.memory is None:
            return lambda context: np.zeros(len(context))
        scorer = LensScorer(self.model, tree, self.options.recent_tokens)
        return lambda context: (
            scorer(context) if len(context) < tree.tokens or self.full(context) else np.zeros(len(context))
        )

    def full(self, context: WorkingContext) -> bool:
        """Nothing is scored while everything is raw and there is room for an interval."""
        return len(context) > self.options.budget - self.options.refocus_interval


REFERENCE: list[Call] = [
    ("append", 60),
    ("generate", 7),
    ("append", 2),
    ("generate", 3),
    ("append", 130),
    ("generate", 8),
]


@pytest.mark.parametrize(
    "settings_of_model",
    [
        dict(memory=False),
        dict(memory=True),
        dict(memory=True, token_shift=True, positional_type="gaussian", seed=2),
        dict(memory=True, positional_type="gaussian_alibi", seed=4),
        dict(memory=True, positional_type="simple", gistnet_type="mean", routing_slots=0, seed=3),
    ],
)
def test_greedy_equals_rebuilding_everything_at_every_token(settings_of_model: dict[str, Any]) -> None:
    model = make_model(**settings_of_model)
    session = open_session(model)
    slow = Slow(model, session.options)
    for number, (call, count) in enumerate(REFERENCE):
        if call == "append":
            ids = random_ids(count, number).tolist()
            session.append(ids)
            slow.calls.append(("append", ids))
        else:
            list(session.generate(count, stop=()))
            slow.generate(count)
        tree, context, _ = slow.replay(slow.calls)
        assert ids_of(session) == tree.ids(0, tree.tokens).tolist()
        assert session.entries == context.entries
    assert session.context.lod.max() >= 2
    assert model.memory is None or sum(report.expands for report in session.stats.reports)


def test_a_history_within_the_budget_is_the_vanilla_model() -> None:
    prompt = random_ids(20).tolist()
    for model in (PLAIN_MODEL, make_model(False, token_shift=True), MEMORY_MODEL):
        session = open_session(model)
        session.append(prompt)
        assert list(session.generate(20, stop=())) == naive_generate(model, prompt, 20)
        sampled = open_session(model)
        sampled.append(torch.tensor(prompt))
        assert list(sampled.generate(20, 0.8, 30, seed=3, stop=())) == naive_generate(model, prompt, 20, 0.8, 30, 3)
        assert session.entries == [(0, i) for i in range(40)]


def test_nanochat_checkpoint_says_what_nanochat_says(shared_data: Path) -> None:
    expected = np.load(shared_data / "nanochat_parity" / "expected.npz")
    model, tokenizer = mc.load(str(shared_data / "nanochat_parity"))
    prompt = expected["ids"][0, :20]
    session = mc.Session(model, tokenizer)
    session.append(prompt)
    columns = Engine(model, tokenizer).generate(prompt.tolist(), max_tokens=30, temperature=0.0)
    assert list(session.generate(30)) == [ids[0] for ids, _ in columns]
    session.append(np.tile(expected["ids"][0], 40))  # far beyond its training length: mean gists
    assert len(list(session.generate(40, stop=()))) == 40
    assert len(session.entries) <= session.options.budget < session.tokens


PROGRAM = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 120)),
        st.tuples(st.just("generate"), st.integers(1, 12)),
        st.tuples(st.just("refocus"), st.just(0)),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=12, deadline=None)
@given(
    PROGRAM, st.sampled_from(["plain", "memory", "gaussian"]), st.integers(30, 60), st.integers(1, 9), st.integers(1, 9)
)
def test_laws_hold_and_the_cache_equals_a_full_recompute(
    program: list[Call], kind: str, budget: int, tail: int, interval: int
) -> None:
    """W1 to W4 after every call, I2 at every token, and the bound on recomputation."""
    model = {"plain": PLAIN_MODEL, "memory": MEMORY_MODEL, "gaussian": GAUSSIAN_MODEL}[kind]
    session = open_session(model, budget=budget, recent_tokens=tail, refocus_interval=interval)
    cached = session._cache.logits

    def checked(step: NextInput) -> torch.Tensor:
        logits = cached(step)
        assert torch.allclose(logits, full_logits(model, session.tree, step.context, step.end), atol=2e-4)
        assert 1 <= step.entries <= budget
        return logits

    session._cache.logits = checked  # type: ignore[method-assign]
    for number, (call, count) in enumerate(program):
        if call == "append":
            session.append(random_ids(count, number))
        elif call == "generate":
            list(session.generate(count, stop=()))
        else:
            session.refocus()
        check_working_context(session.context, budget=budget, tail=tail, tokens=session.tree.tokens)
    stats = session.stats
    assert stats.entries_recomputed <= budget * stats.refocuses
    assert stats.entries_computed - stats.entries_recomputed <= session.tokens


def test_between_refocuses_a_token_costs_one_entry() -> None:
    session = open_session(MEMORY_MODEL)
    session.append(random_ids(500))
    next(session.generate(1))
    for _ in range(3):
        before, refocuses = session.stats.entries_computed, session.stats.refocuses
        list(session.generate(5, stop=()))
        assert session.stats.refocuses == refocuses
        assert session.stats.entries_computed - before == 5
        session.refocus()
        next(session.generate(1, stop=()))


def test_cost_per_token_does_not_grow_with_the_history() -> None:
    """Entries computed, gists made and nodes read per generated token, after 16 thousand and 256 thousand tokens."""
    costs = []
    for tokens in (1 << 14, 1 << 18):
        model = make_model(False)
        session = mc.Session(model, make_tokenizer(), budget=128, block_size=8, refocus_interval=16, recent_tokens=16)
        session.append(random_ids(tokens))
        assert session.stats.entries_computed == 0
        next(session.generate(1, stop=()))
        assert session.stats.entries_computed <= 128
        before, gists = session.stats.entries_computed, sum(session.tree.gist_runs.values())
        list(session.generate(128, stop=()))
        made = sum(session.tree.gist_runs.values()) - gists
        costs.append(((session.stats.entries_computed - before) / 128, made / 128))
        assert session.stats.entries_recomputed <= 128 * session.stats.refocuses
    assert costs[1][0] <= 1.1 * costs[0][0]
    assert costs[0][1] == pytest.approx(costs[1][1], abs=0.02)


def test_a_million_tokens_are_appended_in_batches_and_never_shown_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    leaf = EmbeddingMeans.leaf
    monkeypatch.setattr(EmbeddingMeans, "leaf", lambda self, ids: sizes.append(ids.numel()) or leaf(self, ids))  # type: ignore[func-returns-value]
    model = make_model(False)
    seen: list[int] = []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda x, *rest, **more: seen.append(x.shape[1]) or trunk(x, *rest, **more))  # type: ignore[func-returns-value]
    session = mc.Session(model, make_tokenizer(), budget=256)
    assert session.append(random_ids(1_000_000)) == 1_000_000
    assert max(sizes) <= 1 << 16
    assert seen == []
    list(session.generate(3, stop=()))
    assert len(seen) == 3
    assert seen[0] <= 256
    assert seen[1:] == [1, 1]
    assert session.context.tokens == session.tree.tokens == 1_000_003


def test_an_answer_in_a_folded_history_can_be_expanded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an append folded away is not held back by the cooldown, and one refocus reaches the tokens."""
    session = mc.Session(make_model(False), make_tokenizer(), budget=256)
    session.append(random_ids(300_000))
    target = 123_456

    def wants_target(context: WorkingContext) -> Any:
        block = context.starts // 32 == target // 32
        return np.where(block | (np.arange(len(context)) == context.at_token(target)), 1.0, -0.5)

    monkeypatch.setattr("megacontext.inference.session_focus.score_function", lambda *_: (wants_target, None))
    report = session.refocus()
    assert (0, target) in session.entries
    assert report.expands >= 3
    assert len(session.entries) <= 256 - 32


def test_stops_and_begins_like_the_engine() -> None:
    tokenizer, model = make_tokenizer(), make_model(False)
    session = open_session(model)
    first = next(session.generate(1))
    assert ids_of(session) == [tokenizer.bos_id, first]  # an empty history begins with BOS
    assert list(open_session(model).generate(0)) == []
    said = list(session.generate(30, stop=()))
    again = open_session(model)
    again.append([tokenizer.bos_id, first])
    stop = said[4]
    at = said.index(stop)
    assert list(again.generate(30, stop=[stop])) == said[: at + 1]
    assert ids_of(again)[2:] == said[: at + 1]  # what is yielded is history
    end = tokenizer.special("<|assistant_end|>")
    always = make_model(False)
    always.lm_head.weight.data[:] = 0
    always.head = lambda hidden: torch.nn.functional.one_hot(torch.tensor(end), VOCAB).float()  # type: ignore[method-assign]
    assert list(open_session(always).generate(9)) == [end]


def test_generation_can_be_left_and_taken_up() -> None:
    one, two = open_session(MEMORY_MODEL), open_session(MEMORY_MODEL)
    for session in (one, two):
        session.append(random_ids(100))
    whole = list(one.generate(20, stop=()))
    parts: list[int] = []
    while len(parts) < 20:
        parts += itertools.islice(two.generate(9, stop=()), min(3, 20 - len(parts)))
    assert parts == whole
    assert two.entries == one.entries
    tokens = two.generate(5, stop=())
    next(tokens)
    two.append("the cat")  # in the middle of a generation: the next token refocuses
    refocuses = two.stats.refocuses
    next(tokens)
    assert two.stats.refocuses == refocuses + 1


def test_telemetry() -> None:
    heard: list[tuple[FocusReport, WorkingContext]] = []
    session = open_session(MEMORY_MODEL, on_refocus=lambda report, context: heard.append((report, context)))
    assert np.isnan(list(session.stats.metrics().values())).all()
    play(session, [("append", 200), ("generate", 40), ("append", 30), ("generate", 20)])
    stats = session.stats
    assert len(heard) == stats.refocuses == len(stats.reports) >= 60 // 6
    assert [report for report, _ in heard] == list(stats.reports)
    assert heard[-1][1].entries[:20] == session.entries[:20]
    assert (stats.appended, stats.generated) == (230, 60)
    metrics = stats.metrics()
    assert set(metrics) == {
        f"runtime/{name}" for name in ("swap_rate", "residency", "token_budget_utilization", "latency_ms",
                                       "latency_p99_ms", "recompute_tokens_per_token")
    }  # fmt: skip
    assert np.isfinite(list(metrics.values())).all()
    assert 0.8 < metrics["runtime/token_budget_utilization"] <= 1
    assert metrics["runtime/latency_p99_ms"] >= metrics["runtime/latency_ms"] > 0
    assert metrics["runtime/recompute_tokens_per_token"] == stats.entries_recomputed / 60
