"""Training with --mc: off it is the vanilla run; on, every module learns, a checkpoint holds them, two workers equal one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_task

import megacontext as mc
from jobs.runtime import cli
from jobs.training import SECTIONS
from megacontext.checkpoint import Checkpoint, load_checkpoint
from megacontext.config import GPTConfig, MemoryConfig, TrainConfig
from megacontext.data.recall import recall_rows
from megacontext.data.recall_words import WordList
from megacontext.data.shards import Manifest, ids_dtype, write_shard
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, UserError
from megacontext.model.flops import head_flops_per_token, routing_key_flops
from megacontext.model.router import QUERY_TOKENS
from megacontext.telemetry.tracker import Tracker
from megacontext.train.loop import TrainResult, train
from megacontext.train.optim import build_optimizer
from megacontext.train.recall_mix import QUESTIONS
from megacontext.train.setup import fresh as fresh_model
from megacontext.train.task import TrainTask, horizon_steps
from megacontext.train.views import ViewSettings
from megacontext.train.worker import LocalWorker

SEQ_LEN = 128
MEMORY = MemoryConfig(mc=1, block_size=8, routing_slots=2, routing_width=8, allocator_recent_tokens=16,
                      mc_recall_share=0.5, mc_num_random_variants=2)  # fmt: skip


def make_mc_task(folder: Path, run: str, memory: MemoryConfig | None = MEMORY, **overrides: Any) -> TrainTask:
    """A task whose vocabulary has words enough for recall tasks, and whose rows have room for them."""
    if not (folder / "tokenizer").exists():
        letters = np.random.default_rng(0).integers(0, 26, (260, 4)) + ord("a")
        words = [bytes(row.tolist()).decode() for row in letters.astype(np.uint8)]
        tokenizer = Tokenizer.train([" ".join(words) + "\n"] * 4, 900)
        tokenizer.save(str(folder / "tokenizer"))
        for split, rows in (("train", 64), ("val", 8)):
            ids = np.random.default_rng(rows).integers(0, 850, (rows, SEQ_LEN + 1))
            ids[:, 1:] = (ids[:, :1] + 3 * np.arange(SEQ_LEN) + ids[:, 1:] % 3) % 850
            infos = (write_shard(str(folder / split / "shard_00000.arrow"), {"ids": ids.astype(ids_dtype(900))}),)
            Manifest(
                version=1, split=split, row_tokens=SEQ_LEN + 1, dtype="uint16", vocab_size=tokenizer.vocab_size,
                tokenizer_digest=tokenizer.digest, columns=("ids",), shards=infos, documents=rows, tokens_in=1,
                tokens_kept=1, source={},
            ).write(str(folder / split))  # fmt: skip
    gpt = GPTConfig(sequence_len=SEQ_LEN, vocab_size=900, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    settings = dict(num_iterations=6, total_batch_size=4 * SEQ_LEN, device_batch_size=2, eval_every=-1, save_every=2)
    return make_task(folder, run, **{"gpt": gpt, "memory": memory, **settings, **overrides})


def train_here(task: TrainTask, worker: LocalWorker | None = None) -> TrainResult:
    worker = worker or LocalWorker(task.run_dir, torch.device("cpu"))
    tracker = Tracker(run_dir=task.run_dir, run_name="run", config={}, wandb_mode="off", enabled=worker.rank == 0)
    return train(task, worker, tracker)


def records(folder: Path, run: str) -> list[dict[str, Any]]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


def saved_at(folder: Path, run: str, step: int) -> Checkpoint:
    return load_checkpoint(str(folder / run / "checkpoints" / f"megacontext_base_{step:06d}"), with_optimizer=True)


def deterministic(record: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    timed = ("time/", "train/dt", "train/tok_per_sec", "total_training_time", "mc/time")
    return {key: value for key, value in record.items() if not key.startswith(timed)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, token shards, and the run "whole": six steps with a memory."""
    folder = tmp_path_factory.mktemp("mc")
    train_here(make_mc_task(folder, "whole"))
    return folder


def test_off_is_the_run_without_a_memory(folder: Path) -> None:
    """Same functions, same keys, same numbers: the memory of an --mc run with zero weights changes nothing either."""
    train_here(make_mc_task(folder, "off", None))
    silent = replace(MEMORY, mc_recall_share=0.0, mc_gist_loss_weight=0.0, mc_lens_loss_weight=0.0)
    train_here(make_mc_task(folder, "silent", silent))
    off, quiet = records(folder, "off"), records(folder, "silent")
    assert not any(key.startswith("mc/") for record in off for key in record)
    assert [record["train/loss"] for record in off] == [record["train/loss"] for record in quiet]
    saved = [saved_at(folder, run, 6) for run in ("off", "silent")]
    assert not any(name.startswith("memory.") for name in saved[0].model)
    assert "memory_config" not in saved[0].meta
    assert "mc" not in saved[0].meta["identity"]
    for name, tensor in saved[0].model.items():
        assert torch.equal(tensor, saved[1].model[name]), name
    assert saved[0].optimizer is not None
    assert saved[0].optimizer.keys() == saved[0].model.keys()


