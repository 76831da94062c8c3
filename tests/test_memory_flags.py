"""Every flag of `--mc` that training reads, by the gradients that it changes from equal weights."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from equal_weights import fill_by_name
from test_memory_objective import TASKS, WORDS, T, grads, loss_of, new_batch, new_model, objective_of

from megacontext.config import MemoryConfig
from megacontext.flags import decides
from megacontext.stages import BASE
from megacontext.train.recall_mix import RecallMix


def gradients(memory: MemoryConfig, steps: int = 1, progress: float = 0.6) -> dict[str, torch.Tensor]:
    """Gradients of the last of some steps with the same rows and, where names and shapes are shared, the same weights."""
    model = new_model(memory)
    fill_by_name(model)
    objective = objective_of(model, progress=progress)
    for step in range(steps):
        found = grads(
            model,
            loss_of(
                objective, RecallMix(0.5, 3, WORDS, T + 1, 8, memory.mc_recall_answer_weight).mixed(new_batch(4, step))
            ),
        )
        objective.finish(0.0, objective.totals().tolist())
    return found


def reached(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model of which a parameter that both have has another gradient."""
    return {
        name.split(".")[1] if name.startswith("memory.") else "gpt"
        for name in before.keys() & after.keys()
        if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
    }


GIST, ALL = {"gpt", "gist", "lod_tag"}, {"gpt", "gist", "lod_tag", "lens", "router"}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        *(({name: value}, {"lens"}) for name, value in {
            "mc_lens_kl_weight": 1.0, "mc_lens_budget_smooth_weight": 1.0, "mc_lens_budget_weight": 0.0, "mc_lens_rank_weight": 0.0,
            "mc_lens_margin": 0.0, "mc_lens_temperature": 0.2, "mc_lens_hard_negative_ratio": 0.3, "mc_max_counterfactuals": 3,
            "mc_lens_attention_weight": 0.0, "mc_lens_loss_weight": 0.5, "lensnet_layers": 4, "lensnet_head": "linear",
        }.items()),
        *(({name: value}, GIST) for name, value in {
            "mc_gist_penalty_weight": 1.0, "mc_gist_teacher_share": 0.5, "mc_gist_loss_weight": 0.5,
        }.items()),
        *(({name: value}, GIST | {"lens"}) for name, value in {
            "mc_num_random_variants": 2, "mc_train_wc_length": 32, "mc_start_wc_length": 40, "allocator_recent_tokens": 4,
            "gistnet_layers": 4, "gistnet_pooling": "query", "gistnet_head": "linear", "positional_type": "simple",
        }.items()),
        *(({"positional_type": kind}, GIST | {"lens"}) for kind in ("gaussian", "gaussian_alibi")),
        ({"gistnet_type": "mean"}, {"gpt", "lens", "lod_tag"}),  # a mean has no parameters
        ({"max_lod": 1}, {"gpt", "gist", "lens"}),  # one tag fewer
        *(({name: value}, {"router"}) for name, value in {
            "mc_route_loss_weight": 0.5, "routing_slots": 4, "routing_width": 16, "mc_recall_share": 0.25,
        }.items()),
        *(({name: value}, ALL) for name, value in {"mc_aux_dtype": "bf16", "block_size": 16}.items()),
    ],
    ids=str,
)  # fmt: skip
def test_every_flag_of_training_changes_the_gradients_of_what_it_is_for(
    change: dict[str, float], parts: set[str]
) -> None:
    # Two of the variants are drawn blindly, so that the lens has pairs to compare. Blocks of four have a second level.
    base = replace(TASKS, mc_num_random_variants=4, block_size=4 if "max_lod" in change else 8)
    progress = 0.0 if "mc_start_wc_length" in change else 0.6
    found = [gradients(memory, progress=progress) for memory in (base, replace(base, **change))]
    assert reached(*found) == parts


def test_the_weight_of_answers_reaches_what_reads_and_writes_texts() -> None:
    base = replace(TASKS, mc_num_random_variants=4, mc_recall_answer_weight=1.0)
    assert reached(gradients(base), gradients(replace(base, **{"mc_recall_answer_weight": 16.0}))) == GIST


@pytest.mark.parametrize("flag", ["mc_lens_adv_norm_beta", "mc_lens_budget_smooth_beta"])
def test_memories_of_running_means_change_the_gradients_of_the_lens(flag: str) -> None:
    base = replace(TASKS, mc_num_random_variants=4, mc_lens_budget_smooth_weight=1.0)
    assert reached(*(gradients(memory, steps=3) for memory in (base, replace(base, **{flag: 0.5})))) == {"lens"}


def test_every_flag_of_training_is_tested() -> None:
    """Those that training reads; the others are focus settings, what a run is (`mc`) or how it runs (`mc_auto_batch`)."""
    source = Path(__file__).read_text()
    trained = {item.name for item in fields(MemoryConfig) if decides(BASE, MemoryConfig, item)}
    assert {name for name in trained - {"mc"} if f'"{name}"' not in source} == set()
