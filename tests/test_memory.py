"""GistNet, LensNet and the router: shapes, options that matter, what a new one does, and what it depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from equal_weights import fill_by_name

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.gist_function import build_levels
from megacontext.context.tree import Tree, all_records
from megacontext.context.working_context import WorkingContext
from megacontext.errors import UserError
from megacontext.model.gpt import GPT
from megacontext.model.memory import Memory
from megacontext.model.norm import rms_norm
from megacontext.model.rotary_entries import entry_rotary, hidden_tokens

SHAPE = GPTConfig(sequence_len=64, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
SMALL = MemoryConfig(mc=1, block_size=4, max_lod=2, routing_slots=2, routing_width=8)


def make(config: MemoryConfig = SMALL, token_shift: bool = False, seed: int = 0) -> tuple[GPT, Memory]:
    model = GPT(replace(SHAPE, token_shift=token_shift))
    memory = model.attach_memory(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model, memory


def trained(config: MemoryConfig = SMALL, token_shift: bool = False) -> tuple[GPT, Memory]:
    """Random weights everywhere, as after training: nothing is zero."""
    model, memory = make(config, token_shift)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.15, generator=generator))
    return model, memory


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


OPTIONS = [
    {},
    {"gistnet_layers": 4},
    {"gistnet_pooling": "query"},
    {"gistnet_pooling": "cls"},
    {"gistnet_head": "linear"},
    {"lensnet_layers": 4},
    {"lensnet_head": "linear"},
    {"routing_slots": 1},
    {"routing_slots": 0},
    {"gistnet_type": "mean"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_makes_records_and_scores(options: dict[str, Any]) -> None:
    model, memory = trained(replace(SMALL, **options))
    ids = ids_of(3, 5, 4)
    leaf = memory.leaf(ids)
    assert leaf.shape == (3, 5, memory.record_width)
    assert memory.inner(leaf[:, :4], 2).shape == (3, memory.record_width)
    x = memory.content(leaf)
    slots = torch.arange(5).expand(3, 5)
    rotary = model.entry_rotary(slots.double(), slots.double(), slots)
    scores = memory.scores(x, torch.ones(3, 5, dtype=torch.long), rotary)
    assert scores.shape == (3, 5)
    assert (scores.abs() <= 1).all()
    assert scores.std() > 0


def outputs(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a memory of these options makes of the same ids with the same weights."""
    model = GPT(SHAPE)
    memory = model.attach_memory(replace(SMALL, **options))
    fill_by_name(model)
    leaf = memory.leaf(ids_of(2, 5, 4))
    x, slots = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(3)), torch.arange(12)[None]
    found = {
        "gists": memory.content(leaf),
        "scores": memory.scores(x, torch.ones(1, 12, dtype=torch.long), model.entry_rotary(slots.double(), slots.double(), slots)),
    }  # fmt: skip
    if memory.router is not None:
        found["routes"] = memory.route_logits(memory.query(ids_of(3, 9))[0], memory.keys(leaf).flatten(0, 1))
    return found


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"gistnet_type": "mean"}, {"gists"}),
        ({"gistnet_layers": 4}, {"gists"}),
        ({"gistnet_pooling": "query"}, {"gists"}),
        ({"gistnet_pooling": "cls"}, {"gists"}),
        ({"gistnet_head": "linear"}, {"gists"}),
        ({"lensnet_layers": 4}, {"scores"}),
        ({"lensnet_head": "linear"}, {"scores"}),
        ({"positional_type": "gaussian"}, {"scores"}),
        ({"routing_slots": 1}, {"routes"}),
        ({"routing_width": 16}, {"routes"}),
        ({"routing_slots": 0}, {"routes"}),
    ],
    ids=str,
)
def test_every_option_changes_the_outputs_of_its_part_alone(options: dict[str, Any], changed: set[str]) -> None:
    plain, other = outputs({}), outputs(options)
    assert {name for name in plain if name not in other or not torch.equal(plain[name], other[name])} == changed


def test_poolings_differ_with_the_same_parameters() -> None:
    query, cls = outputs({"gistnet_pooling": "query"}), outputs({"gistnet_pooling": "cls"})
    assert not torch.equal(query["gists"], cls["gists"])


