"""`--init_from`: a run that starts from a trained model, ours or nanochat's, and takes over its weights, shape and tokenizer.

The model is copied into the run once, as `<run>/start/megacontext_start_000000`, so that the run stands by itself: it
continues when the model it came from is gone, and all its workers read the same bytes.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict

import megacontext as mc
from jobs.runtime import cli
from jobs.runtime.run_settings import START as STAGE
from megacontext.checkpoint import latest_checkpoint, read_meta
from megacontext.errors import UserError
from megacontext.train.checkpoint import CheckpointWriter


def take_over(args: cli.Args) -> str | None:
    """The run's copy of the checkpoint of `--init_from`, made now if it is not there; None without the flag.

    Raises CheckpointError when there is no model to take over, UserError when the run began from another one.
    """
    source = args.run.init_from
    if not source:
        return None
    directory = cli.paths(args).start_dir
    known = latest_checkpoint(directory, STAGE)
    while known is None and os.environ.get("RANK", "0") != "0":  # under torchrun the first process makes it for all
        time.sleep(0.2)
        known = latest_checkpoint(directory, STAGE, warn=lambda _: None)  # what is half written is not damaged
    if known is None:
        return _copy(source, directory)
    before = read_meta(known, "source")["source"]
    if before != source:
        raise UserError(
            f"run {cli.paths(args).run_dir!r} was started from {before!r}, --init_from is {source!r}; "
            "give the old one, or start another --run."
        )
    return known


def _copy(source: str, directory: str) -> str:
    model, tokenizer = mc.load(source)
    meta = {"source": source, "model_config": asdict(model.config)}
    if model.memory is not None:
        meta |= {"memory_config": asdict(model.memory.config), "router_trained": model.memory.routes}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        writer = CheckpointWriter(directory, STAGE, folder, keep=1)
        try:
            if latest_checkpoint(directory, STAGE, warn=lambda _: None) is None:  # else another job was faster
                writer.save(0, model.state_dict(), {}, meta)
        finally:
            writer.close()
    made = latest_checkpoint(directory, STAGE)
    assert made is not None
    size = model.config
    print(
        f"--init_from: weights, tokenizer and shape of {source} (depth {size.n_layer}, width {size.n_embd}, "
        f"{size.vocab_size} tokens) are the start of this run",
        flush=True,
    )
    return made
