"""What is built once before the first step: data, model, optimizer, horizon, and the state a checkpoint left."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext import precision, storage
from megacontext.data.recall_words import WordList
from megacontext.data.shards import ShardSet
from megacontext.data.stream import Batch, BatchPlan, MmapStream, RowOrder
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, DataError
from megacontext.model.gpt import GPT
from megacontext.model.nanochat import load_weights
from megacontext.model.rotary import Rotary
from megacontext.train.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from megacontext.train.lens_loss import RunningScales
from megacontext.train.memory_objective import MemoryObjective
from megacontext.train.optim import Optimizer, build_optimizer
from megacontext.train.recall_mix import RecallMix
from megacontext.train.step import Stepper
from megacontext.train.task import TrainTask, horizon_steps
from megacontext.train.throughput import Stopwatch
from megacontext.train.worker import Worker

CALIBRATION_STEPS = 6


@dataclass
class Setup:
    """`model` is the plain module (saved, validated), `forward` the one that trains: compiled where that pays.

    `memory` is the objective of an `--mc` run, `mix` what puts recall tasks among its rows.
    """

    task: TrainTask
    worker: Worker
    model: GPT
    forward: GPT
    optimizer: Optimizer
    tokenizer: Tokenizer
    train_shards: ShardSet
    val_shards: ShardSet
    plan: BatchPlan
    num_iterations: int
    dtype: torch.dtype
    state: dict[str, Any]
    memory: MemoryObjective | None
    mix: RecallMix | None

    @property
    def order(self) -> RowOrder:
        """The order of training rows: a pure function of the seed and the number of rows."""
        return RowOrder(self.train_shards.num_rows, self.task.seed)


def build(task: TrainTask, worker: Worker) -> Setup:
    """Open the data, build the model, choose the horizon, and take up the newest intact checkpoint if there is one.

    Raises DataError, CheckpointError or UserError naming what does not fit.
    """
    tokenizer = Tokenizer.load(task.tokenizer_dir)
    train_shards, val_shards = ShardSet.open(task.train_tokens_dir), ShardSet.open(task.val_tokens_dir)
    for shards in (train_shards, val_shards):
        shards.check_fits(
            vocab_size=task.gpt.vocab_size, tokenizer_digest=tokenizer.digest, seq_len=task.gpt.sequence_len
        )
        if task.verify_shards and worker.rank == 0:
            shards.verify()
    plan = BatchPlan(task.rows_per_step, task.train.device_batch_size, worker.world_size)
    dtype = precision.choose_dtype(task.dtype, worker.device)
    mix = recall_mix(task, tokenizer)
    loaded = newest(task, worker)
    num_iterations = agree(worker, lambda: choose_horizon(task, worker.device, worker.world_size))
    model, optimizer = fresh(task, worker.device, dtype)
    state: dict[str, Any] = {
        "step": 0, "rows_consumed": 0, "total_tokens": 0, "total_training_flops": 0.0, "total_training_time": 0.0,
        "smooth_loss": 0.0, "val_bpb": None, "best_val_bpb": None, "best_checkpoint": None,
    }  # fmt: skip
    if loaded is not None:
        _check_continues(task, loaded, num_iterations, train_shards)
        assert loaded.optimizer is not None
        model.load_state_dict(loaded.model)
        optimizer.load_state_dict(loaded.optimizer)
        state |= loaded.meta["state"]
    forward = compiled(model, task.compile, worker.device)
    last = max(1, num_iterations - 1)
    memory = memory_objective(task, forward, worker.world_size, lambda step: step / last, state.get("lens", {}))
    return Setup(task, worker, model, forward, optimizer, tokenizer, train_shards, val_shards, plan, num_iterations,
                 dtype, state, memory, mix)  # fmt: skip


def memory_objective(
    task: TrainTask, model: GPT, world_size: int, progress: Callable[[int], float], running: Mapping[str, Any]
) -> MemoryObjective | None:
    """The objective of an `--mc` run, None without; `running` is what a checkpoint's `RunningScales` held."""
    if task.memory is None:
        return None
    view_trunk = any_length_trunk(model) if precision.choose_compile(task.compile, model.device) else None
    scales = RunningScales(**running)
    return MemoryObjective(model, task.seed, task.rows_per_step, world_size, progress, scales, view_trunk)


def any_length_trunk(model: GPT) -> Callable[[Tensor, Rotary], Tensor]:
    """The trunk for variants, compiled by itself and once: with that of the rows, each new length would compile anew."""
    return torch.compile(partial(GPT.trunk, model), dynamic=True)


def recall_mix(task: TrainTask, tokenizer: Tokenizer) -> RecallMix | None:
    """What mixes recall tasks into the rows, None when no row is one. Raises UserError when they do not fit."""
    if task.memory is None or not task.memory.mc_recall_share:
        return None
    words = WordList.from_tokenizer(tokenizer)
    return RecallMix(task.memory.mc_recall_share, task.seed, words, task.gpt.sequence_len + 1, task.memory.block_size)


def newest(task: TrainTask, worker: Worker) -> Checkpoint | None:
    """The newest intact checkpoint of this stage, the same on every rank, or None."""
    directory = storage.join(task.run_dir, "checkpoints")
    path = agree(worker, lambda: latest_checkpoint(directory, task.stage))
    return load_checkpoint(path, with_optimizer=True) if path else None


