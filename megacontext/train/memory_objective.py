"""What `--mc` minimizes: next-token loss of the raw rows and of random working contexts of them, and the lens's losses.

One pass over a micro-batch: ids → embeddings and gists, with gradient → views, by one gather → the GPT on all of them →
losses by name. The raw view is the vanilla forward pass, so its loss is what the run without `--mc` would have had; what
it predicts, knowing all of the row, is part of the variants' targets (context distillation: Snell et al., 2022,
arXiv:2209.15189).

    total = token + mc_gist_loss_weight·(variants' loss + mc_gist_penalty_weight·penalty)
            + mc_lens_loss_weight·lens + mc_route_loss_weight·route

Shapes: B rows, T tokens, N variants of a row, V = B·N views of L entries, D width, n blocks before the tail.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megacontext.context.gist_function import build_levels
from megacontext.data.stream import Batch
from megacontext.model.cross_entropy import taught_cross_entropy, weighted_cross_entropy
from megacontext.model.gpt import GPT, SOFTCAP
from megacontext.model.memory import Memory
from megacontext.model.rotary import Rotary
from megacontext.train.attention_labels import block_attention, first_labelled, relative_scores
from megacontext.train.lens_loss import RunningScales, compare, correlation, lens_terms, route, utility_loss
from megacontext.train.meter import Meter
from megacontext.train.step_plan import (
    LensTensors,
    RouteTensors,
    ViewTensors,
    kept_blocks,
    lens_tensors,
    route_tensors,
    row_emphasis,
    text_rows,
    view_emphasis,
    view_tensors,
)
from megacontext.train.throughput import Stopwatch
from megacontext.train.views import ViewSettings, choose_blocks, draw_views, single_expansions

LENS_TERMS = ("preference", "rank", "budget", "budget_smooth", "kl", "utility", "attention")


class MemoryObjective:
    """Losses of a run with a memory. `model` may be compiled: `view_trunk` is then its trunk for the variants, whose length
    changes through the curriculum, compiled for all lengths at once. `progress` says what share of the run a step begins with.

    `rows_per_step` is that of all workers: losses are scaled so that gradients averaged over the workers are those of
    one. `running` is updated by `finish`, and is all that is carried from step to step.
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
        self.seed, self.rows_per_step, self.world_size = seed, rows_per_step, world_size
        self.progress, self.running = progress, running
        self._view_trunk = view_trunk or model.trunk
        self.meter = Meter(_metric_names(self.settings), model.device)
        self._step = 0

    def begin(self, step: int) -> None:
        """Start a step."""
        self._step = step
        self.meter.reset()

    def loss(self, batch: Batch, device: torch.device, scale: float, watch: Stopwatch) -> Tensor:
        """The loss of a micro-batch, with gradient; `scale` is that of the token loss per target, as for vanilla rows.

        Time spent on plans is marked "controller".
        """
        config, settings = self.config, self.settings
        progress = self.progress(self._step)
        kept = kept_blocks(settings, batch, settings.entries(progress))
        views = draw_views(settings, self.seed, batch.positions, progress, kept)
        targets = batch.targets.numpy()
        text = text_rows(batch)
        variants = lens = None
        if settings.variants:
            heavy = view_emphasis(settings, views.variants, batch, config.mc_recall_answer_weight)
            variants = view_tensors(self.model, settings, views.variants, targets, device, heavy, text)
        if len(text) and (settings.variants > 1 or config.mc_max_counterfactuals or config.mc_lens_attention_weight):
            lens = lens_tensors(self.model, settings, views.reference, views.variants, text, device)
        questions = route_tensors(settings, self.seed, batch, device) if self.memory.routes else None
        watch.mark("controller")

        ids = batch.inputs.to(device, non_blocking=True)
        levels = build_levels(ids, self.memory, settings.max_lod)
        x = self.model.embed(ids)
        table = node_table(self.memory, x, levels)
        heavy = row_emphasis(batch, config.mc_recall_answer_weight)
        answers = None if heavy is None else torch.from_numpy(heavy).to(device, non_blocking=True)
        layer_inputs: list[Tensor] | None = [] if lens is not None and config.mc_lens_attention_weight else None
        total, hidden, base = self._raw(x, batch.targets.to(device, non_blocking=True), scale, answers, layer_inputs)
        advantage = base.new_zeros(len(ids), 0)
        if variants is not None:
            loss, newest = self.variants_loss(table, variants, hidden)
            total = total + config.mc_gist_loss_weight * loss
            advantage = newest.view(len(ids), -1) - base[:, None]
        if lens is not None:
            loss = self._lens(table, lens, advantage, layer_inputs, batch)
            total = total + config.mc_lens_loss_weight * loss
        if questions is not None:
            total = total + config.mc_route_loss_weight * self._route(levels[0], questions)
        return total

    def _raw(
        self, x: Tensor, targets: Tensor, scale: float, emphasis: Tensor | None, layer_inputs: list[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The vanilla forward pass: loss, hidden [B, T, D], and mean loss [B] of the newest H tokens, detached.

        `emphasis` [B, T] weighs the targets in the loss; what is measured has equal weights. A list of `layer_inputs`
        is filled with them.
        """
        hidden = self.model.trunk(x, self.model.rotary_table.slice(0, x.shape[1], x.device), layer_inputs=layer_inputs)
        counted = (targets >= 0).float()
        weights = counted if emphasis is None else counted * emphasis
        total, losses = self._cross_entropy(hidden.flatten(0, 1), targets.reshape(-1), weights.reshape(-1))
        losses = losses.view(targets.shape) if emphasis is None else losses.view(targets.shape) / emphasis
        if emphasis is not None:
            self.meter.add("answer_loss", (losses * (emphasis > 1)).sum(), (counted * (emphasis > 1)).sum())
        self.meter.add("token_loss", losses.sum(), counted.sum())
        newest = slice(targets.shape[1] - self.settings.horizon, None)
        return total * scale, hidden, losses[:, newest].sum(1) / counted[:, newest].sum(1).clamp(min=1)

    def variants_loss(self, table: Tensor, views: ViewTensors, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the variants with its penalty, and mean losses [V] of the newest H tokens, detached."""
        states = self._states(table, views)
        flat = states.flatten(0, 1).index_select(0, views.rows)
        total, losses = self._taught(flat, views, hidden)
        nats = losses * views.inverse
        scale = self.world_size / (self.rows_per_step * self.settings.variants)
        count = views.shape[0]
        penalty = tail_distance(states, hidden.detach(), self.settings)
        loss = total + self.config.mc_gist_penalty_weight * count * penalty
        self.meter.add("gist_loss", loss.detach(), count)
        self.meter.add("gist_ce", (nats * views.share).sum(), count)
        self.meter.add("gist_penalty", penalty.detach() * count, count)
        by_level = torch.zeros(2, self.settings.max_lod + 1, device=nats.device)
        by_level[0].index_add_(0, views.level, nats.float())
        by_level[1].index_add_(0, views.level, (views.inverse > 0).float())
        for level in range(self.settings.max_lod + 1):
            self.meter.add(f"lod_loss/{level}", by_level[0, level], by_level[1, level])
            self.meter.add(f"lod_count/{level}", views.of_level[level], count)
        return loss * scale, (nats[views.newest] * views.newest_weights).sum(1)

    def _taught(self, flat: Tensor, views: ViewTensors, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the states [M, D] that have a target, and cross-entropies [M].

        In text part of the target is what the raw row predicts there. A task's answer is known, and is learned as it is.
        """
        share = self.config.mc_gist_teacher_share
        if not share:
            return self._cross_entropy(flat, views.targets, views.weights)
        teacher = hidden.detach().flatten(0, 1).index_select(0, views.raw)
        total, losses, apart = taught_cross_entropy(
            flat, self.model.lm_head.weight, views.targets, views.weights, teacher, share * views.text, cap=SOFTCAP
        )
        self.meter.add("gist_kl", (apart * views.inverse * views.share).sum(), views.shape[0])
        return total, losses

    def _states(self, table: Tensor, views: ViewTensors) -> Tensor:
        entries = table.index_select(0, views.gather).view(*views.shape, -1)
        return self._view_trunk(entries, views.rotary)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_cross_entropy(hidden, self.model.lm_head.weight, targets, weights, cap=SOFTCAP)

    def _lens(
        self, table: Tensor, lens: LensTensors, advantage: Tensor, layer_inputs: list[Tensor] | None, batch: Batch
    ) -> Tensor:
        """The lens loss of the text rows, whose newest tokens are foreseeable; a task's questions are not, and are
        what the router is for."""
        seen = table.detach()  # the lens judges gists, it does not shape them
        entries = seen.index_select(0, lens.gather).view(*lens.shape, -1)
        scores = self.memory.scores(entries, lens.level, lens.rotary)
        scores = scores.gather(1, lens.entry).view(len(scores), -1, self.settings.block_size).mean(2)
        rows = len(scores)
        self.meter.add("policy_score_abs_mean", scores.abs().mean(1).sum(), rows)
        self.meter.add("policy_score_std_mean", scores.std(1, correction=0).sum(), rows)
        self.meter.add("score_mean", scores.mean(1).sum(), rows)
        terms = self._preferences(scores, lens.raw, advantage[lens.text])
        if self.config.mc_max_counterfactuals:
            terms["utility"] = self._utility(table, batch, scores, lens.text)
        if layer_inputs is not None:
            found = self._attention(layer_inputs, lens.text, scores)
            terms["attention"] = self.config.mc_lens_attention_weight * found
        for name, term in terms.items():
            self.meter.add(f"lens_{name}", term * rows, rows)
        loss = torch.stack(list(terms.values())).sum()
        self.meter.add("lens_loss", loss * rows, rows)
        return loss * (rows * self.world_size / self.rows_per_step)

    def _attention(self, layer_inputs: list[Tensor], text: Tensor, scores: Tensor) -> Tensor:
        """Mean squared distance of the scores [R, n] from those that the attention of the raw rows `text` [R] asks for."""
        settings = self.settings
        found = block_attention(self.model, layer_inputs, text, settings.horizon, settings.blocks, settings.block_size)
        first = first_labelled(settings.blocks, settings.block_size)
        wanted, scores = relative_scores(found[:, first:]), scores[:, first:]
        together, exists = correlation(scores.detach(), wanted)
        self.meter.add("attention_corr", together.sum(), exists.sum())
        return (scores - wanted).square().mean()

    def _preferences(self, scores: Tensor, raw: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        scale = self.running.advantage_scale(self.config.mc_lens_adv_norm_beta)
        pairs = compare(scores, raw, advantage, scale)
        meter, gap, margin = self.meter, pairs.gap, pairs.margin.detach()
        if not gap.numel():
            return lens_terms(scores, pairs, self.config, self.running)
        meter.add("gap_square", (gap * scale).square().sum(), gap.numel())
        meter.add("adv_delta_mean", advantage.sum(), advantage.numel())
        meter.add("adv_delta_std", advantage.std(correction=0), 1)
        meter.add("adv_delta_p95", advantage.flatten().quantile(0.95), 1)
        found, exists = correlation(pairs.preference.detach(), advantage)
        meter.add("preference_corr_mean", found.sum(), exists.sum())
        differs = (gap != 0).float()
        meter.add("preference_agreement", ((gap * margin > 0).float() * differs).sum(), differs.sum())
        meter.add("preference_pair_count", differs.sum(), self.world_size)
        return lens_terms(scores, pairs, self.config, self.running)

    @torch.no_grad()
    def _measure(self, table: Tensor, views: ViewTensors) -> Tensor:
        """Mean losses [V] of the newest H tokens of views."""
        states = self._states(table, views).flatten(0, 1)
        rows = views.rows[views.newest].flatten()
        counted = (views.newest_weights > 0).float().flatten()
        _, losses = self._cross_entropy(states.index_select(0, rows), views.targets[views.newest].flatten(), counted)
        return (losses.view(views.newest.shape) * views.newest_weights).sum(1)

    def _utility(self, table: Tensor, batch: Batch, scores: Tensor, text: Tensor) -> Tensor:
        """Loss of the scores of a few blocks against what expanding each was measured to be worth."""
        settings = self.settings
        chosen = choose_blocks(settings, self.seed, batch.positions, self.config.mc_max_counterfactuals)
        rows, count = chosen.shape
        base, single = single_expansions(settings, chosen)
        targets, device = batch.targets.numpy(), table.device
        before = self._measure(table, view_tensors(self.model, settings, base, targets, device))
        after = self._measure(table, view_tensors(self.model, settings, single, targets, device))
        utility = (before[:, None] - after.view(rows, count))[text]
        at = torch.from_numpy(chosen).to(device, non_blocking=True)[text]
        self.meter.add("utility_square", utility.square().sum(), utility.numel())
        return utility_loss(
            scores.gather(1, at), utility, self.running.utility_scale(self.config.mc_lens_adv_norm_beta)
        )

    def _route(self, leaves: Tensor, questions: RouteTensors) -> Tensor:
        """Loss of finding the block that answers, and of telling questions from text that asks nothing."""
        keys = self.memory.keys(leaves).flatten(0, 1)
        count, quiet = len(questions.windows), len(questions.quiet)
        queries, asked = self.memory.query(torch.cat([questions.windows, questions.quiet]))
        found = route(
            self.memory.route_logits(queries[:count], keys), questions.allowed, questions.evidence, questions.share
        )
        self.meter.add("route_loss", found.loss.detach().sum(), count)
        self.meter.add("route_accuracy", found.correct.sum(), count)
        self.meter.add("route_asked", asked[:count].sigmoid().sum(), count)
        self.meter.add("route_false_alarm", asked[count:].sigmoid().sum(), quiet)
        heard = ((found.loss + F.softplus(-asked[:count])) * questions.weights).sum()
        ignored = (F.softplus(asked[count:]) * questions.quiet_weights).sum()
        expected = self.rows_per_step * self.config.mc_recall_share  # rows with questions in a step
        return (heard / expected + ignored / self.rows_per_step) * self.world_size

    def finish(self, totals: list[float]) -> dict[str, float]:
        """Metrics `mc/…` of a step from the meter's totals, summed over the workers; every worker must call it."""
        means = self.meter.means(totals)
        self.running.update(self.config, means)
        rows, settings = self.rows_per_step, self.settings
        hidden = ("gap_square", "score_mean", "utility_square")
        return {
            **{f"mc/{name}": value for name, value in means.items() if name not in hidden},
            "mc/variants_total": float(rows * settings.variants),
            "mc/variants_mean": float(settings.variants),
            "mc/entries": float(settings.entries(self.progress(self._step))),
        }


def node_table(memory: Memory, x: Tensor, levels: list[Tensor]) -> Tensor:
    """Model inputs of every node of B rows, [B·nodes, D]: of each row the tokens x [B, T, D], then the levels' gists."""
    parts = [x]
    for number, records in enumerate(levels, 1):
        level = torch.full(records.shape[:2], number, device=x.device)
        parts.append(memory.tagged(memory.content(records).to(x.dtype), level))
    return torch.cat(parts, 1).flatten(0, 1)


def tail_distance(states: Tensor, raw_states: Tensor, settings: ViewSettings) -> Tensor:
    """How far the variants' states of the shared tail are from those of the raw row: 0 equal, 1 unrelated (1 - cosine).

    states [V, L, D] and raw_states [B, T, D], both of root mean square 1. What the gists hide is what moves them.
    """
    tail = settings.tail
    ours = states[:, states.shape[1] - tail :]
    theirs = raw_states[:, raw_states.shape[1] - tail :]
    distance = ours.reshape(len(theirs), -1, *ours.shape[1:]) - theirs[:, None]
    return 0.5 * distance.float().square().mean()


def _metric_names(settings: ViewSettings) -> tuple[str, ...]:
    levels = range(settings.max_lod + 1)
    return (
        "token_loss", "answer_loss", "gist_loss", "gist_ce", "gist_kl", "gist_penalty", "lens_loss", "route_loss", "route_accuracy",
        "route_asked", "route_false_alarm",
        "adv_delta_mean", "adv_delta_std", "adv_delta_p95", "preference_corr_mean", "preference_agreement",
        "preference_pair_count", "policy_score_abs_mean", "policy_score_std_mean", "gap_square", "score_mean",
        "utility_square", "attention_corr", *(f"lens_{name}" for name in LENS_TERMS), *(f"lod_loss/{level}" for level in levels),
        *(f"lod_count/{level}" for level in levels),
    )  # fmt: skip