def test_a_new_gistnet_is_the_normed_mean_and_a_new_lens_says_nothing() -> None:
    model, memory = make()
    ids = ids_of(1, 3, 4)
    want = rms_norm(model.embed(ids[0]).mean(1))
    torch.testing.assert_close(memory.content(memory.leaf(ids))[0], want, atol=1e-6, rtol=0)
    slots = torch.arange(3)[None]
    scores = memory.scores(want[None], torch.ones(1, 3, dtype=torch.long), model.entry_rotary(slots, slots, slots))
    assert not scores.any()


def test_one_gistnet_for_all_levels_and_keys_are_the_largest_below() -> None:
    _, memory = trained()
    levels = build_levels(ids_of(2, 32), memory)
    assert [level.shape[1] for level in levels] == [8, 2]
    below, above = memory.keys(levels[0]), memory.keys(levels[1])
    assert torch.equal(below.view(2, 2, 4, 2, 8).amax(2), above)
    assert (below >= 0).all()
    want = memory.gist(memory.content(levels[0]).reshape(4, 4, 32)).view(2, 2, 32)
    torch.testing.assert_close(memory.content(levels[1]), want)


def test_tree_equals_one_shot_levels_however_it_is_fed() -> None:
    _, memory = trained(token_shift=True)
    ids = ids_of(1, 77)
    wanted = build_levels(ids, memory)
    tree = Tree(memory)
    for part in ids[0].split([1, 3, 40, 2, 31]):
        tree.append(part)
    for got, want in zip(all_records(tree), wanted, strict=True):
        torch.testing.assert_close(got, want[0].detach(), atol=1e-6, rtol=1e-5)


def test_a_score_of_an_old_entry_depends_on_the_tail() -> None:
    model, memory = trained()
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(3))
    other = x.clone()
    other[:, -1] += 1.0
    slots = torch.arange(12)[None]
    rotary = model.entry_rotary(slots, slots, slots)
    lod = torch.zeros(1, 12, dtype=torch.long)
    change = (memory.scores(x, lod, rotary) - memory.scores(other, lod, rotary)).abs()
    assert change[0, 0] > 1e-5


def test_route_logits_are_matches_over_all_blocks() -> None:
    _, memory = trained()
    records = memory.leaf(ids_of(1, 6, 4))[0]
    query, _ = memory.query(ids_of(3, 9))
    keys = memory.keys(records)
    assert memory.router is not None
    want = memory.router.logits(torch.stack([memory.match(q, keys) for q in query]))
    torch.testing.assert_close(memory.route_logits(query, keys), want)
    torch.testing.assert_close(query.norm(dim=-1), torch.ones(3))


def test_a_query_finds_the_block_with_its_words_even_untrained() -> None:
    _, memory = make(replace(SMALL, block_size=8, routing_width=64))
    ids = ids_of(1, 16, 8, seed=5)
    question = ids[0, 11, 2:6]
    logits = memory.route_logits(memory.query(question[None])[0], memory.keys(memory.leaf(ids))[0])
    assert int(logits.argmax()) == 11


@pytest.mark.parametrize("kind", ["slot", "simple", "gaussian", "gaussian_alibi"])
def test_an_all_raw_context_is_the_vanilla_model(kind: str) -> None:
    model, _ = trained(replace(SMALL, positional_type=kind), token_shift=True)
    ids = ids_of(2, 64)
    previous = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=-1)
    slots = torch.arange(64).expand(2, 64)
    x = model.embed_entries(ids, previous, torch.randn(2, 64, 32), torch.zeros(2, 64, dtype=torch.long))
    rotary = model.entry_rotary(slots.double(), torch.zeros(2, 64).double(), slots)
    found, vanilla = model.head(model.trunk(x, rotary)), model(ids)
    if kind == "gaussian_alibi":  # its products have a channel more, of zeros
        torch.testing.assert_close(found, vanilla, atol=1e-5, rtol=0)
    else:
        assert torch.equal(found, vanilla)


