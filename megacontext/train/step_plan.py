"""Everything that a training step with a memory has to know and that is integers: made on the CPU, moved once.

Shapes: B rows, T tokens, N variants of a row, V = B·N views of L entries, H horizon, n blocks before the tail, r block
size, M entries with a target, Q questions, Z windows without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext.context.gist_function import levels_of
from megacontext.context.views import ViewPlan, next_token_targets
from megacontext.data.recall_words import QUESTION_TOKENS
from megacontext.data.stream import Batch
from megacontext.model.gpt import GPT
from megacontext.model.rotary import Rotary
from megacontext.model.router import QUERY_TOKENS
from megacontext.train.recall_mix import RecallBatch
from megacontext.train.views import RowRandom, ViewSettings, entry_of_token, raw_blocks

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

QUIET_WINDOWS = 8  # of a row, to learn from that most text asks nothing
_QUIET = -4  # the number under which `RowRandom` draws them


@dataclass(frozen=True)
class ViewTensors:
    """Views of one length as a model reads and is judged by them.

    `gather` [V·L] rows of the table of nodes; `rotary` of the entries; `of_level` how many of all entries are of each
    level. Of the M entries that have a target: `rows` [M] their number in V·L, `raw` [M] the number in B·T of the token
    that predicts the same in the raw row, `text` [M] 1 in rows that are text and 0 in tasks, `targets` [M], `level` [M],
    `share` [M], 1 over the targets of the view and 0 where a target does not count, `weights` [M], that times its
    emphasis, `inverse` [M], 1 over the weight or 0. `newest` [V, H] which of the M predict the last H tokens,
    `newest_weights` [V, H], 1 over how many of them count.
    """

    shape: tuple[int, int]
    gather: Tensor
    rotary: Rotary
    rows: Tensor
    raw: Tensor
    text: Tensor
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
    """What the lens sees of the rows it is trained on, numbers `text` [R] of the batch, and is judged by: `gather` [R·L],
    `level` [R, L], `rotary` of the reference views; `entry` [R, n·r] the entry that shows each token before the tail;
    `raw` [R, N, n] 1 or -1, how the variants show the blocks."""

    shape: tuple[int, int]
    gather: Tensor
    level: Tensor
    rotary: Rotary
    entry: Tensor
    raw: Tensor
    text: Tensor


@dataclass(frozen=True)
class RouteTensors:
    """Questions with a known answer: `windows` [Q, 32] the ids that end with each; `allowed` [Q, B·blocks], true for the
    blocks to choose from, all of other rows' and of its own those read by then, up to the last with a fact;
    `evidence` [Q, 3] the right one and, as good a match by what it says, those before it about the same key, in `share`
    [Q, 3] of one (in a micro-batch without questions [0, 1]); `weights` [Q], 1 over the questions of the row.

    And Z windows that ask nothing: `quiet` [Z, 32], `quiet_weights` [Z], 1 over those of the row."""

    windows: Tensor
    allowed: Tensor
    evidence: Tensor
    share: Tensor
    weights: Tensor
    quiet: Tensor
    quiet_weights: Tensor


def level_counts(settings: ViewSettings) -> list[int]:
    """Tokens of a row, then its nodes of every level."""
    r, top = settings.block_size, levels_of(settings.tokens, settings.block_size, settings.max_lod)
    return [settings.tokens // r**level for level in range(top + 1)]


def view_tensors(
    model: GPT,
    settings: ViewSettings,
    plan: ViewPlan,
    targets: npt.NDArray[np.integer],
    device: torch.device,
    emphasis: F32 | None = None,
    text: I64 | None = None,
) -> ViewTensors:
    """Tensors of views of one length of the rows whose targets are [B, T]: -1 where one does not count.

    `emphasis` [V, T]: weights of the targets, all 1 without it. `text`: numbers of the rows that are text, not tasks; all
    are without it.
    """
    views, length = plan.lod.shape
    assert (plan.length == length).all(), "views of a step have one length"
    shifted = np.concatenate([np.zeros((len(targets), 1), np.int64), targets], 1)  # token e is target e - 1
    predicts = plan.target_tokens() >= 0
    rows = np.flatnonzero(predicts)
    aim = next_token_targets(plan, shifted).reshape(-1)[rows]
    counted = aim >= 0
    view = rows // length
    per_view = np.bincount(view[counted], minlength=views)[view]
    last = np.cumsum(predicts.sum(1))[:, None] + np.arange(-settings.horizon, 0)
    fresh = counted[last]
    token = plan.target_tokens().reshape(-1)[rows] - 1
    owner = plan.sequence[view]
    heavy = np.ones(len(rows)) if emphasis is None else emphasis[view, np.minimum(token, targets.shape[1] - 1)]
    moved = _moved(
        {
            "gather": plan.gather_index(level_counts(settings)).reshape(-1),
            "rows": rows,
            "raw": owner * targets.shape[1] + token,
            "text": np.ones(len(rows)) if text is None else np.isin(owner, text).astype(np.float64),
            "targets": aim,
            "weights": counted * heavy / np.maximum(per_view, 1),
            "share": counted / np.maximum(per_view, 1),
            "inverse": np.where(counted, per_view, 0) / heavy,
            "level": plan.lod.reshape(-1)[rows],
            "newest": last,
            "newest_weights": fresh / np.maximum(fresh.sum(1, keepdims=True), 1),
        },
        device,
    )
    of_level = tuple(np.bincount(plan.lod.reshape(-1), minlength=settings.max_lod + 1).tolist())
    return ViewTensors(shape=(views, length), rotary=_rotary(model, plan, device), of_level=of_level, **moved)


def lens_tensors(
    model: GPT, settings: ViewSettings, reference: ViewPlan, variants: ViewPlan, text: I64, device: torch.device
) -> LensTensors:
    """Tensors of the lens's part of a step for rows `text` [R] of the batch."""
    r = settings.block_size
    shown = raw_blocks(variants, settings.blocks).reshape(len(reference.length), settings.variants, settings.blocks)
    chosen = ViewPlan(reference.lod[text], reference.index[text], reference.length[text], reference.sequence[text], r)
    moved = _moved(
        {
            "gather": chosen.gather_index(level_counts(settings)).reshape(-1),
            "level": chosen.lod,
            "entry": entry_of_token(chosen, settings.blocks * r),
            "raw": np.where(shown[text], 1.0, -1.0),
            "text": text,
        },
        device,
    )
    return LensTensors(shape=(len(text), chosen.lod.shape[1]), rotary=_rotary(model, chosen, device), **moved)


