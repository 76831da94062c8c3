"""What is built once before the first step: data, model, optimizer, horizon, and the state a checkpoint left."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext import precision, storage
from megacontext.checkpoint import Checkpoint, load_checkpoint
from megacontext.data.recall_words import WordList
from megacontext.data.shards import ShardSet
from megacontext.data.stream import Batch, BatchPlan, MmapStream, RowOrder
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, DataError
from megacontext.eval.bpb import shard_batches, validation_rows
from megacontext.model.gpt import GPT
from megacontext.model.nanochat import load_weights
from megacontext.model.rotary import Rotary
from megacontext.train.auto_batch import PEAK, STATE_BYTES, fitting_batch, free_memory, saved_bytes
from megacontext.train.lens_loss import RunningScales
from megacontext.train.memory_objective import MemoryObjective
from megacontext.train.optim import Optimizer, build_optimizer
from megacontext.train.recall_mix import RecallMix
from megacontext.train.resume import check_room, check_tokenizer, checkpoints_dir, newest_to_resume, stored_horizon
from megacontext.train.sizing import Pace, describe, fitting_steps
from megacontext.train.step import Stepper
from megacontext.train.task import TrainTask, horizon_steps
from megacontext.train.throughput import Stopwatch
from megacontext.train.worker import Worker

CALIBRATION_STEPS = 6  # at most
CALIBRATION_SHARE = 0.05  # of the minutes, after which no further step is timed


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

    Says on stdout at which step it begins and from what. Raises DataError, CheckpointError or UserError naming what
    does not fit, StorageError when the disk has no room for a checkpoint.
    """
    tokenizer = Tokenizer.load(task.tokenizer_dir)
    agree(worker, lambda: check_tokenizer(task.tokenizer_dir, tokenizer))
    train_shards, val_shards = ShardSet.open(task.train_tokens_dir), ShardSet.open(task.val_tokens_dir)
    for shards in (train_shards, val_shards):
        shards.check_fits(
            vocab_size=task.gpt.vocab_size, tokenizer_digest=tokenizer.digest, seq_len=task.gpt.sequence_len
        )
        if task.verify_shards and worker.rank == 0:
            shards.verify()
    dtype = precision.choose_dtype(task.dtype, worker.device)
    mix = recall_mix(task, tokenizer)
    loaded = newest(task, worker)
    num_iterations, device_batch = agree(worker, lambda: choose_sizes(task, worker.device, worker.world_size))
    task = with_batch(task, device_batch)
    plan = BatchPlan(task.rows_per_step, device_batch, worker.world_size)
    model, optimizer = fresh(task, worker.device, dtype)
    state: dict[str, Any] = {
        "step": 0, "rows_consumed": 0, "total_tokens": 0, "total_training_flops": 0.0, "total_training_time": 0.0,
        "smooth_loss": 0.0, "val_bpb": None, "best_val_bpb": None, "best_checkpoint": None,
    }  # fmt: skip
    if loaded is not None:
        _check_continues(task, loaded, num_iterations, train_shards)
        assert loaded.optimizer is not None
        _check_weights(model, loaded)
        model.load_state_dict(loaded.model)
        optimizer.load_state_dict(loaded.optimizer)
        state |= loaded.meta["state"]
    if worker.rank == 0:
        print(_beginning(task, loaded, num_iterations), flush=True)
    agree(worker, lambda: check_room(task, model, optimizer.state_dict(), num_iterations - state["step"]))
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
    """The newest intact checkpoint of this stage, the same on every rank; None when the stage has no checkpoint."""
    path = agree(worker, lambda: newest_to_resume(checkpoints_dir(task), task.stage))
    return load_checkpoint(path, with_optimizer=True) if path else None


def _beginning(task: TrainTask, loaded: Checkpoint | None, num_iterations: int) -> str:
    if loaded is not None:
        return f"{task.stage}: resuming at step {loaded.meta['step']} of {num_iterations} from {loaded.path}"
    weights = f", with the weights of {task.init_from}" if task.init_from else ""
    return f"{task.stage}: starting at step 0 of {num_iterations}: no checkpoint in {checkpoints_dir(task)}{weights}"


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


