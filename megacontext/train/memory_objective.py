"""What `--mc` minimizes: next-token loss of the raw rows and of random working contexts of them, and LensNet's losses.

One pass over a micro-batch: ids → embeddings and gists, with gradient → views, by one gather → the GPT on all of them →
named losses. The raw view is the vanilla forward pass, so its loss is that of the run without `--mc`. The raw row's
predictions are part of the variants' targets (context distillation: Snell et al., 2022, arXiv:2209.15189).

    total = token + mc_gist_loss_weight·(variants' loss + mc_gist_penalty_weight·penalty)
            + mc_lens_loss_weight·lens + mc_route_loss_weight·route

Shapes: B rows, T tokens, N variants of a row, V = B·N views of L entries, D width, n blocks before the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megacontext.context.gist_function import build_levels
from megacontext.data.stream import Batch
from megacontext.model.cross_entropy import distillation_cross_entropy, weighted_cross_entropy
from megacontext.model.gpt import GPT, SOFTCAP
from megacontext.model.memory import Memory
from megacontext.model.rotary import Rotary
from megacontext.train import memory_metrics as metrics
from megacontext.train.attention_labels import block_attention, first_labelled, relative_scores
from megacontext.train.lens_loss import RunningScales, compare, lens_terms, utility_loss
from megacontext.train.memory_metrics import LensResult, RawResult, VariantsResult
from megacontext.train.memory_plan import EditTensors, LensTensors, MemoryPlanner, RouteTensors, ViewTensors
from megacontext.train.meter import Meter
from megacontext.train.objective import StepLoss
from megacontext.train.route_loss import route_loss
from megacontext.train.step_plan import StepPlan
from megacontext.train.throughput import Stopwatch
from megacontext.train.views import ViewSettings


class MemoryObjective:
    """The `Objective` of a run with a memory.

    `model` may be compiled: `view_trunk` is then its trunk for the variants, whose length changes through the curriculum,
    compiled for all lengths at once. `progress(step)`: the share of the run that is done when a step begins.
    `rows_per_step` counts the rows of all workers: losses are scaled so that gradients averaged over the workers are
    those of one worker. `running` is updated by `finish`, and is all that is carried from step to step.
    """

    def __init__(
        self,
        model: GPT,
        seed: int,
        rows_per_step: int,
        world_size: int,
        progress: Callable[[int], float],
        running: RunningScales,
        view_trunk: Callable[[Tensor, Rotary], Tensor] | None = None,
    ) -> None:
        assert model.memory is not None
        self.model, self.memory, self.config = model, model.memory, model.memory.config
        self.settings = ViewSettings.of(self.config, model.config.sequence_len)
        self.planner = MemoryPlanner(model, self.settings, seed)
        self.rows_per_step, self.world_size = rows_per_step, world_size
        self.progress, self.running = progress, running
        self._view_trunk = view_trunk or model.trunk
        self.meter = Meter(metrics.metric_names(self.settings.max_lod), model.device)
        self._step, self._plan_seconds = 0, 0.0

    def plan(self, batch: Batch) -> StepPlan:
        """Rows, views and questions of a micro-batch; the step is that of its rows' global positions."""
        step = int(batch.positions[0]) // self.rows_per_step
        return StepPlan.of(batch, self.planner.draw(batch, self.progress(step)))

    def begin(self, step: int) -> None:
        self._step, self._plan_seconds = step, 0.0
        self.meter.reset()

    def loss(self, plan: StepPlan, scale: float, watch: Stopwatch) -> Tensor:
        """The loss of a micro-batch, with gradient; `scale` is that of the token loss per target, as for vanilla rows."""
        config, memory, rows = self.config, plan.memory, len(plan.inputs)
        assert memory is not None
        self._plan_seconds += memory.seconds
        levels = build_levels(plan.inputs, self.memory, self.settings.max_lod)
        x = self.model.embed(plan.inputs)
        nodes = node_inputs(self.memory, x, levels)
        watch.mark("forward/tree")
        layer_inputs: list[Tensor] | None = [] if memory.lens is not None and config.mc_lens_attention_weight else None
        raw = self.raw_rows(x, plan, layer_inputs)
        total = raw.loss * scale
        metrics.record_raw(self.meter, raw)
        watch.mark("forward/raw")
        advantage = raw.newest.new_zeros(rows, 0)
        if memory.variants is not None:
            variants = self.variants(nodes, memory.variants, raw.hidden, memory.full)
            per_view = self.world_size / (self.rows_per_step * self.settings.variants)
            total = total + config.mc_gist_loss_weight * (variants.loss * per_view)
            advantage = variants.newest.view(rows, -1) - raw.newest[:, None]
            metrics.record_variants(self.meter, variants, memory.variants)
            watch.mark("forward/variants")
        if memory.lens is not None:
            lens = self._lens(nodes, memory.lens, advantage, layer_inputs, memory.edits)
            per_row = len(lens.scores) * self.world_size / self.rows_per_step
            total = total + config.mc_lens_loss_weight * (lens.loss * per_row)
            metrics.record_lens(self.meter, lens, self.world_size)
            watch.mark("forward/lens")
        if memory.questions is not None:
            total = total + config.mc_route_loss_weight * self._route(levels[0], memory.questions)
            watch.mark("forward/route")
        return total

    def raw_rows(self, x: Tensor, plan: StepPlan, layer_inputs: list[Tensor] | None) -> RawResult:
        """The vanilla forward pass over embeddings x [B, T, D]; a list of `layer_inputs` is filled with those of each layer."""
        hidden = self.model.trunk(x, self.model.rotary_table.slice(0, x.shape[1], x.device), layer_inputs=layer_inputs)
        targets, counted = plan.targets, (plan.targets >= 0).float()
        weights = counted if plan.weights is None else plan.weights
        total, losses = self._cross_entropy(hidden.flatten(0, 1), targets.reshape(-1), weights.reshape(-1))
        losses, answers = losses.view(targets.shape), None
        if plan.weights is not None:
            losses = losses / torch.where(weights != 0, weights, 1.0)
            answers = (weights > 1).float()
        newest = slice(targets.shape[1] - self.settings.horizon, None)
        mean = losses[:, newest].sum(1) / counted[:, newest].sum(1).clamp(min=1)
        return RawResult(total, hidden, losses, counted, answers, mean)

    def variants(self, nodes: Tensor, views: ViewTensors, hidden: Tensor, full: Tensor | None) -> VariantsResult:
        """Losses of the variants, whose teacher is the raw row's `hidden` [B, T, D]."""
        states = self._states(nodes, views)
        flat = states.flatten(0, 1).index_select(0, views.entry)
        share = self.config.mc_gist_teacher_share
        divergences = None
        if share:
            teacher = hidden.detach().flatten(0, 1).index_select(0, views.raw)
            total, losses, divergences = distillation_cross_entropy(
                flat,
                self.model.lm_head.weight,
                views.targets,
                views.weights,
                teacher,
                share * views.distilled,
                cap=SOFTCAP,
            )
        else:
            total, losses = self._cross_entropy(flat, views.targets, views.weights)
        nats = losses * views.inverse
        penalty = tail_distance(states, hidden.detach(), self.settings.tail, full)
        loss = total + self.config.mc_gist_penalty_weight * views.shape[0] * penalty
        return VariantsResult(loss, nats, divergences, penalty, self._newest(nats, views))

    def _lens(
        self,
        nodes: Tensor,
        lens: LensTensors,
        advantage: Tensor,
        layer_inputs: list[Tensor] | None,
        edits: EditTensors | None,
    ) -> LensResult:
        """LensNet's loss on rows of text: their newest tokens can be foreseen, a task's question cannot."""
        entries = nodes.detach().index_select(0, lens.gather).view(*lens.shape, -1)  # LensNet does not shape gists
        scores = self.memory.scores(entries, lens.level, lens.rotary)
        scores = scores.gather(1, lens.entry).view(len(scores), -1, self.settings.block_size).mean(2)
        advantage = advantage[lens.rows]
        scale = self.running.advantage_scale(self.config.mc_lens_adv_norm_beta)
        pairs = compare(scores, lens.raw, advantage, scale)
        terms, labels, utility = lens_terms(scores, pairs, self.config, self.running), None, None
        if edits is not None:
            utility = self._utility(nodes, edits)[lens.rows]
            spread = self.running.utility_scale(self.config.mc_lens_adv_norm_beta)
            terms["utility"] = utility_loss(scores.gather(1, edits.blocks[lens.rows]), utility, spread)
        if layer_inputs is not None:
            labels = self.attention_labels(layer_inputs, lens.rows)
            distance = (scores[:, scores.shape[1] - labels.shape[1] :] - labels).square().mean()
            terms["attention"] = self.config.mc_lens_attention_weight * distance
        loss = torch.stack(list(terms.values())).sum()
        return LensResult(loss, terms, scores, pairs, advantage, scale, labels, utility)

    def attention_labels(self, layer_inputs: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Scores [R, n'] that the attention of the raw `rows` [R] asks for, of all blocks from `first_labelled` on."""
        s = self.settings
        attention = block_attention(self.model, layer_inputs, rows, s.horizon, s.blocks, s.block_size)
        return relative_scores(attention[:, first_labelled(s.blocks, s.block_size) :])

    @torch.no_grad()
    def _utility(self, nodes: Tensor, edits: EditTensors) -> Tensor:
        """Nats [B, k] by which expanding each of `edits.blocks` alone improves the newest tokens."""
        before, after = (self._measure(nodes, views) for views in (edits.before, edits.after))
        return before[:, None] - after.view(edits.blocks.shape)

    def _measure(self, nodes: Tensor, views: ViewTensors) -> Tensor:
        """Mean losses [V] of the newest H tokens of views."""
        states = self._states(nodes, views).flatten(0, 1)
        entry = views.entry[views.newest].flatten()
        counted = (views.newest_weights > 0).float().flatten()
        _, losses = self._cross_entropy(states.index_select(0, entry), views.targets[views.newest].flatten(), counted)
        return (losses.view(views.newest.shape) * views.newest_weights).sum(1)

    def _route(self, leaves: Tensor, questions: RouteTensors) -> Tensor:
        """The router's loss of a micro-batch as a share of the step's."""
        result = route_loss(self.memory, leaves, questions)
        metrics.record_route(self.meter, result)
        expected = self.rows_per_step * self.config.mc_recall_share  # rows with questions in a step
        return (result.positive_loss / expected + result.negative_loss / self.rows_per_step) * self.world_size

    def _states(self, nodes: Tensor, views: ViewTensors) -> Tensor:
        """Hidden states [V, L, D] of views."""
        entries = nodes.index_select(0, views.gather).view(*views.shape, -1)
        return self._view_trunk(entries, views.rotary)

    def _newest(self, nats: Tensor, views: ViewTensors) -> Tensor:
        return (nats[views.newest] * views.newest_weights).sum(1)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_cross_entropy(hidden, self.model.lm_head.weight, targets, weights, cap=SOFTCAP)

    def totals(self) -> Tensor:
        return self.meter.totals()

    def finish(self, loss: float, totals: Sequence[float]) -> StepLoss:
        """Metrics `mc/…` of a step; the loss is that of the raw rows, which compares with a run without a memory."""
        means = self.meter.means(totals)
        self.running.update(self.config, means)
        settings = self.settings
        return StepLoss(
            means["token_loss"],
            {
                "mc/loss": loss,
                **{f"mc/{name}": value for name, value in means.items() if name not in metrics.INTERNAL},
                "mc/variants_total": float(self.rows_per_step * settings.variants),
                "mc/variants_mean": float(settings.variants),
                "mc/entries": float(settings.entries(self.progress(self._step))),
                "mc/time_controller_ms": 1e3 * self._plan_seconds,
            },
        )

    def state_dict(self) -> dict[str, Any]:
        return self.running.state_dict()


def node_inputs(memory: Memory, x: Tensor, levels: list[Tensor]) -> Tensor:
    """Model inputs of every node of B rows, [B·nodes, D]: of each row the tokens x [B, T, D], then the levels' gists."""
    parts = [x]
    for number, records in enumerate(levels, 1):
        level = torch.full(records.shape[:2], number, device=x.device)
        parts.append(memory.tagged(memory.content(records).to(x.dtype), level))
    return torch.cat(parts, 1).flatten(0, 1)


def tail_distance(states: Tensor, raw_states: Tensor, tail: int, rows: Tensor | None = None) -> Tensor:
    """Mean distance of the variants' states of the shared tail from those of the raw row: 0 equal, 1 unrelated (1 - cosine).

    states [V, L, D] and raw_states [B, T, D], both of root mean square 1. `rows`: the rows that count; None: all.
    """
    ours = states[:, states.shape[1] - tail :].reshape(len(raw_states), -1, tail, states.shape[2])
    theirs = raw_states[:, raw_states.shape[1] - tail :]
    if rows is not None:
        ours, theirs = ours[rows], theirs[rows]
        if not len(rows):
            return states.new_zeros((), dtype=torch.float32)
    distance = ours - theirs[:, None]
    return 0.5 * distance.float().square().mean()