def route_tensors(settings: ViewSettings, seed: int, batch: Batch, device: torch.device) -> RouteTensors:
    """Tensors of the questions of a micro-batch, none if it has none, and of places drawn in every row where nothing is
    asked: anywhere in text, before the first question in a task, whose facts state and do not ask."""
    blocks, r = settings.tokens // settings.block_size, settings.block_size
    row, position, evidence, share, known = _questions(batch, r)
    owner, block = np.divmod(np.arange(len(batch.ids) * blocks), blocks)
    allowed = (owner != row[:, None]) | (block < known[:, None])
    quiet_row, quiet = _quiet(seed, batch)
    ids, columns = batch.ids.numpy(), np.arange(1 - QUERY_TOKENS, 1)
    return RouteTensors(
        **_moved(
            {
                "windows": ids[row[:, None], position[:, None] + columns],
                "allowed": allowed,
                "evidence": row[:, None] * blocks + evidence,
                "share": share,
                "weights": 1.0 / np.bincount(row)[row],
                "quiet": ids[quiet_row[:, None], quiet[:, None] + columns],
                "quiet_weights": 1.0 / np.bincount(quiet_row)[quiet_row],
            },
            device,
        )
    )


def _questions(batch: Batch, block_size: int) -> tuple[I64, I64, I64, F32, I64]:
    """Row [Q], last token [Q], evidence blocks [Q, 3] and their shares [Q, 3] of the questions that a whole query window
    ends with; and the number of blocks [Q] of the row that may answer."""
    if not isinstance(batch, RecallBatch):
        none = np.empty(0, np.int64)
        return none, none, np.empty((0, 1), np.int64), np.empty((0, 1), np.float32), none
    row, number = np.nonzero(batch.question_position >= QUERY_TOKENS - 1)
    position = batch.question_position[row, number]
    latest, earlier = batch.evidence_block[row, number][:, None], batch.earlier_block[row, number]
    there = np.concatenate([latest, earlier], 1) >= 0
    evidence = np.concatenate([latest, np.where(earlier >= 0, earlier, latest)], 1)
    complete = (position + 1 - QUESTION_TOKENS) // block_size  # blocks that were complete before the question
    facts = batch.evidence_block.max(1)[row] + 1  # behind them stand answers to the same questions
    share = (there / there.sum(1, keepdims=True)).astype(np.float32)
    return row, position, evidence, share, np.minimum(complete, facts)


