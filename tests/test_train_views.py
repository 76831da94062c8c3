"""Which working contexts a training step sees: the curriculum, its legality and its randomness; the batch that fits them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import MemoryConfig
from megacontext.context.invariants import check_working_context
from megacontext.data.stream import Batch
from megacontext.errors import UserError
from megacontext.train.memory_plan import preferred_blocks
from megacontext.train.views import (
    RowRandom,
    ViewSettings,
    choose_blocks,
    draw_views,
    entry_of_token,
    raw_blocks,
    single_expansions,
)

T = 64
MEMORY = MemoryConfig(mc=1, block_size=4, allocator_recent_tokens=12, mc_num_random_variants=3)


def test_the_curriculum_runs_from_four_fifths_to_a_fifth_over_the_whole_run() -> None:
    views = ViewSettings.of(MemoryConfig(mc=1), 2048)
    assert (views.first_entries, views.last_entries, views.tail, views.horizon) == (1638, 409, 128, 64)
    entries = [views.entries(step / 99) for step in range(100)]
    assert (entries[0], entries[-1]) == (1638, 409)
    assert entries == sorted(entries, reverse=True)
    assert ViewSettings.of(MemoryConfig(mc=1, mc_train_wc_length=700), 2048).last_entries == 700
    short = ViewSettings.of(MemoryConfig(mc=1), 512)  # a fifth would be less than the coarsest context and its tail
    assert short.tail == 51
    assert raw_blocks(draw_views(short, 0, np.arange(3), 1.0).variants, short.blocks).sum(1).tolist() == [1] * 12


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (MemoryConfig(mc=1), 33, "no whole block of 32"),
        (MemoryConfig(mc=1, mc_train_wc_length=90), 1024, "must lie between"),
        (MemoryConfig(mc=1, mc_train_wc_length=2000), 1024, "must lie between"),
        (MemoryConfig(mc=1, mc_start_wc_length=1025), 1024, "--mc_start_wc_length 1025"),
        (MemoryConfig(mc=1, mc_start_wc_length=200, mc_train_wc_length=300), 1024, "--mc_start_wc_length 200"),
    ],
)
def test_lengths_that_cannot_be_are_refused(config: MemoryConfig, tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViewSettings.of(config, tokens)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**12), st.floats(0, 1), st.sampled_from([64, 100, 257]))
def test_views_are_legal_of_one_length_and_depend_on_the_row_alone(first: int, progress: float, tokens: int) -> None:
    views = ViewSettings.of(MEMORY, tokens)
    positions = first + np.arange(3)
    drawn = draw_views(views, 7, positions, progress)
    for plan, length, tail in ((drawn.variants, views.entries(progress), views.tail),
                               (drawn.reference, views.reference_entries, views.tail - views.horizon)):  # fmt: skip
        for view in range(len(plan.length)):
            context = plan.context(view)
            check_working_context(context, budget=length, tail=tail, tokens=context.tokens, max_lod=2)
    assert set(drawn.variants.length.tolist()) == {views.length(views.entries(progress))}
    assert set(drawn.reference.tokens.tolist()) == {tokens - views.horizon}
    alone = draw_views(views, 7, positions[1:2], progress)
    assert np.array_equal(alone.variants.lod, drawn.variants.lod[3:6])
    assert np.array_equal(alone.reference.index, drawn.reference.index[1:2])


def test_views_differ_by_seed_row_variant_and_are_uniform() -> None:
    numbers = RowRandom(1, np.arange(500), np.zeros(500, np.int64)).random((500, 40))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02
    other = RowRandom(2, np.arange(500), np.zeros(500, np.int64)).random((500, 40))
    assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < 0.02


def test_evidence_stays_raw_in_every_second_variant() -> None:
    views = ViewSettings.of(replace(MEMORY, mc_num_random_variants=4), T)
    evidence = np.zeros((8, views.blocks), bool)
    evidence[:, 3] = True
    shown = raw_blocks(draw_views(views, 0, np.arange(8), 0.7, evidence).variants, views.blocks).reshape(8, 4, -1)
    blind = raw_blocks(draw_views(views, 0, np.arange(8), 0.7).variants, views.blocks).reshape(8, 4, -1)
    assert shown[:, ::2, 3].all()
    assert np.array_equal(shown[:, 1::2], blind[:, 1::2])
    assert not shown[:, 1::2, 3].all()


def text(rows: int) -> Batch:
    return Batch(torch.zeros((rows, T + 1), dtype=torch.int64), np.arange(rows), np.arange(rows))


@pytest.mark.parametrize("progress", [0.3, 0.6, 1.0])
def test_every_second_variant_of_text_shows_the_newest_blocks(progress: float) -> None:
    views = ViewSettings.of(replace(MEMORY, mc_num_random_variants=4), T)
    entries = views.entries(progress)
    kept = preferred_blocks(views, text(50), progress)
    assert kept.sum(1).tolist() == [views.room(entries)] * 50
    assert kept[:, -views.room(entries) :].all()
    shown = raw_blocks(draw_views(views, 0, np.arange(50), progress, kept).variants, views.blocks).reshape(50, 4, -1)
    assert shown.sum(2).max() <= views.room(entries)
    assert shown[:, ::2][..., kept[0]].mean() > shown[:, 1::2][..., kept[0]].mean() + 0.1
    assert progress < 1 or not shown[:, ::2][..., ~kept[0]].any()


def test_the_only_variant_of_text_is_drawn_blindly() -> None:
    views = ViewSettings.of(replace(MEMORY, mc_num_random_variants=1), T)
    assert not preferred_blocks(views, text(3), 0.5).any()


def test_the_lens_is_asked_about_contexts_that_fade_with_age_too() -> None:
    views = ViewSettings.of(MEMORY, T)
    room = views.room(views.last_entries)
    shown = raw_blocks(draw_views(views, 0, np.arange(40), 0.1).reference, views.blocks)
    newest = np.arange(views.blocks) >= views.blocks - room
    assert room > 0
    assert shown[::2].any()
    assert not shown[::2][:, ~newest].any()  # what is raw is near; how much is raw is drawn, as for the others
    assert shown[1::2][:, ~newest].any()


def test_a_run_may_start_with_short_variants() -> None:
    views = ViewSettings.of(replace(MEMORY, mc_start_wc_length=120, mc_train_wc_length=100), 512)
    assert [views.entries(progress) for progress in (0.0, 0.5, 1.0)] == [120, 110, 100]


def test_single_expansions_are_the_coarsest_view_with_one_block_raw() -> None:
    views = ViewSettings.of(MEMORY, T)
    chosen = choose_blocks(views, 0, np.arange(3), 5)
    assert all(len(set(row)) == 5 for row in chosen.tolist())
    base, single = single_expansions(views, chosen)
    base.check()
    single.check()
    assert not raw_blocks(base, views.blocks).any()
    assert [np.flatnonzero(row).tolist() for row in raw_blocks(single, views.blocks)] == [[b] for b in chosen.ravel()]
    assert set(single.tokens.tolist()) == set(base.tokens.tolist()) == {T}


def test_entry_of_token_finds_the_entry_that_covers_it() -> None:
    plan = draw_views(ViewSettings.of(MEMORY, T), 0, np.arange(4), 0.9).variants
    found = entry_of_token(plan, 40)
    starts, ends = plan.starts, plan.starts + plan.spans
    token = np.arange(40)
    assert (np.take_along_axis(starts, found, 1) <= token).all()
    assert (token < np.take_along_axis(ends, found, 1)).all()
