"""The integers of an `--mc` step: which nodes each view shows, what each entry predicts, which blocks answer a question.

Everything is drawn on the CPU and depends on the seed, the rows' global positions and the progress of the run alone.

Shapes: B rows, T tokens, N variants of a row, V = B·N views of L entries, H horizon, n blocks before the tail, r block
size, M entries with a target, R rows that LensNet learns from, Q questions, Z windows without a question.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext.context.gist_function import levels_of
from megacontext.context.views import ViewPlan, next_token_targets
from megacontext.data.recall_words import QUESTION_TOKENS
from megacontext.data.stream import CHAT, TEXT, Batch
from megacontext.model.gpt import GPT
from megacontext.model.rotary import Rotary
from megacontext.model.router import QUERY_TOKENS
from megacontext.train.views import (
    RowRandom,
    ViewSettings,
    choose_blocks,
    draw_views,
    entry_of_token,
    raw_blocks,
    single_expansions,
)

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

NEGATIVE_WINDOWS = 8  # windows without a question that are drawn from a row: most text asks nothing
_NEGATIVES = -4  # the view number under which `RowRandom` draws them


@dataclass(frozen=True)
class ViewTensors:
    """V views of L entries = `shape`.

    Of all V·L entries: `gather` [V·L] rows of the node inputs; `rotary`; `of_level` entries of each level.
    Of the M entries with a target: `entry` [M] number among the V·L; `raw` [M] number among the B·T of the token that
    predicts the same target in the raw row; `distilled` [M] 1 where the raw row's prediction may be part of the target;
    `targets` [M]; `level` [M] of the entry; `share` [M] 1 / targets of the view, 0 where a target does not count;
    `weights` [M] share · loss weight of the target; `inverse` [M] 1 / weights, or 0.
    `newest` [V, H]: which of the M predict the last H tokens; `newest_weights` [V, H]: 1 / how many of them count.
    """

    shape: tuple[int, int]
    gather: Tensor
    rotary: Rotary
    entry: Tensor
    raw: Tensor
    distilled: Tensor
    targets: Tensor
    weights: Tensor
    share: Tensor
    inverse: Tensor
    level: Tensor
    newest: Tensor
    newest_weights: Tensor
    of_level: tuple[int, ...]


@dataclass(frozen=True)
class LensTensors:
    """The view of each of R rows on which LensNet is asked, and what its scores are compared with.

    `rows` [R] numbers of the rows; `gather` [R·L], `level` [R, L], `rotary` of the view's entries; `entry` [R, n·r] the
    entry that shows each token before the tail; `raw` [R, N, n] 1 where a variant shows a block raw, else -1.
    """

    shape: tuple[int, int]
    rows: Tensor
    gather: Tensor
    level: Tensor
    rotary: Rotary
    entry: Tensor
    raw: Tensor


@dataclass(frozen=True)
class EditTensors:
    """Single edits to measure: `before`, one view a row; `after`, the same view with one of `blocks` [B, k] expanded."""

    before: ViewTensors
    after: ViewTensors
    blocks: Tensor


@dataclass(frozen=True)
class RouteTensors:
    """Questions and their answers for the router.

    `windows` [Q, 32]: the ids that end with each question. `allowed` [Q, B·blocks]: the blocks to choose from: all of the
    other rows; of its own row those complete before the question, up to the last that states a fact. `positives` [Q, 3]:
    the latest fact and up to two earlier facts about the same key. `probability` [Q, 3]: the target of each, summing to 1.
    `weights` [Q]: 1 / questions of the row. `negatives` [Z, 32]: windows that end without a question;
    `negative_weights` [Z]: 1 / such windows of the row. Without questions Q is 0 and `positives` is [0, 1].
    """

    windows: Tensor
    allowed: Tensor
    positives: Tensor
    probability: Tensor
    weights: Tensor
    negatives: Tensor
    negative_weights: Tensor


@dataclass(frozen=True)
class MemoryPlan:
    """What a model with a memory needs of a micro-batch; parts that its settings do not ask for are None.

    `full` int64: numbers of the rows without padding; None: all rows. `seconds`: time that drawing took.
    """

    full: Tensor | None
    variants: ViewTensors | None
    lens: LensTensors | None
    edits: EditTensors | None
    questions: RouteTensors | None
    seconds: float


@dataclass(frozen=True)
class MemoryPlanner:
    """Draws the memory's part of step plans. `progress` of a draw: the share of the run that is done, 0 to 1."""

    model: GPT
    settings: ViewSettings
    seed: int

    def draw(self, batch: Batch, progress: float) -> MemoryPlan:
        """The plan of a micro-batch."""
        began = time.perf_counter()
        model, settings, memory = self.model, self.settings, self.model.memory
        assert memory is not None
        config, targets = memory.config, batch.targets.numpy()
        text = np.flatnonzero(batch.kind == TEXT)
        full = np.flatnonzero(batch.end == settings.tokens)
        taught = np.intersect1d(text, full)  # LensNet is judged by the newest tokens, and padding has none
        views = draw_views(settings, self.seed, batch.positions, progress, preferred_blocks(settings, batch, progress))
        variants = lens = edits = None
        if settings.variants:
            variants = view_tensors(model, settings, views.variants, targets, view_weights(views.variants, batch), text)
        if len(taught) and (settings.variants > 1 or config.mc_max_counterfactuals or config.mc_lens_attention_weight):
            lens = lens_tensors(model, settings, views.reference, views.variants, taught)
            if config.mc_max_counterfactuals:
                blocks = choose_blocks(settings, self.seed, batch.positions, config.mc_max_counterfactuals)
                before, after = (
                    view_tensors(model, settings, plan, targets) for plan in single_expansions(settings, blocks)
                )
                edits = EditTensors(before, after, _tensor(blocks))
        asks = bool(config.routing_slots and config.mc_recall_share)
        questions = route_tensors(settings, self.seed, batch) if asks else None
        part = None if len(full) == len(batch.kind) else _tensor(full)
        return MemoryPlan(part, variants, lens, edits, questions, time.perf_counter() - began)