def test_alibi_counts_what_gists_hide_and_attends_less_to_what_lies_behind_it() -> None:
    context = WorkingContext.from_entries([(2, 0), (1, 4), (1, 5), *((0, n) for n in range(24, 30))], 4)
    slots = torch.arange(len(context))[None]
    where = torch.from_numpy(context.positions)[None]
    hidden = hidden_tokens(where, slots)[0]
    span = torch.from_numpy(context.spans)
    for entry in range(len(context)):
        behind = float((span[entry + 1 :] - 1).sum())
        assert float(hidden[entry]) == behind + (float(span[entry]) - 1) / 2  # of itself the newer half
    bias = entry_rotary("gaussian_alibi", where, torch.from_numpy(context.sigmas)[None], slots, 8, 64).bias
    assert bias is not None
    assert (bias[0].diff() >= 0).all()
    assert (bias[0, 3:] == 0).all()
    padded = torch.cat([where, where[:, :1]], 1)  # padding as evaluations pad
    assert torch.equal(hidden_tokens(padded, torch.arange(len(context) + 1)[None])[0, :-1], hidden)


def test_gaussian_fades_fast_bands_of_wide_entries() -> None:
    where, slots = torch.tensor([[100.0, 100.0]]).double(), torch.tensor([[0, 1]])
    cos, sin, _ = entry_rotary("gaussian", where, torch.tensor([[0.0, 32 / 12**0.5]]).double(), slots, 64, 1024)
    size = (cos.float() ** 2 + sin.float() ** 2).sqrt()[0, :, 0]
    torch.testing.assert_close(size[0], torch.ones(32), atol=1e-2, rtol=0)
    assert size[1, 0] < 1e-6
    assert size[1, -1] > 0.99
    assert (size[1].diff() >= -1e-2).all()


def test_far_positions_stay_near_those_of_training() -> None:
    tokens, length = 10_000_000, 1024
    where = torch.tensor([[0.0, 5e6, tokens - 2000.0, tokens - 1000.0, tokens - 1.0]]).double()
    from megacontext.model.rotary_entries import _near

    near = _near(where, torch.tensor([[float(tokens)]]).double(), length)[0]
    assert (near.diff() > 0).all()
    assert near[0] >= -1
    assert near[-1] < length * 12
    assert near[4] - near[3] == 999
    short = torch.arange(1024)[None].double()
    assert torch.equal(_near(short, torch.tensor([[1024.0]]).double(), length), short)


def test_rotary_of_a_long_history_is_exact() -> None:
    at = torch.tensor([[70_000_001]]).double()
    cos, *_ = entry_rotary("simple", at, at * 0, at.long(), 64, 1 << 40)
    rates = (1.0 / (10_000.0 ** (torch.arange(0, 64, 2).float() / 64))).double()  # those of the vanilla table
    torch.testing.assert_close(cos[0, 0, 0].double(), (at[0, 0] * rates).cos(), atol=1e-2, rtol=0)


def test_token_shift_sees_the_true_previous_token() -> None:
    model, _ = trained(token_shift=True)
    ids = ids_of(1, 6)
    whole = model.embed(ids)
    later = model.embed(ids[:, 3:], ids[:, 2:5])
    assert torch.equal(whole[:, 3:], later)
    cache = model.make_cache(1, 8)
    parts = torch.cat([model(ids[:, :4], cache), model(ids[:, 4:], cache)], 1)
    torch.testing.assert_close(parts, model(ids), atol=1e-5, rtol=1e-4)


def test_weights_of_the_gpt_do_not_depend_on_the_memory() -> None:
    plain = GPT(SHAPE)
    plain.init_weights(torch.Generator().manual_seed(0))
    model, _ = make()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert {name.split(".")[0] for name in set(model.state_dict()) - set(plain.state_dict())} == {"memory"}


def test_a_digest_is_of_weights_settings_and_embedding() -> None:
    _, first = make()
    _, same = make()
    _, other = make(seed=1)
    assert first.digest == same.digest != other.digest
    with torch.no_grad():
        same.lod_tag.add_(1e-3)
    assert same.digest != first.digest


@pytest.mark.parametrize(
    "options",
    [{"block_size": 1}, {"gistnet_layers": 3}, {"routing_slots": 3}, {"mc_recall_share": 1.5}, {"max_lod": 0}],
)
def test_bad_settings_name_the_flag(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        replace(SMALL, **options)
