"""FLOPs of the memory's objective, by the GPT's convention: 2 for a multiplication and an addition, backward twice forward."""

from __future__ import annotations

from megacontext.config import GPTConfig, MemoryConfig
from megacontext.data.recall import question_counts
from megacontext.model import flops
from megacontext.model.router import QUERY_TOKENS
from megacontext.train.memory_plan import NEGATIVE_WINDOWS
from megacontext.train.recall_mix import QUESTIONS
from megacontext.train.views import ViewSettings


def memory_flops_per_token(gpt: GPTConfig, memory: MemoryConfig, progress: float) -> float:
    """Training FLOPs per token of a row when a share `progress` of the run is done.

    Of the raw row, its tree, its variants with their teacher's predictions, LensNet with its labels and measured edits,
    and the router's queries.
    """
    views = ViewSettings.of(memory, gpt.sequence_len)
    entries = views.length(views.entries(progress))
    once = views.tokens * flops.forward_flops_per_token(gpt, views.tokens)
    once += views.variants * entries * flops.forward_flops_per_token(gpt, entries)
    once += flops.tree_flops(gpt, memory, views.tokens)
    if memory.routing_slots and memory.mc_recall_share:
        asked = sum(question_counts(views.tokens + 1, views.block_size, QUESTIONS, again=True))
        queries = NEGATIVE_WINDOWS + memory.mc_recall_share * asked
        once += queries * flops.routing_key_flops(gpt, memory, QUERY_TOKENS)
    once += flops.lens_flops(gpt, memory, views.length(views.last_entries) - views.horizon)
    single = views.tokens - (views.blocks - 1) * (views.block_size - 1)
    edits = min(memory.mc_max_counterfactuals, views.blocks) * single
    forward = edits * flops.forward_flops_per_token(gpt, single) if edits else 0.0
    if memory.mc_gist_teacher_share:
        forward += views.variants * entries * flops.head_flops_per_token(gpt)
    if memory.mc_lens_attention_weight:
        text = 1 - memory.mc_recall_share
        forward += text * flops.attention_label_flops(gpt, views.tokens, views.horizon)
    return (3 * once + forward) / views.tokens