def level_counts(settings: ViewSettings) -> list[int]:
    """Tokens of a row, then its nodes of every level."""
    r, top = settings.block_size, levels_of(settings.tokens, settings.block_size, settings.max_lod)
    return [settings.tokens // r**level for level in range(top + 1)]


def view_tensors(
    model: GPT,
    settings: ViewSettings,
    plan: ViewPlan,
    targets: npt.NDArray[np.integer],
    weights: F32 | None = None,
    distilled: Sequence[int] | I64 | None = None,
) -> ViewTensors:
    """Tensors of views of one length of the rows whose targets are [B, T]: -1 where one does not count.

    `weights` [V, T]: loss weights of the targets; all are 1 without them. `distilled`: numbers of the rows whose targets
    may be the raw row's predictions; all rows without it.
    """
    views, length = plan.lod.shape
    assert (plan.length == length).all(), "views of a step have one length"
    shifted = np.concatenate([np.zeros((len(targets), 1), np.int64), targets], 1)  # token e is target e - 1
    predicts = plan.target_tokens() >= 0
    entry = np.flatnonzero(predicts)
    target = next_token_targets(plan, shifted).reshape(-1)[entry]
    counted = target >= 0
    view = entry // length
    per_view = np.bincount(view[counted], minlength=views)[view]
    newest = np.cumsum(predicts.sum(1))[:, None] + np.arange(-settings.horizon, 0)
    newest_counted = counted[newest]
    token = plan.target_tokens().reshape(-1)[entry] - 1
    row = plan.sequence[view]
    weight = np.ones(len(entry)) if weights is None else weights[view, np.minimum(token, targets.shape[1] - 1)]
    weight = np.where(counted, weight, 1)
    return ViewTensors(
        shape=(views, length),
        gather=_tensor(plan.gather_index(level_counts(settings)).reshape(-1)),
        rotary=_rotary(model, plan),
        entry=_tensor(entry),
        raw=_tensor(row * targets.shape[1] + token),
        distilled=_tensor(np.ones(len(entry)) if distilled is None else np.isin(row, distilled).astype(np.float64)),
        targets=_tensor(target),
        weights=_tensor(counted * weight / np.maximum(per_view, 1)),
        share=_tensor(counted / np.maximum(per_view, 1)),
        inverse=_tensor(np.where(counted, per_view, 0) / weight),
        level=_tensor(plan.lod.reshape(-1)[entry]),
        newest=_tensor(newest),
        newest_weights=_tensor(newest_counted / np.maximum(newest_counted.sum(1, keepdims=True), 1)),
        of_level=tuple(np.bincount(plan.lod.reshape(-1), minlength=settings.max_lod + 1).tolist()),
    )


def lens_tensors(model: GPT, settings: ViewSettings, reference: ViewPlan, variants: ViewPlan, rows: I64) -> LensTensors:
    """Tensors of LensNet's part of a step for `rows` [R] of the batch."""
    r = settings.block_size
    shown = raw_blocks(variants, settings.blocks).reshape(len(reference.length), settings.variants, settings.blocks)
    plan = ViewPlan(reference.lod[rows], reference.index[rows], reference.length[rows], reference.sequence[rows], r)
    return LensTensors(
        shape=(len(rows), plan.lod.shape[1]),
        rows=_tensor(rows),
        gather=_tensor(plan.gather_index(level_counts(settings)).reshape(-1)),
        level=_tensor(plan.lod),
        rotary=_rotary(model, plan),
        entry=_tensor(entry_of_token(plan, settings.blocks * r)),
        raw=_tensor(np.where(shown[rows], 1.0, -1.0)),
    )


@dataclass(frozen=True)
class _Asked:
    """Q questions: `row`, `position` of the last token, `positives` and their `probability` [Q, 3], and `known`, how many
    blocks of the row may answer."""

    row: I64
    position: I64
    positives: I64
    probability: F32
    known: I64


def route_tensors(settings: ViewSettings, seed: int, batch: Batch) -> RouteTensors:
    """Tensors of the questions of a micro-batch and of windows in which nothing is asked."""
    blocks, r = settings.tokens // settings.block_size, settings.block_size
    asked = _asked(batch, r)
    row_of_block, block = np.divmod(np.arange(len(batch.ids) * blocks), blocks)
    allowed = (row_of_block != asked.row[:, None]) | (block < asked.known[:, None])
    negative_row, negative = _negatives(seed, batch)
    ids, columns = batch.ids.numpy(), np.arange(1 - QUERY_TOKENS, 1)
    return RouteTensors(
        windows=_tensor(ids[asked.row[:, None], asked.position[:, None] + columns]),
        allowed=_tensor(allowed),
        positives=_tensor(asked.row[:, None] * blocks + asked.positives),
        probability=_tensor(asked.probability),
        weights=_tensor(1.0 / np.bincount(asked.row)[asked.row]),
        negatives=_tensor(ids[negative_row[:, None], negative[:, None] + columns]),
        negative_weights=_tensor(1.0 / np.bincount(negative_row)[negative_row]),
    )


def _asked(batch: Batch, block_size: int) -> _Asked:
    """The questions of a batch that a whole query window ends with."""
    questions = batch.questions
    if questions is None:
        none = np.empty(0, np.int64)
        return _Asked(none, none, np.empty((0, 1), np.int64), np.empty((0, 1), np.float32), none)
    row, number = np.nonzero(questions.position >= QUERY_TOKENS - 1)
    position = questions.position[row, number]
    latest, earlier = questions.evidence[row, number][:, None], questions.earlier[row, number]
    stated = np.concatenate([latest, earlier], 1) >= 0
    positives = np.concatenate([latest, np.where(earlier >= 0, earlier, latest)], 1)
    complete = (position + 1 - QUESTION_TOKENS) // block_size  # blocks that were complete before the question
    facts = questions.evidence.max(1)[row] + 1  # later blocks hold answers to the same questions
    probability = (stated / stated.sum(1, keepdims=True)).astype(np.float32)
    return _Asked(row, position, positives, probability, np.minimum(complete, facts))


def _negatives(seed: int, batch: Batch) -> tuple[I64, I64]:
    """Rows and last tokens [Z] of windows without a question: anywhere in text, before the first question of a task.

    Conversations give none: a person's question is no negative. Windows ending shortly after a question are neither
    positive nor negative: the router decides from token age how long a question stays active (about 12 tokens).
    """
    end = batch.end.copy()  # of the places to draw from
    if batch.questions is not None:
        position = batch.questions.position
        end = np.minimum(end, np.where(position >= 0, position + 1 - QUESTION_TOKENS, end[:, None]).min(1))
    rows = np.flatnonzero((end >= QUERY_TOKENS) & (batch.kind != CHAT))
    drawn = RowRandom(seed, batch.positions[rows], np.full(len(rows), _NEGATIVES)).random((len(rows), NEGATIVE_WINDOWS))
    first = QUERY_TOKENS - 1
    place = first + (drawn * (end[rows, None] - first)).astype(np.int64)
    return np.repeat(rows, NEGATIVE_WINDOWS), place.reshape(-1)


def preferred_blocks(settings: ViewSettings, batch: Batch, progress: float) -> Bool:
    """[B, n]: blocks before the tail that a good context would show raw.

    Of a row with questions: those that hold the answers. Of other rows: the newest before the padding, as many as a
    variant has room for; none with one variant a row, whose blocks are drawn uniformly.
    """
    preferred = np.zeros((len(batch.positions), settings.blocks), bool)
    room = settings.room(settings.entries(progress)) if settings.variants > 1 else 0
    last = np.minimum(settings.blocks, batch.end // settings.block_size)[:, None]
    block = np.arange(settings.blocks)
    preferred |= (block >= last - room) & (block < last)
    if batch.questions is not None:
        evidence = batch.questions.evidence
        preferred[(batch.questions.position >= 0).any(1)] = False
        row, number = np.nonzero((evidence >= 0) & (evidence < settings.blocks))
        preferred[row, evidence[row, number]] = True
    return preferred


def view_weights(plan: ViewPlan, batch: Batch) -> F32 | None:
    """Loss weights [V, T] of the targets of views: those of the batch, but 1 at an answer whose evidence is not raw in
    the view, which cannot be learned there."""
    if batch.weights is None:
        return None
    weights = np.array(batch.weights.numpy()[plan.sequence])
    if batch.questions is not None:
        raw = raw_blocks(plan, batch.inputs.shape[1] // plan.block_size)
        position, block = batch.questions.position[plan.sequence], batch.questions.evidence[plan.sequence]
        shown = np.take_along_axis(raw, np.clip(block, 0, raw.shape[1] - 1), 1) & (block >= 0)
        view, number = np.nonzero(~shown & (position >= 0))
        weights[view, position[view, number]] = 1
    return weights


def _rotary(model: GPT, plan: ViewPlan) -> Rotary:
    """Rotary of views of one length."""
    slots = torch.arange(plan.lod.shape[1])[None]
    memory = model.memory
    assert memory is not None
    if memory.config.positional_type == "slot":
        return model.entry_rotary(slots.double(), slots.double(), slots)
    end = torch.from_numpy(plan.tokens)
    return model.entry_rotary(torch.from_numpy(plan.positions), torch.from_numpy(plan.sigmas), slots, end)


def _tensor(array: npt.NDArray[np.generic]) -> Tensor:
    """A CPU tensor: integers int64, numbers float32, truth bool."""
    kinds = {"i": np.int64, "f": np.float32, "b": np.bool_}
    return torch.from_numpy(np.ascontiguousarray(array, kinds[array.dtype.kind]))
