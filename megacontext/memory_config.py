"""Settings of the memory. Focus settings say how a trained memory is used; all others, how it is made and trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from megacontext.errors import UserError
from megacontext.flags import Section, flag
from megacontext.stages import MEMORY_EVALUATION, TRAINING

_free = partial(flag, decides=())  # a setting on which no result depends
_focus = partial(flag, decides=MEMORY_EVALUATION)  # no result of training depends on it
GISTNET_LAYERS, LENSNET_LAYERS = (2, 4), (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class FocusConfig(Section, stages=TRAINING + MEMORY_EVALUATION):
    """What fills the working context. A checkpoint holds its defaults; every use of the model may override them."""

    mc_eval_soft_max_length: int = _focus(
        0,
        "budget of the working context at evaluation and inference, in entries; 0 is the model's sequence length",
        first=True,
    )
    allocator_recent_tokens: int = flag(
        128, "newest tokens that stay raw; at inference an eighth of the budget at most", low=1
    )
    allocator_type: str = _focus(
        "greedy",
        "how a refocus picks edits: the best first, or drawn from the best",
        ("greedy", "stochastic_greedy"),
    )
    allocator_expand_threshold: float = _focus(0.1, "score in [-1, 1] above which an entry may be expanded", high=1)
    allocator_collapse_threshold: float = _focus(
        0.1,
        "collapse margin: a sibling group is collapsed for an entry only if entry score - group mean > expand_threshold + "
        "collapse_threshold; a raw group with mean < -collapse_threshold is always collapsed",
        high=1,
    )
    allocator_sample_top_k: int = _focus(4, "candidates that stochastic_greedy draws an edit from", low=1)
    allocator_sample_temperature: float = _focus(1.0, "temperature of stochastic_greedy's draw of an edit", above=0)
    allocator_cooldown: int = _focus(2, "refocuses during which no edit is reversed")
    mc_infer_allocator_max_replacements: int = _focus(8, "most edits per iteration of a refocus at inference")
    mc_infer_allocator_iterations: int = _focus(
        8, "most iterations per refocus at inference; each can expand a node by one more level"
    )
    mc_infer_refocus_interval: int = _focus(32, "generated tokens between two refocuses", low=1)
    search_blocks: int = _focus(8, "most blocks that the search for an answer may find", low=1)
    search_visits: int = _focus(
        384, "most nodes that the search opens: bounds a refocus at any length of history", low=1
    )
    restated_match: float = _focus(
        0.98,
        "share of the best match from which on blocks count as restatements of one fact, of which the newest wins",
        high=1,
    )
    restated_bonus: float = _focus(
        math.log(10.0), "logit by which a restatement of a fact is above the restatement before it"
    )
    scarcity: float = _focus(
        0.5, "penalty on entries outside the blocks found, scaled by the probability of a question"
    )

    @classmethod
    def of(cls, base: FocusConfig | None = None, **options: Any) -> FocusConfig:
        """Settings by the short names of `OPTIONS`, over those of `base`. Raises UserError for impossible values."""
        known = {} if base is None else {item.name: getattr(base, item.name) for item in fields(FocusConfig)}
        return FocusConfig(**{**known, **{OPTIONS[name]: value for name, value in options.items()}})


def _short(name: str) -> str:
    """The name of a focus setting as an option of a session: `mc_infer_allocator_iterations` is `iterations`."""
    short = name.removeprefix("mc_infer_").removeprefix("allocator_")
    return name if short == "type" else short


_BY_BUDGET = ("mc_eval_soft_max_length", "allocator_recent_tokens")  # a session has its own budget and tail
OPTIONS = {_short(item.name): item.name for item in fields(FocusConfig) if item.name not in _BY_BUDGET}


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(FocusConfig, stages=TRAINING):
    """MegaContext: the gist tree, what fills the working context, and how both are trained. Lengths in tokens or entries."""

    mc: int = flag(0, "train and use MegaContext's memory (0 or 1)", high=1, first=True)
    block_size: int = flag(32, "children per gist, r", low=2, shape=True)
    max_lod: int = flag(2, "highest level of gists in training; inference uses as many as the history needs", low=1)
    gistnet_type: str = flag(
        "transformer", "network that makes a gist of its children: a transformer, or their mean", ("transformer", "mean"), shape=True
    )  # fmt: skip
    gistnet_layers: int = flag(2, "transformer layers of GistNet over the children of a gist (2 or 4)", shape=True)
    gistnet_pooling: str = flag(
        "mean", "how the outputs of GistNet's layers become one vector", ("mean", "query", "cls"), shape=True
    )
    gistnet_head: str = flag("mlp", "last layer of GistNet", ("linear", "mlp"), shape=True)
    lensnet_layers: int = flag(2, "transformer layers of LensNet over the entries (2, 4 or 8)", shape=True)
    lensnet_head: str = flag(
        "mlp", "last layer of LensNet, from an entry's state to its score", ("linear", "mlp"), shape=True
    )
    routing_slots: int = flag(4, "routing keys of a node; 0 turns routing off", shape=True)
    routing_width: int = flag(64, "numbers in a routing key", low=1, shape=True)
    positional_type: str = flag(
        "slot",
        "rotary position of an entry: slot is its number in the context, simple its mean true position, gaussian the expectation "
        "over its span, gaussian_alibi also lowers attention by the logarithm of the text that gists hide",
        ("slot", "simple", "gaussian", "gaussian_alibi"),
    )
    mc_num_random_variants: int = flag(4, "random working contexts per training row beside the raw row, N")
    mc_train_wc_length: int = flag(0, "entries of a variant at the end of training; 0 is a fifth of the sequence")
    mc_start_wc_length: int = flag(
        0,
        "entries of a variant at step 0; 0 is four fifths of the sequence. Set it low to train a trained memory further",
    )
    mc_max_counterfactuals: int = flag(
        0, "single edits per row whose effect is measured, as labels for LensNet; 0 is none"
    )
    mc_recall_share: float = flag(0.0, "share of training rows that are generated recall tasks", high=1)
    mc_recall_answer_weight: float = flag(
        16.0, "loss weight of an answer's token where its evidence is raw; every other token has weight 1"
    )
    mc_auto_batch: int = _free(
        1,
        "halve the device batch until the rows and variants of --mc fit the free memory, measured once a run (0 or 1)",
        high=1,
    )
    mc_gist_loss_weight: float = flag(1.0, "weight of the variants' loss")
    mc_gist_teacher_share: float = flag(
        0.6,
        "distillation weight s of the variants' loss in text rows: target = (1 - s) * next token + s * prediction from the raw "
        "row; task rows use the next token alone",
        high=1,
    )
    mc_gist_penalty_weight: float = flag(
        0.1,
        "weight, within the variants' loss, of the distance between a variant's states of the tail and the raw row's",
    )
    mc_route_loss_weight: float = flag(
        1.0, "weight of the router's loss: finding the block that answers, telling questions from other text"
    )
    mc_lens_loss_weight: float = flag(
        0.1,
        "weight of LensNet's loss. It scales LensNet's learning rates as well, since Muon and Adam normalise gradients",
    )
    mc_lens_attention_weight: float = flag(
        1.0,
        "weight, within LensNet's loss, of the regression of scores on attention labels: how much the newest tokens attend to "
        "each old block in the raw row",
    )
    mc_lens_temperature: float = flag(
        1.0, "temperature of LensNet's Bradley-Terry preference loss and of its KL term; lower is sharper", above=0
    )
    mc_lens_adv_norm_beta: float = flag(0.9, "decay of the running scale that advantages are divided by", high=1)
    mc_lens_kl_weight: float = flag(0.0, "weight of the KL divergence of a row's scores from the uniform distribution")
    mc_lens_budget_smooth_weight: float = flag(0.0, "weight that holds a row's mean score near the running mean")
    mc_lens_budget_smooth_beta: float = flag(0.9, "decay of the running mean of the scores", high=1)
    mc_lens_hard_negative_ratio: float = flag(
        1.0,
        "share of each row's pairs kept in the preference loss, those that LensNet orders most wrongly first",
        high=1,
    )
    mc_lens_rank_weight: float = flag(0.5, "weight of LensNet's margin ranking loss")
    mc_lens_budget_weight: float = flag(
        0.1, "weight that keeps a row's mean score at 0, so that as much is collapsed as expanded"
    )
    mc_lens_margin: float = flag(0.1, "margin of LensNet's ranking loss, in units of preference")
    mc_aux_dtype: str = flag(
        "auto", "dtype that GistNet and LensNet compute in; auto is the model's", ("auto", "fp32", "bf16")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gistnet_layers not in GISTNET_LAYERS or self.lensnet_layers not in LENSNET_LAYERS:
            raise UserError(
                f"--gistnet_layers {self.gistnet_layers} must be 2 or 4, --lensnet_layers {self.lensnet_layers} 2, 4 or 8."
            )
        if self.routing_slots and self.block_size % self.routing_slots:
            raise UserError(
                f"--block_size {self.block_size} is not a multiple of --routing_slots {self.routing_slots}; each key covers as many tokens."
            )

    @property
    def focus(self) -> FocusConfig:
        """The focus settings alone."""
        return FocusConfig(**{item.name: getattr(self, item.name) for item in fields(FocusConfig)})


def overridden(focus: FocusConfig, values: dict[str, Any]) -> FocusConfig:
    """Focus settings with some replaced, by name of the flag. Raises UserError for what is no focus setting."""
    unknown = sorted(set(values) - {item.name for item in fields(FocusConfig)})
    if unknown:
        known = ", ".join(item.name for item in fields(FocusConfig))
        raise UserError(f"{', '.join(unknown)} is no focus setting; there are {known}.")
    return replace(focus, **values)