def test_one_step_changes_every_module_and_a_checkpoint_restores_them(folder: Path) -> None:
    first, last = (saved_at(folder, "whole", step) for step in (4, 6))
    fresh, _ = fresh_model(make_mc_task(folder, "whole"), torch.device("cpu"), torch.float32)
    assert first.model.keys() == fresh.state_dict().keys()
    assert last.optimizer is not None
    assert last.optimizer.keys() == last.model.keys()
    for prefix in ("transformer.", "lm_head", "memory.gist", "memory.lens", "memory.router", "memory.lod_tag"):
        names = [name for name in last.model if name.startswith(prefix)]
        assert any(not torch.equal(first.model[name], last.model[name]) for name in names), prefix
    model, _ = mc.load(str(folder / "whole"))
    assert model.memory is not None
    assert model.memory.config == MEMORY
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, last.model[name]), name


def test_a_resumed_run_repeats_the_numbers_exactly(folder: Path) -> None:
    shutil.copytree(folder / "whole", folder / "cut")
    newest = folder / "cut" / "checkpoints" / "megacontext_base_000006"
    (newest / "model.pt").write_bytes(b"half")  # so that it continues from step 4
    train_here(make_mc_task(folder, "cut"))
    whole, cut = (list(map(deterministic, records(folder, run))) for run in ("whole", "cut"))
    assert whole == cut
    assert {"mc/route_loss", "mc/lens_loss", "mc/gist_loss"} <= set().union(*whole)


def test_device_batch_changes_only_what_rows_compete_with(folder: Path) -> None:
    """The loss of text does not depend on how rows are grouped; a question's wrong answers are the blocks beside it."""
    text = replace(MEMORY, mc_recall_share=0.0, mc_num_random_variants=3)
    for rows in (1, 4):
        train_here(make_mc_task(folder, f"by{rows}", text, device_batch_size=rows, num_iterations=3))
    for one, four in zip(records(folder, "by1"), records(folder, "by4"), strict=True):
        for key in ("train/loss", "mc/gist_loss", "mc/lens_loss", "mc/adv_delta_mean"):
            assert one[key] == pytest.approx(four[key], abs=1e-4), key


def test_two_workers_equal_one(folder: Path) -> None:
    torch.multiprocessing.spawn(_worker, args=(2, str(folder)), nprocs=2)
    one, two = (records(folder, run) for run in ("whole", "two"))
    assert len(one) == len(two) == 6
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in ("train/loss", "mc/loss", "mc/gist_loss", "mc/lens_loss", "mc/route_loss", "train/grad_norm"):
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), abs=1e-5), key
    for name, tensor in saved_at(folder, "two", 6).model.items():
        assert torch.allclose(tensor, saved_at(folder, "whole", 6).model[name], atol=1e-4), name


def _worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    task = make_mc_task(Path(folder), "two")
    train_here(task, LocalWorker(task.run_dir, torch.device("cpu"), rank, world_size))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (None, "mc was 1, is None"),
        (replace(MEMORY, mc_lens_temperature=0.5), "mc_lens_temperature was 1.0, is 0.5"),
        (replace(MEMORY, block_size=16), "block_size was 8, is 16"),
    ],
)
def test_continuing_with_another_memory_is_refused(tmp_path: Path, memory: MemoryConfig | None, message: str) -> None:
    train_here(make_mc_task(tmp_path, "run", num_iterations=2))
    with pytest.raises(CheckpointError, match=message):
        train_here(make_mc_task(tmp_path, "run", memory, num_iterations=2))
    inference = replace(MEMORY, mc_infer_refocus_interval=7, allocator_expand_threshold=0.3)
    assert train_here(make_mc_task(tmp_path, "run", inference, num_iterations=2)).finished


def test_a_vanilla_run_is_not_continued_with_a_memory_but_can_be_started_from(folder: Path) -> None:
    result = train_here(make_mc_task(folder, "vanilla", None, num_iterations=1))
    with pytest.raises(CheckpointError, match="mc was None, is 1"):
        train_here(make_mc_task(folder, "vanilla", num_iterations=1))
    task = make_mc_task(folder, "grown", init_from=result.checkpoint)
    model, _ = fresh_model(task, torch.device("cpu"), torch.float32)
    before = load_checkpoint(result.checkpoint, with_optimizer=False).model
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert model.memory is not None
    assert model.memory.lod_tag.detach().any()