def fresh(task: TrainTask, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Optimizer]:
    """A model and optimizer at step 0: seeded weights, or those of the checkpoint the stage starts from."""
    model = GPT(task.gpt)
    if task.memory is not None:
        model.attach_memory(task.memory)
    model.init_weights(torch.Generator().manual_seed(task.seed))
    if task.init_from is not None:
        start = load_checkpoint(task.init_from, with_optimizer=False).model
        mine = {name: value for name, value in model.state_dict().items() if name.startswith("memory.")}
        if not mine:
            start = {name: value for name, value in start.items() if not name.startswith("memory.")}
        elif not any(name.startswith("memory.") for name in start):  # a vanilla model that gets a memory
            start |= mine
        load_weights(model, start, task.init_from)
        model.float()  # whatever it was stored in, training keeps its weights in full precision
    model.compute_dtype = dtype
    model.to(device)
    return model, build_optimizer(model, task.train)


def compiled(model: GPT, choice: str, device: torch.device) -> GPT:
    """The model itself, or one that shares its weights and runs compiled where `choice` (auto, on, off) says so.

    Raises UserError when it is asked for and the compiler is missing.
    """
    return model.compiled() if precision.choose_compile(choice, device) else model


def agree(worker: Worker, decide: Callable[[], Any]) -> Any:
    """Let rank 0 decide, and tell the others: they must not race a file system. A decision that raises, raises everywhere."""
    box: list[Any] = [None]
    if worker.rank == 0:
        try:
            box = [(decide(), None)]
        except Exception as error:
            if worker.world_size == 1:
                raise
            box = [(None, error)]
    if worker.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    value, failure = box[0]
    if failure is not None:
        raise failure
    return value


def _check_continues(task: TrainTask, loaded: Checkpoint, num_iterations: int, train_shards: ShardSet) -> None:
    task.check_continues(loaded.meta["identity"], loaded.path)
    if loaded.meta["num_iterations"] != num_iterations:
        raise CheckpointError(
            f"checkpoint {loaded.path!r} belongs to a run of {loaded.meta['num_iterations']} steps and {num_iterations} "
            "are asked for; the learning-rate schedule would differ. Use the old horizon, or start another --run."
        )
    if loaded.meta["train_data"] != data_digest(train_shards):
        raise DataError(
            f"the token shards in {task.train_tokens_dir!r} are not those {loaded.path!r} was trained on; "
            "restore them, or start another --run."
        )


def choose_horizon(task: TrainTask, device: torch.device, world_size: int) -> int:
    """Steps of the stage; measured once per run when the clock decides."""
    known = known_horizon(task)
    return measure_horizon(task, device, world_size) if known is None else known


def known_horizon(task: TrainTask) -> int | None:
    """Steps of the stage, or None when the clock decides and has not been read yet for this run."""
    if not task.sized_by_clock:
        return horizon_steps(task, None)
    path = _horizon_file(task)
    return int(storage.read_json(path)["num_iterations"]) if storage.exists(path) else None


def measure_horizon(task: TrainTask, device: torch.device, world_size: int) -> int:
    """Time a few steps of one worker's share on a model that is thrown away, and size the horizon by them.

    The result is kept beside the run, so that a restart has the same horizon.
    """
    shards = ShardSet.open(task.train_tokens_dir)
    plan = BatchPlan(task.rows_per_step // world_size, task.train.device_batch_size, 1)
    model, optimizer = fresh(task, device, precision.choose_dtype(task.dtype, device))
    forward = compiled(model, task.compile, device)
    memory = memory_objective(task, forward, 1, lambda step: 0.5, {})  # the mean length of a run's variants
    stepper = Stepper(forward, optimizer, device, 1, plan.accum_steps, task.train.grad_clip, Stopwatch(device), memory)
    seconds = []
    batches: Iterator[Batch] = iter(
        MmapStream(shards, RowOrder(shards.num_rows, task.seed), plan, 0, 0, CALIBRATION_STEPS)
    )
    mix = recall_mix(task, Tokenizer.load(task.tokenizer_dir))
    if mix is not None:
        batches = mix.over(batches)
    for step in range(CALIBRATION_STEPS):
        began = time.perf_counter()
        stepper.run(step, batches, 0.0, 0.85, stop=False)
        seconds.append(time.perf_counter() - began)
    step_s = statistics.median(seconds[1:])
    steps = horizon_steps(task, step_s)
    storage.write_json(_horizon_file(task), {"num_iterations": steps, "step_seconds": step_s})
    print(
        f"{task.stage}: a step takes {step_s:.3f} s; {steps} steps fit {task.train.max_minutes:g} minutes", flush=True
    )
    return steps


def _horizon_file(task: TrainTask) -> str:
    return storage.join(task.run_dir, "horizon", f"{task.stage}.json")


def data_digest(shards: ShardSet) -> str:
    """Identity of the rows: the checksums of all shards in order."""
    return hashlib.sha256(repr([(shard.rows, shard.crc32) for shard in shards.manifest.shards]).encode()).hexdigest()


def loop_meta(setup: Setup) -> dict[str, Any]:
    """What a checkpoint stores beside the tensors, as plain JSON."""
    memory = setup.task.memory
    return {
        **({"memory_config": asdict(memory)} if memory is not None else {}),
        "identity": setup.task.identity(),
        "num_iterations": setup.num_iterations,
        "train_data": data_digest(setup.train_shards),
        "tokenizer_digest": setup.tokenizer.digest,
        "model_config": json.loads(json.dumps(setup.task.identity()["model_config"])),
        "state": setup.state,
        "best_checkpoint": setup.state["best_checkpoint"],
        "provenance": dict(setup.task.provenance),
    }
