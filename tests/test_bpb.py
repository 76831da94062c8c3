"""Bits per byte against adding up token by token. That ranks add up is in test_core.py, where two are started."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.config import GPTConfig
from megacontext.errors import DataError
from megacontext.eval.bpb import BpbResult, evaluate_bpb, shard_batches, split_row, validation_rows
from megacontext.model.gpt import GPT

VOCAB = 40


def make_model() -> GPT:
    model = GPT(GPTConfig(sequence_len=16, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


def make_batches(seed: int, count: int, ignored: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCAB, (count, 3, 9), generator=generator)
    drop = torch.rand((count, 3, 8), generator=generator) < ignored
    return [(row[:, :-1], row[:, 1:].masked_fill(gone, -1)) for row, gone in zip(rows, drop, strict=True)]


def token_bytes() -> torch.Tensor:
    sizes = torch.arange(VOCAB, dtype=torch.int32) % 5 + 1
    sizes[-9:] = 0  # special tokens
    return sizes


@torch.no_grad()
def by_hand(model: GPT, batches: list[tuple[torch.Tensor, torch.Tensor]], sizes: torch.Tensor) -> BpbResult:
    nats, total, tokens = 0.0, 0, 0
    for ids, targets in batches:
        for row in range(len(ids)):
            logs = model(ids[row : row + 1]).double().log_softmax(-1)[0]
            for at, target in enumerate(targets[row].tolist()):
                if target >= 0 and sizes[target] > 0:
                    nats -= logs[at, target].item()
                    total += int(sizes[target])
                    tokens += 1
    return BpbResult(nats, total, tokens)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), ignored=st.floats(0, 1))
def test_equals_adding_up_by_hand(seed: int, ignored: float) -> None:
    model, batches = make_model(), make_batches(seed, 2, ignored)
    found, expected = evaluate_bpb(model, batches, token_bytes()), by_hand(model, batches, token_bytes())
    assert (found.bytes, found.tokens) == (expected.bytes, expected.tokens)
    assert found.nats == pytest.approx(expected.nats, rel=1e-5, abs=1e-5)
    if expected.tokens:
        assert found.bpb == pytest.approx(expected.nats / (math.log(2) * expected.bytes), rel=1e-5)
        assert found.loss == pytest.approx(expected.nats / expected.tokens, rel=1e-5)
    else:
        assert math.isnan(found.bpb)
        assert math.isnan(found.loss)


def test_parts_add_up() -> None:
    model, batches = make_model(), make_batches(1, 4, 0.2)
    whole = evaluate_bpb(model, batches, token_bytes())
    first, second = evaluate_bpb(model, batches[:1], token_bytes()), evaluate_bpb(model, batches[1:], token_bytes())
    assert (first + second).bytes == whole.bytes
    assert (first + second).bpb == pytest.approx(whole.bpb, rel=1e-9)


def test_no_batches_is_an_error() -> None:
    with pytest.raises(DataError, match="no batches"):
        evaluate_bpb(make_model(), [], token_bytes())


class FakeShards:
    """Rows in memory with the reading side of ShardSet."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        self.ids, self.mask = ids, mask
        self.num_rows, self.row_tokens = ids.shape

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"ids": self.ids[rows]} | ({} if self.mask is None else {"mask": self.mask[rows]})


def test_rows_of_a_validation() -> None:
    shards = FakeShards(np.zeros((10, 5), np.uint16))
    assert validation_rows(shards, 12).tolist() == [0, 1, 2]
    assert validation_rows(shards, 1).tolist() == [0]
    assert validation_rows(shards, 10**9).tolist() == validation_rows(shards, -1).tolist() == list(range(10))


def test_batches_cover_the_rows_and_mask_targets() -> None:
    ids = np.arange(35, dtype=np.uint16).reshape(7, 5)
    mask = (ids % 3 > 0).astype(np.uint8)
    batches = list(shard_batches(FakeShards(ids, mask), np.arange(7), 3))
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    inputs, targets = torch.cat([x for x, _ in batches]).numpy(), torch.cat([y for _, y in batches]).numpy()
    assert (inputs == ids[:, :-1]).all()
    assert (targets == np.where(mask[:, 1:] > 0, ids[:, 1:].astype(np.int64), -1)).all()
    assert split_row({"ids": ids})[1].min() >= 0