def test_horizon_counts_the_flops_of_all_modules(folder: Path) -> None:
    vanilla, ours = (
        make_mc_task(folder, "run", memory, num_iterations=-1, target_flops=1e11) for memory in (None, MEMORY)
    )
    assert horizon_steps(ours, None) < horizon_steps(vanilla, None) / 2
    result = train_here(make_mc_task(folder, "run", num_iterations=3))
    per_token = [ours.flops_per_token(progress) for progress in (0.0, 0.5, 1.0)]
    assert per_token[0] > per_token[1] > per_token[2] > vanilla.flops_per_token(0.0)
    assert result.metrics["total_training_flops"] == pytest.approx(sum(per_token) * 4 * SEQ_LEN)
    alone = make_mc_task(folder, "run", replace(MEMORY, mc_gist_teacher_share=0.0))
    views = ViewSettings.of(MEMORY, SEQ_LEN)
    predicted = views.variants * views.length(views.last_entries) * head_flops_per_token(ours.gpt)
    assert per_token[2] - alone.flops_per_token(1.0) == pytest.approx(predicted / SEQ_LEN)
    tasks, all_tasks = (
        make_mc_task(
            folder, "run", replace(MEMORY, mc_recall_share=share, mc_lens_attention_weight=0.0)
        ).flops_per_token(1.0)
        for share in (0.5, 1.0)
    )
    words = WordList.from_ids(np.arange(10, 800), bos=0)
    rows = recall_rows(
        np.random.default_rng(0), words, 1, SEQ_LEN + 1, block_size=MEMORY.block_size, questions=QUESTIONS, again=True
    )
    asked = rows.question_position.shape[1]
    query = routing_key_flops(ours.gpt, MEMORY, QUERY_TOKENS)
    assert all_tasks - tasks == pytest.approx(3 * 0.5 * asked * query / SEQ_LEN)


def test_recall_tasks_need_words_and_rows_need_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whole words"):
        train_here(make_task(tmp_path, "run", memory=replace(MEMORY, block_size=4)))
    with pytest.raises(UserError, match="no whole block of 32"):
        train_here(make_task(tmp_path, "run", memory=MemoryConfig(mc=1)))


def test_every_parameter_has_a_rule_and_matrices_of_the_memory_go_to_muon() -> None:
    from megacontext.model.gpt import GPT

    model = GPT(
        GPTConfig(sequence_len=64, vocab_size=99, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, token_shift=True)
    )
    model.attach_memory(MemoryConfig(mc=1, gistnet_pooling="query"))
    model.init_weights()
    state = build_optimizer(model, TrainConfig()).state_dict()
    assert state.keys() == dict(model.named_parameters()).keys()
    muon = {name for name, entry in state.items() if "momentum" in entry}
    assert {name for name in muon if name.startswith("memory.")} >= {
        "memory.gist.blocks.0.c_qkv.weight", "memory.lens.blocks.1.mlp.c_fc.weight", "memory.router.conv.weight"
    }  # fmt: skip
    assert not {"memory.router.gate.weight", "memory.lens.head.c_proj.weight", "memory.lod_tag", "token_shift"} & muon


# The command line


@pytest.mark.parametrize("given", [["--mc"], ["--mc", "1"], ["--mc=1"]])
def test_mc_may_stand_alone_or_with_its_value(given: list[str], tmp_path: Path) -> None:
    from jobs import speedrun

    for sections in (SECTIONS, speedrun.SECTIONS):
        argv = ["--tier", "cpu", "--base_dir", str(tmp_path), *given, "--mc_recall_share", "0.25"]
        args = cli.parse(sections, None, argv)
        assert (args.memory.mc, args.memory.mc_recall_share) == (1, 0.25)
        assert cli.flat_config(args)["memory"] == asdict(args.memory)
    assert cli.parse(SECTIONS, None, ["--tier", "cpu"]).memory.mc == 0


def test_settings_that_cannot_be_end_the_job_with_their_message() -> None:

    with pytest.raises(SystemExit, match="--block_size is 1; it must be a whole number of at least 2"):
        cli.parse(SECTIONS, None, ["--tier", "cpu", "--mc", "--block_size", "1"])


def test_steps_are_spans_with_what_they_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step sends its timing and batch statistics when a collector is named."""
    from megacontext.telemetry import otel

    seen: list[str] = []

    class Recorded(otel.Span):
        def event(self, name: str, **values: Any) -> None:
            seen.append(name)
            assert values

    @contextmanager
    def span(self: otel.Telemetry, name: str, parent: Any = None, **values: Any) -> Iterator[otel.Span]:
        seen.append(name)
        yield Recorded(None)

    monkeypatch.setattr(otel.Telemetry, "span", span)
    train_here(make_mc_task(folder, "spans", num_iterations=2, save_every=-1))
    assert seen == ["train_step", "mc_timing", "mc_batch_stats"] * 2 + ["validation"]
