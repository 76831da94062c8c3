"""What --mc minimizes, against slow oracles: one view at a time, one pair at a time; causality, scaling, who gets gradient."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.context.gist_function import build_levels
from megacontext.data.recall_words import QUESTION_TOKENS, WordList
from megacontext.data.stream import Batch
from megacontext.model.gpt import GPT
from megacontext.train.attention_labels import block_attention, first_labelled, relative_scores
from megacontext.train.lens_loss import RunningScales
from megacontext.train.memory_objective import MemoryObjective, node_inputs
from megacontext.train.memory_plan import (
    lens_tensors,
    preferred_blocks,
    route_tensors,
    view_tensors,
    view_weights,
)
from megacontext.train.objective import TokenObjective
from megacontext.train.recall_mix import RecallMix
from megacontext.train.throughput import Stopwatch
from megacontext.train.views import (
    ViewSettings,
    draw_views,
)

T, VOCAB, ROWS = 64, 400, 4
GPT_CONFIG = GPTConfig(sequence_len=T, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
MEMORY = MemoryConfig(mc=1, block_size=4, routing_slots=2, routing_width=8, allocator_recent_tokens=12,
                      mc_recall_share=0.5, mc_num_random_variants=3)  # fmt: skip
TASKS = replace(MEMORY, block_size=8)  # a fact is longer than a block of four
CPU = torch.device("cpu")
WORDS = WordList.from_ids(np.arange(10, 390), bos=0)


def new_model(memory: MemoryConfig | None = MEMORY, config: GPTConfig = GPT_CONFIG) -> GPT:
    """A model in which nothing is zero, so that everything matters."""
    model = GPT(config)
    if memory is not None:
        model.attach_memory(memory)
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name))
        if not parameter.detach().any():
            parameter.data.normal_(0.0, 0.3 if parameter.ndim < 2 else parameter.shape[1] ** -0.5, generator=generator)
    return model


def new_batch(rows: int = ROWS, seed: int = 0, masked: bool = False) -> Batch:
    generator = np.random.default_rng(seed)
    ids = torch.from_numpy(generator.integers(0, VOCAB, (rows, T + 1)))
    weights = torch.from_numpy((generator.random((rows, T)) < 0.7).astype(np.float32)) if masked else None
    return Batch(ids, np.arange(rows), np.arange(rows), weights)


def objective_of(model: GPT, rows_per_step: int = ROWS, world: int = 1, progress: float = 0.6) -> MemoryObjective:
    return MemoryObjective(model, 5, rows_per_step, world, lambda step: progress, RunningScales())


def loss_of(objective: MemoryObjective, batch: Batch, scale: float = 1 / (ROWS * T)) -> torch.Tensor:
    objective.begin(0)
    return objective.loss(objective.plan(batch), scale, Stopwatch(CPU))


def means(objective: MemoryObjective) -> dict[str, float]:
    return objective.meter.means(objective.meter.totals().tolist())


def grads(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# The loss


@pytest.mark.parametrize("masked", [False, True])
def test_token_loss_is_the_vanilla_loss_bit_for_bit(masked: bool) -> None:
    model, batch = new_model(), new_batch(masked=masked)
    objective = objective_of(model)
    off = replace(MEMORY, mc_gist_loss_weight=0.0, mc_lens_loss_weight=0.0, mc_route_loss_weight=0.0)
    model.memory.config = objective.config = off  # type: ignore[union-attr]
    vanilla = new_model(None)
    tokens = TokenObjective(vanilla)
    expected = grads(vanilla, tokens.loss(tokens.plan(batch), 0.01, Stopwatch(CPU)))
    loss = loss_of(objective, batch, 0.01)
    assert torch.equal(loss, tokens.loss(tokens.plan(batch), 0.01, Stopwatch(CPU)))
    found = grads(model, loss)
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("kind", ["slot", "simple", "gaussian", "gaussian_alibi"])
@pytest.mark.parametrize("token_shift", [False, True])
def test_variants_loss_equals_one_view_at_a_time(kind: str, token_shift: bool) -> None:
    memory = replace(MEMORY, positional_type=kind, mc_gist_penalty_weight=0.3, mc_gist_teacher_share=0.25)
    model = new_model(memory, replace(GPT_CONFIG, token_shift=token_shift))
    batch = new_batch(2, masked=True)
    objective = objective_of(model, 2)
    loss_of(objective, batch)
    found = means(objective)

    views = objective.settings
    plan = draw_views(views, 5, batch.positions, 0.6, preferred_blocks(views, batch, 0.6)).variants
    with torch.no_grad():
        levels = [batch.inputs, *build_levels(batch.inputs, model.memory, 2)]
        raw_states = model.hidden(batch.inputs)
        predicted = model.head(raw_states).log_softmax(-1)
        losses, distances, divergences, by_level = [], [], [], {0: [], 1: [], 2: []}
        for view in range(len(plan.length)):
            entries, row = plan.context(view).entries, int(plan.sequence[view])
            ids = torch.tensor([[int(batch.ids[row, i]) if lod == 0 else 0 for lod, i in entries]])
            before = torch.tensor([[int(batch.ids[row, i - 1]) if lod == 0 and i else -1 for lod, i in entries]])
            content = torch.stack(
                [model.memory.content(levels[lod][row, i]) if lod else torch.zeros(32) for lod, i in entries]
            )
            lod = torch.tensor([[level for level, _ in entries]])
            x = model.embed_entries(ids, before, content[None], lod)
            places = [torch.from_numpy(a)[None] for a in (plan.context(view).positions, plan.context(view).sigmas)]
            rotary = model.entry_rotary(*places, torch.arange(len(entries))[None], torch.tensor([T]))
            states = model.trunk(x, rotary)
            logits, of_view, apart = model.head(states)[0], [], []
            for at, (level, index) in enumerate(entries):
                end = (index + 1) * 4**level
                target = int(batch.ids[row, end])
                if (at + 1 == len(entries) or entries[at + 1][0] == 0) and batch.weights[row, end - 1]:  # type: ignore[index]
                    loss = F.cross_entropy(logits[at], torch.tensor(target)).item()
                    of_view.append(loss)
                    apart.append(
                        F.kl_div(logits[at].log_softmax(-1), predicted[row, end - 1], log_target=True, reduction="sum")
                    )
                    by_level[level].append(loss)
            losses.append(sum(of_view) / len(of_view))
            divergences.append(sum(apart).item() / len(apart))
            tail = objective.settings.tail
            distances.append(0.5 * (states[0, -tail:] - raw_states[row, -tail:]).square().mean().item())
    assert found["gist_ce"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["gist_penalty"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert found["gist_kl"] == pytest.approx(np.mean(divergences), rel=1e-4)
    taught = 0.75 * np.mean(losses) + 0.25 * np.mean(divergences)
    assert found["gist_loss"] == pytest.approx(taught + 0.3 * np.mean(distances), rel=1e-5)
    for level, values in by_level.items():
        if values:
            assert found[f"lod_loss/{level}"] == pytest.approx(np.mean(values), rel=1e-5)
        assert found[f"lod_count/{level}"] == pytest.approx((plan.lod == level).sum() / len(plan.lod))


def test_answers_of_tasks_are_learned_as_they_are() -> None:
    """What the raw row predicts is no part of the target where the answer is known."""
    tasks = RecallMix(1.0, 3, WORDS, T + 1, 8).mixed(new_batch(3))
    found = {}
    for name, batch in (("tasks", tasks), ("text", new_batch(3))):
        for share in (0.0, 0.5):
            objective = objective_of(new_model(replace(TASKS, mc_gist_teacher_share=share)), 3)
            loss_of(objective, batch)
            found[name, share] = means(objective)["gist_loss"]
    assert found["tasks", 0.5] == pytest.approx(found["tasks", 0.0], rel=1e-5)
    assert found["text", 0.5] < 0.9 * found["text", 0.0]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, T - 1), st.integers(0, 99))
def test_a_token_changes_no_loss_before_it(token: int, seed: int) -> None:
    model, batch = new_model(), new_batch(2, seed)
    views = ViewSettings.of(MEMORY, T)
    plan = draw_views(views, seed, batch.positions, 0.7).variants
    changed = batch.ids.clone()
    changed[:, token] = (changed[:, token] + 1) % VOCAB
    tensors = view_tensors(model, views, plan, batch.targets.numpy())
    aims = plan.target_tokens().reshape(-1)[tensors.entry.numpy()]
    with torch.no_grad():
        results = []
        for ids in (batch.ids[:, :-1], changed[:, :-1]):
            table = node_inputs(model.memory, model.embed(ids), build_levels(ids, model.memory, 2))
            states = model.trunk(table[tensors.gather].view(*tensors.shape, -1), tensors.rotary).flatten(0, 1)
            results.append(model.head(states[tensors.entry]))
    same = (results[0] == results[1]).all(1).numpy()
    assert same[aims <= token].all()
    assert not same[aims > token].all()


def test_the_raw_view_as_a_plan_is_the_vanilla_forward_pass() -> None:
    from plans import all_raw_plan

    model, batch = new_model(), new_batch()
    views = ViewSettings.of(MEMORY, T)
    tensors = view_tensors(model, views, all_raw_plan(ROWS, T, 4), batch.targets.numpy())
    with torch.no_grad():
        table = node_inputs(model.memory, model.embed(batch.inputs), build_levels(batch.inputs, model.memory, 2))
        states = model.trunk(table[tensors.gather].view(ROWS, T, -1), tensors.rotary)
        assert torch.equal(model.head(states), new_model(None)(batch.inputs))


# Scaling and gradient


@pytest.mark.parametrize("share", [0.0, 0.25])  # with tasks, text that asks nothing teaches the router
def test_micro_batches_and_workers_add_up_to_the_whole_step(share: float) -> None:
    model = new_model(replace(MEMORY, mc_recall_share=share))
    whole = new_batch(4)
    expected = grads(model, loss_of(objective_of(model, 4), whole, 1 / (4 * T)))
    assert bool(expected["memory.router.gate.weight"].any()) == (share > 0)
    for world in (1, 2):
        objective = objective_of(model, 4, world)
        parts = [Batch(whole.ids[at : at + 2], whole.positions[at : at + 2], whole.rows[at : at + 2]) for at in (0, 2)]
        total = sum((loss_of(objective, part, world / (4 * T)) for part in parts), torch.zeros(())) / world
        for name, grad in grads(model, total).items():
            assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


def test_each_module_is_taught_by_its_own_terms() -> None:
    """Gists by the tokens that need them, the lens by preferences, the router by questions; one step reaches them all."""
    batch = RecallMix(0.5, 3, WORDS, T + 1, 8).mixed(new_batch(8))
    zero = dict(mc_gist_loss_weight=0.0, mc_lens_loss_weight=0.0, mc_route_loss_weight=0.0)
    reached = {}
    for weight in ("mc_gist_loss_weight", "mc_lens_loss_weight", "mc_route_loss_weight"):
        model = new_model(replace(TASKS, **{**zero, weight: 1.0}))
        found = grads(model, loss_of(objective_of(model, 8), batch, scale=0.0))
        reached[weight] = {
            name.split(".")[1] if name.startswith("memory.") else "gpt" for name, g in found.items() if g.any()
        }
    assert reached["mc_gist_loss_weight"] == {"gpt", "gist", "lod_tag"}
    assert reached["mc_lens_loss_weight"] == {"lens"}
    assert reached["mc_route_loss_weight"] == {"router"}


def test_the_lens_learns_what_raw_text_attends_to() -> None:
    model, batch = new_model(replace(TASKS, mc_recall_share=0.0)), new_batch()
    objective = objective_of(model)
    learner = torch.optim.AdamW(model.memory.lens.parameters(), lr=1e-2)
    agreed = []
    for _ in range(60):
        grads(model, loss_of(objective, batch))
        agreed.append(means(objective)["attention_corr"])
        learner.step()
    assert agreed[0] < 0.5
    assert agreed[-1] > 0.8


def test_attention_to_the_first_tokens_of_a_row_teaches_nothing() -> None:
    model, batch = new_model(TASKS), new_batch(2)
    objective = objective_of(model, 2)
    blocks = objective.settings.blocks
    first = first_labelled(blocks, 8)
    assert (first, blocks) == (1, 7)  # no more than a quarter
    assert first_labelled(62, 16) == 2
    layer_inputs: list[torch.Tensor] = []
    model.trunk(model.embed(batch.inputs), model.rotary_table.slice(0, T, CPU), layer_inputs=layer_inputs)
    found = block_attention(model, layer_inputs, torch.arange(2), objective.settings.horizon, blocks, 8)[:, first:]
    labels = objective.attention_labels(layer_inputs, torch.arange(2))
    assert labels.shape == (2, blocks - first)
    assert torch.allclose(labels, relative_scores(found))


def test_metrics_are_those_of_the_specification() -> None:
    objective = objective_of(new_model(TASKS))
    loss_of(objective, RecallMix(0.5, 3, WORDS, T + 1, 8).mixed(new_batch(8)))
    metrics = objective.finish(0.0, objective.totals().tolist()).metrics
    named = {
        "token_loss", "lens_loss", "gist_loss", "variants_total", "variants_mean", "adv_delta_mean", "adv_delta_p95",
        "adv_delta_std", "lod_loss/0", "lod_count/0", "lod_loss/1", "lod_count/1", "preference_corr_mean", "preference_agreement",
        "preference_pair_count", "policy_score_abs_mean", "policy_score_std_mean", "route_loss", "route_accuracy",
        "route_asked", "route_false_alarm",
    }  # fmt: skip
    assert {f"mc/{name}" for name in named} <= metrics.keys()
    assert metrics["mc/variants_total"] == ROWS * 3
    assert objective.running.updates == 1


def test_routing_asks_at_the_question_and_offers_only_what_was_read() -> None:
    views = ViewSettings.of(TASKS, T)
    batch = RecallMix(1.0, 3, WORDS, T + 1, 8).mixed(new_batch(3))
    assert batch.questions is not None
    questions = route_tensors(views, 3, batch)
    blocks, number = T // 8, 0
    for row in range(3):
        for position, evidence, earlier in zip(
            batch.questions.position[row], batch.questions.evidence[row], batch.questions.earlier[row], strict=True
        ):
            if position < 31:
                continue
            assert questions.windows[number].tolist() == batch.ids[row, position - 31 : position + 1].tolist()
            right = {evidence, *earlier.tolist()} - {-1}
            assert questions.positives[number, 0] == row * blocks + evidence
            assert set(questions.positives[number].tolist()) == {row * blocks + block for block in right}
            shares = [1 / len(right) if block >= 0 else 0.0 for block in (evidence, *earlier)]
            assert questions.probability[number].tolist() == pytest.approx(shares)
            allowed = questions.allowed[number].view(3, blocks)
            told = batch.questions.evidence[row].max() + 1
            assert allowed[row].nonzero().max() == min((position + 1 - QUESTION_TOKENS) // 8, told) - 1
            assert allowed[np.arange(3) != row].all()
            number += 1
    assert number == len(questions.windows)
    assert questions.weights.sum() == pytest.approx(3)


def test_answers_weigh_more_where_their_evidence_is_raw_and_metrics_do_not_know() -> None:
    """Weight by weight: of a row always, of a view only where it shows the block that states the answer."""
    views, batch = ViewSettings.of(TASKS, T), RecallMix(1.0, 3, WORDS, T + 1, 8, 16.0).mixed(new_batch(3))
    assert batch.questions is not None
    plan = draw_views(views, 5, batch.positions, 0.3).variants
    rows, shown = batch.weights, view_weights(plan, batch)
    assert rows is not None
    assert shown is not None
    expected, of_views = np.ones((3, T)), np.ones((len(plan.sequence), T))
    for row in range(3):
        for position, block in zip(batch.questions.position[row], batch.questions.evidence[row], strict=True):
            if position < 0:
                continue
            expected[row, position] = 16
            for view in np.flatnonzero(plan.sequence == row):
                if (0, block * 8) in plan.context(view).entries:
                    of_views[view, position] = 16
    assert np.array_equal(rows.numpy(), expected)
    assert np.array_equal(shown, of_views)
    assert 1 < of_views.mean() < expected.mean()
    found = []
    for weight in (1.0, 16.0):
        objective = objective_of(new_model(TASKS), 3)
        loss_of(objective, RecallMix(1.0, 3, WORDS, T + 1, 8, weight).mixed(new_batch(3)))
        found.append(means(objective))
    for name in ("token_loss", "gist_ce", "lod_loss/0"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_the_lens_is_asked_before_what_it_is_judged_by() -> None:
    """Scores of the blocks do not depend on the horizon, the tokens whose losses are compared."""
    model, batch = new_model(), new_batch(2)
    views = ViewSettings.of(MEMORY, T)
    plans = draw_views(views, 0, batch.positions, 0.8)
    lens = lens_tensors(model, views, plans.reference, plans.variants, np.arange(2))
    changed = batch.inputs.clone()
    changed[:, -views.horizon :] = (changed[:, -views.horizon :] + 1) % VOCAB
    query = batch.inputs.clone()
    query[:, -views.horizon - 1] = (query[:, -views.horizon - 1] + 1) % VOCAB
    scores = []
    with torch.no_grad():
        for ids in (batch.inputs, changed, query):
            table = node_inputs(model.memory, model.embed(ids), build_levels(ids, model.memory, 2))
            entries = table[lens.gather].view(*lens.shape, -1)
            scores.append(model.memory.scores(entries, lens.level, lens.rotary))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