def _quiet(seed: int, batch: Batch) -> tuple[I64, I64]:
    """Rows and last tokens [Z] of query windows in which nothing is asked, the same wherever a row is trained.

    Windows that end a little behind a question are of neither kind: how long it stays asked while it is being answered
    is left to what the router learns of age (a dozen tokens or so).
    """
    end = np.full(len(batch.ids), batch.ids.shape[1] - 1)  # of the places to draw from; the last id is only a target
    if isinstance(batch, RecallBatch):
        begin = np.where(batch.question_position >= 0, batch.question_position + 1 - QUESTION_TOKENS, end[:, None])
        end = np.minimum(end, begin.min(1))
    rows = np.flatnonzero(end >= QUERY_TOKENS)
    drawn = RowRandom(seed, batch.positions[rows], np.full(len(rows), _QUIET)).random((len(rows), QUIET_WINDOWS))
    first = QUERY_TOKENS - 1
    place = first + (drawn * (end[rows, None] - first)).astype(np.int64)
    return np.repeat(rows, QUIET_WINDOWS), place.reshape(-1)


def kept_blocks(settings: ViewSettings, batch: Batch, entries: int) -> Bool:
    """[B, n]: blocks before the tail that a good context would show raw, in variants of at most `entries` entries.

    Of a row with questions those that hold the answers; of text the newest, as many as there is room for.
    """
    room = settings.room(entries) if settings.variants > 1 else 0  # an only variant of text is drawn blindly
    kept = np.zeros((len(batch.positions), settings.blocks), bool)
    kept[text_rows(batch), settings.blocks - room :] = True
    if isinstance(batch, RecallBatch):
        row, number = np.nonzero((batch.evidence_block >= 0) & (batch.evidence_block < settings.blocks))
        kept[row, batch.evidence_block[row, number]] = True
    return kept


def row_emphasis(batch: Batch, weight: float) -> F32 | None:
    """Weights of a micro-batch's targets [B, T] float32: `weight` at answers; None when it has no questions."""
    if not isinstance(batch, RecallBatch) or weight == 1:
        return None
    heavy = np.ones(batch.targets.shape, np.float32)
    row, number = np.nonzero(batch.question_position >= 0)
    heavy[row, batch.question_position[row, number]] = weight
    return heavy


def view_emphasis(settings: ViewSettings, plan: ViewPlan, batch: Batch, weight: float) -> F32 | None:
    """The same for views [V, T], where a view shows the evidence raw: what it does not show cannot be learned from it."""
    if not isinstance(batch, RecallBatch) or weight == 1:
        return None
    heavy = np.ones((len(plan.sequence), batch.targets.shape[1]), np.float32)
    raw = raw_blocks(plan, settings.tokens // settings.block_size)
    position, block = batch.question_position[plan.sequence], batch.evidence_block[plan.sequence]
    shown = np.take_along_axis(raw, np.clip(block, 0, raw.shape[1] - 1), 1) & (block >= 0) & (position >= 0)
    view, number = np.nonzero(shown)
    heavy[view, position[view, number]] = weight
    return heavy


def text_rows(batch: Batch) -> I64:
    """Numbers of the rows of a micro-batch that are text, not tasks."""
    if not isinstance(batch, RecallBatch):
        return np.arange(len(batch.ids))
    return np.flatnonzero((batch.question_position < 0).all(1))


def _rotary(model: GPT, plan: ViewPlan, device: torch.device) -> Rotary:
    """Rotary of views of one length; made on the CPU, because how far positions reach is asked there without waiting."""
    slots = torch.arange(plan.lod.shape[1])[None]
    memory = model.memory
    assert memory is not None
    if memory.config.positional_type == "slot":
        tables = model.entry_rotary(slots.double(), slots.double(), slots)
    else:
        end = torch.from_numpy(plan.tokens)
        tables = model.entry_rotary(torch.from_numpy(plan.positions), torch.from_numpy(plan.sigmas), slots, end)
    return tables.to(device)


def _moved(arrays: Mapping[str, npt.NDArray[np.generic]], device: torch.device) -> dict[str, Tensor]:
    """Arrays on the device: integers int64, numbers float32, truth bool; one transfer for each kind."""
    kinds = {"i": torch.int64, "f": torch.float32, "b": torch.bool}
    out: dict[str, Tensor] = {}
    for kind, dtype in kinds.items():
        names = [name for name, array in arrays.items() if array.dtype.kind == kind]
        if not names:
            continue
        flat = torch.cat([torch.from_numpy(np.ascontiguousarray(arrays[name])).reshape(-1).to(dtype) for name in names])
        parts = torch.split(flat.to(device, non_blocking=True), [arrays[name].size for name in names])
        out |= {name: part.view(arrays[name].shape) for name, part in zip(names, parts, strict=True)}
    return out