def _check_weights(model: GPT, loaded: Checkpoint) -> None:
    mine = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: list(tensor.shape) for name, tensor in loaded.model.items()}
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        raise CheckpointError(
            f"the weights in {loaded.path!r} do not fit the model: {wrong[0]} has shape {theirs.get(wrong[0])}, "
            f"expected {mine.get(wrong[0])} ({len(wrong)} tensors differ). Use another checkpoint, or start another --run."
        )


def _check_continues(task: TrainTask, loaded: Checkpoint, num_iterations: int, train_shards: ShardSet) -> None:
    task.check_continues(loaded.meta["identity"], loaded.path)
    check_horizon(loaded.path, loaded.meta["num_iterations"], num_iterations)
    if loaded.meta["train_data"] != data_digest(train_shards):
        raise DataError(
            f"the token shards in {task.train_tokens_dir!r} are not those {loaded.path!r} was trained on; "
            "restore them, or start another --run."
        )


def check_horizon(checkpoint: str, before: int, now: int) -> None:
    """Raises CheckpointError when a run is asked for another number of steps than its checkpoint was made for."""
    if before != now:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} belongs to a run of {before} steps and {now} are asked for; the learning-rate "
            "schedule would differ. Use the old horizon, or start another --run."
        )


def choose_sizes(task: TrainTask, device: torch.device, world_size: int, began: float | None = None) -> tuple[int, int]:
    """Steps of the stage, and rows of a micro-batch. What has to be measured is measured once per run.

    `began`: when the user began to wait for this stage, in seconds since 1970; now unless given.
    """
    batch = known_batch(task)
    if batch is None:
        batch = measure_batch(task, device, world_size)
    steps = known_horizon(task)
    if steps is None:
        steps = measure_horizon(with_batch(task, batch), device, world_size, began)
    return steps, batch


def with_batch(task: TrainTask, device_batch: int) -> TrainTask:
    """The task with micro-batches of so many rows."""
    return replace(task, train=replace(task.train, device_batch_size=device_batch))


def known_horizon(task: TrainTask) -> int | None:
    """Steps of the stage, or None when the clock decides and has not been read yet for this run."""
    if not task.sized_by_clock:
        return horizon_steps(task, None)
    return stored_horizon(task, _horizon_file(task))


