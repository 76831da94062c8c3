"""What is built once before the first step: data, model, optimizer, horizon, and the state a checkpoint left."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megacontext import precision, storage
from megacontext.checkpoint import Checkpoint, load_checkpoint
from megacontext.data.ahead import ahead, mapped
from megacontext.data.stream import TEXT, Batch, BatchPlan
from megacontext.data.tokenizer import Tokenizer
from megacontext.errors import CheckpointError, DataError
from megacontext.model.gpt import GPT
from megacontext.model.nanochat import load_weights
from megacontext.telemetry import otel
from megacontext.train.auto_batch import PEAK, STATE_BYTES, fitting_batch, free_memory, saved_bytes
from megacontext.train.objective import Objective
from megacontext.train.optim import Optimizer, build_optimizer
from megacontext.train.recipe import Start
from megacontext.train.resume import check_room, check_tokenizer, checkpoints_dir, newest_to_resume, stored_horizon
from megacontext.train.rows import Rows
from megacontext.train.sizing import Pace, describe, fitting_steps
from megacontext.train.step import Stepper
from megacontext.train.step_plan import StepPlan
from megacontext.train.task import TrainTask, horizon_steps
from megacontext.train.throughput import Stopwatch
from megacontext.train.validation import Judge
from megacontext.train.worker import Worker

CALIBRATION_STEPS = 6  # at most
CALIBRATION_SHARE = 0.05  # of the minutes, after which no further step is timed


@dataclass
class Setup:
    """`model` is the plain module (saved, validated), `forward` the one that trains: compiled where that pays.

    `state` is what a checkpoint holds of the loop, as plain JSON.
    """

    task: TrainTask
    worker: Worker
    model: GPT
    forward: GPT
    optimizer: Optimizer
    tokenizer: Tokenizer
    rows: Rows
    judge: Judge
    objective: Objective
    plan: BatchPlan
    num_iterations: int
    dtype: torch.dtype
    state: dict[str, Any]


def build(task: TrainTask, worker: Worker) -> Setup:
    """Open the data, build the model, choose the horizon, and take up the newest intact checkpoint if there is one.

    Says on stdout at which step it begins and from what. Raises DataError, CheckpointError or UserError naming what
    does not fit, StorageError when the disk has no room for a checkpoint.
    """
    tokenizer = Tokenizer.load(task.tokenizer_dir)
    agree(worker, lambda: check_tokenizer(task.tokenizer_dir, tokenizer))
    verify = task.verify_shards and worker.rank == 0
    rows, judge = task.recipe.rows(task, tokenizer, verify), task.recipe.judge(task, tokenizer, verify)
    dtype = precision.choose_dtype(task.dtype, worker.device)
    loaded = newest(task, worker)
    num_iterations, device_batch = agree(worker, lambda: choose_sizes(task, worker.device, worker.world_size))
    task = with_batch(task, device_batch)
    plan = BatchPlan(task.rows_per_step, device_batch, worker.world_size)
    model, optimizer = fresh(task, worker.device, dtype)
    state: dict[str, Any] = {
        "step": 0, "rows_consumed": 0, "total_tokens": 0, "total_training_flops": 0.0, "total_training_time": 0.0,
        "smooth_loss": 0.0, "best_checkpoint": None,
    }  # fmt: skip
    if loaded is not None:
        _check_continues(task, loaded, num_iterations, rows)
        assert loaded.optimizer is not None
        _check_weights(model, loaded)
        model.load_state_dict(loaded.model)
        optimizer.load_state_dict(loaded.optimizer)
        state |= loaded.meta["state"]
    if worker.rank == 0:
        print(_beginning(task, loaded, num_iterations), flush=True)
    agree(worker, lambda: check_room(task, model, optimizer.state_dict(), num_iterations - state["step"]))
    forward = compiled(model, task.compile, worker.device)
    carried = state.get("objective", state.pop("lens", {}))  # "lens": as checkpoints before 2026-11-27 call it
    objective = task.recipe.objective(task, Start(forward, worker.world_size, progress_of(num_iterations), carried))
    return Setup(
        task, worker, model, forward, optimizer, tokenizer, rows, judge, objective, plan, num_iterations, dtype, state
    )


def progress_of(num_iterations: int) -> Callable[[int], float]:
    """The share of a run that is done when a step begins: 0 at the first step, 1 at the last."""
    last = max(1, num_iterations - 1)
    return lambda step: step / last


def newest(task: TrainTask, worker: Worker) -> Checkpoint | None:
    """The newest intact checkpoint of this stage, the same on every rank; None when the stage has no checkpoint."""
    path = agree(worker, lambda: newest_to_resume(checkpoints_dir(task), task.stage))
    if path is None:
        return None
    with otel.span("checkpoint_load", path=path):
        return load_checkpoint(path, with_optimizer=True)


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
        with otel.span("checkpoint_load", path=task.init_from):
            loaded = load_checkpoint(task.init_from, with_optimizer=False)
        start = loaded.model
        if model.memory is not None and loaded.meta.get("router_trained"):
            model.memory.router_trained = True
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


def _check_continues(task: TrainTask, loaded: Checkpoint, num_iterations: int, rows: Rows) -> None:
    task.check_continues(loaded.meta["identity"], loaded.path)
    check_horizon(loaded.path, loaded.meta["num_iterations"], num_iterations)
    if loaded.meta["train_data"] != rows.digest:
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


def plans_ahead(objective: Objective, batches: Iterator[Batch]) -> Generator[StepPlan]:
    """Plans of micro-batches in order, drawn by a thread that is two micro-batches ahead of use."""
    return ahead(mapped(objective.plan, batches), 2, "step-plans")


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
    tokenizer = Tokenizer.load(task.tokenizer_dir)
    rows, judge = task.recipe.rows(task, tokenizer, False), task.recipe.judge(task, tokenizer, False)
    plan = BatchPlan(task.rows_per_step // world_size, task.train.device_batch_size, 1)
    model, optimizer = fresh(task, device, precision.choose_dtype(task.dtype, device))
    forward = compiled(model, task.compile, device)
    objective = task.recipe.objective(task, Start(forward, 1, lambda step: 0.5, {}))  # variants of a run's mean length
    stepper = Stepper(objective, optimizer, device, 1, plan.accum_steps, task.train.grad_clip, Stopwatch(device))
    plans = plans_ahead(objective, rows.read(plan, 0, 0, CALIBRATION_STEPS))
    seconds: list[float] = []
    least = 1 if forward is model else 2  # the first step of a compiled model says how long compiling takes
    while len(seconds) < CALIBRATION_STEPS and (
        len(seconds) < least or sum(seconds) < CALIBRATION_SHARE * task.train.max_minutes * 60
    ):
        before = time.perf_counter()
        stepper.run(len(seconds), plans, 0.0, 0.85, stop=False)
        seconds.append(time.perf_counter() - before)
    step_s = statistics.fmean(seconds[1:] or seconds)
    plans.close()
    validation_s = judge.seconds(model, world_size)
    again = max(0.0, seconds[0] - step_s)  # compiling, and whatever else only a first step does
    pace = Pace(spent=2 * waited + time.time() - start + again, step=step_s, validation=validation_s)
    fitting = fitting_steps(task.train, pace)
    steps = horizon_steps(task, fitting)
    storage.write_json(_horizon_file(task), {"num_iterations": steps, "step_seconds": step_s})
    print(f"{task.stage}: {describe(task.train, pace, fitting, steps)}", flush=True)
    return steps


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
    objective = task.recipe.objective(replace(task, compile="off"), Start(model, 1, lambda step: 0.0, {}))
    rows = task.recipe.rows(task, Tokenizer.load(task.tokenizer_dir), False)
    batches = rows.read(BatchPlan(1, 1, 1), 0, 0, 64)
    first = next(batches)
    text = next((batch for batch in itertools.chain([first], batches) if batch.kind[0] == TEXT), first)
    objective.begin(0)  # the first steps decide, whose variants are the longest
    plan = objective.plan(text).to(device)
    row_bytes = saved_bytes(model, lambda: objective.loss(plan, 1.0, Stopwatch(device)))
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


def loop_meta(setup: Setup) -> dict[str, Any]:
    """What a checkpoint stores beside the tensors, as plain JSON."""
    memory = setup.task.memory
    trained = setup.model.memory is not None and setup.model.memory.routes
    return {
        **({"memory_config": asdict(memory), "router_trained": trained} if memory is not None else {}),
        "identity": setup.task.identity(),
        "num_iterations": setup.num_iterations,
        "train_data": setup.rows.digest,
        "tokenizer_digest": setup.tokenizer.digest,
        "model_config": json.loads(json.dumps(setup.task.identity()["model_config"])),
        "state": setup.state,
        "best_checkpoint": setup.state["best_checkpoint"],
        "provenance": dict(setup.task.provenance),
    }