def measure_horizon(task: TrainTask, device: torch.device, world_size: int, began: float | None = None) -> int:
    """Time a few steps of one worker's share on a model that is thrown away, and size the horizon by them.

    The measuring is part of the minutes, and so is what the user has waited since `began`: processes that train take as
    long to start as this one did. The result is kept beside the run, so that a restart has the same horizon.
    """
    start = time.time()
    waited = start - (start if began is None else began)
    print(f"{task.stage}: measuring how long a step takes, for --max_minutes {task.train.max_minutes:g}", flush=True)
    shards = ShardSet.open(task.train_tokens_dir)
    plan = BatchPlan(task.rows_per_step // world_size, task.train.device_batch_size, 1)
    model, optimizer = fresh(task, device, precision.choose_dtype(task.dtype, device))
    forward = compiled(model, task.compile, device)
    memory = memory_objective(task, forward, 1, lambda step: 0.5, {})  # the mean length of a run's variants
    stepper = Stepper(forward, optimizer, device, 1, plan.accum_steps, task.train.grad_clip, Stopwatch(device), memory)
    batches: Iterator[Batch] = iter(
        MmapStream(shards, RowOrder(shards.num_rows, task.seed), plan, 0, 0, CALIBRATION_STEPS)
    )
    mix = recall_mix(task, Tokenizer.load(task.tokenizer_dir))
    if mix is not None:
        batches = mix.over(batches)
    seconds: list[float] = []
    least = 1 if forward is model else 2  # the first step of a compiled model says how long compiling takes
    while len(seconds) < CALIBRATION_STEPS and (
        len(seconds) < least or sum(seconds) < CALIBRATION_SHARE * task.train.max_minutes * 60
    ):
        before = time.perf_counter()
        stepper.run(len(seconds), batches, 0.0, 0.85, stop=False)
        seconds.append(time.perf_counter() - before)
    step_s = statistics.fmean(seconds[1:] or seconds)
    validation_s = _time_validation(task, model, world_size)
    again = max(0.0, seconds[0] - step_s)  # compiling, and whatever else only a first step does
    pace = Pace(spent=2 * waited + time.time() - start + again, step=step_s, validation=validation_s)
    fitting = fitting_steps(task.train, pace)
    steps = horizon_steps(task, fitting)
    storage.write_json(_horizon_file(task), {"num_iterations": steps, "step_seconds": step_s})
    print(f"{task.stage}: {describe(task.train, pace, fitting, steps)}", flush=True)
    return steps


@torch.no_grad()
def _time_validation(task: TrainTask, model: GPT, world_size: int) -> float:
    """Seconds of one worker's share of a validation, by its first micro-batch."""
    shards = ShardSet.open(task.val_tokens_dir)
    rows = validation_rows(shards, task.train.eval_tokens)[::world_size]
    size = task.train.device_batch_size
    before = time.perf_counter()
    for ids, targets in shard_batches(shards, rows[:size], size, model.device):
        float(model.loss(ids, targets, reduction="none").sum())  # the number waits for the device
    return (time.perf_counter() - before) * len(rows) / min(size, len(rows))


def known_batch(task: TrainTask) -> int | None:
    """Rows of a micro-batch, or None when free memory decides and has not been read yet for this run."""
    asked = task.train.device_batch_size
    if task.memory is None or not task.memory.mc_auto_batch or not task.memory.mc_num_random_variants or asked == 1:
        return asked
    try:
        known = storage.read_json(_batch_file(task))
        return int(known["chosen"]) if known["asked"] == asked else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        print(f"{task.stage}: {_batch_file(task)} is damaged ({error}); free memory is measured again", flush=True)
        return None


def measure_batch(task: TrainTask, device: torch.device, world_size: int) -> int:
    """Count what a row of a `--mc` run takes on a model that is thrown away, and choose the micro-batch by the free memory.

    The result is kept beside the run: a resumed run has the same micro-batches, and so the same numbers to the last bit.
    """
    asked = task.train.device_batch_size
    model, _ = fresh(task, device, precision.choose_dtype(task.dtype, device))
    memory = memory_objective(replace(task, compile="off"), model, 1, lambda step: 0.0, {})
    assert memory is not None
    shards = ShardSet.open(task.train_tokens_dir)
    row = next(iter(MmapStream(shards, RowOrder(shards.num_rows, task.seed), BatchPlan(1, 1, 1), 0, 0, 1)))
    memory.begin(0)  # the first steps decide, whose variants are the longest
    row_bytes = saved_bytes(model, lambda: memory.loss(row, device, 1.0, Stopwatch(device)))
    free = free_memory(device) // (1 if device.type == "cuda" else world_size)
    fixed = STATE_BYTES * sum(parameter.numel() for parameter in model.parameters())
    chosen = fitting_batch(asked, row_bytes, fixed, free)
    known = {"asked": asked, "chosen": chosen, "row_bytes": row_bytes, "free_bytes": free}
    storage.write_json(_batch_file(task), known)
    if chosen < asked:
        print(
            f"{task.stage}: --mc_auto_batch: device batch {asked} -> {chosen} rows, because a row with its views takes "
            f"{PEAK * row_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; tokens per step stay "
            f"{task.train.total_batch_size}",
            flush=True,
        )
    return chosen


def _horizon_file(task: TrainTask) -> str:
    return storage.join(task.run_dir, "horizon", f"{task.stage}.json")


def _batch_file(task: TrainTask) -> str:
    return storage.join(task.run_dir, "horizon", f"{task.stage}_batch.json")


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
