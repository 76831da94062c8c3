"""A stage of the pipeline: skipped when its output is complete, else run, timed and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from jobs.cli import Args, flat_config, paths
from megacontext import storage
from megacontext.telemetry import provenance
from megacontext.telemetry.report import write_stage


def run_stage(name: str, args: Args, work: Callable[[Args], Mapping[str, Any]], again: bool = False) -> dict[str, Any]:
    """Run one stage of a run and return its metrics.

    `work` returns flat metrics `{"<stage>/<metric>": number}`; strings and lists among them (samples, say) are kept
    beside the numbers. A stage that has its record is not run again, unless `again`.
    """
    run_dir = paths(args).run_dir
    record = storage.join(run_dir, "stages", f"{name}.json")
    if not again and storage.exists(record):
        print(f"== {name}: complete, skipped", flush=True)
        known: dict[str, Any] = storage.read_json(record)["metrics"]
        return known
    print(f"== {name}", flush=True)
    store_config(args)
    began = time.time()
    output = dict(work(args))
    metrics = {key: value for key, value in output.items() if isinstance(value, int | float)}
    seconds = time.time() - began
    flops = metrics.get(f"{name}/total_training_flops", 0.0)
    texts = {key: value for key, value in output.items() if key not in metrics}
    write_stage(run_dir, name, seconds, flops, metrics, texts)
    print(f"== {name}: done in {seconds:.1f} s", flush=True)
    return metrics


def store_config(args: Args) -> None:
    """Keep the resolved settings and where they ran beside what the run makes."""
    provenance.record(paths(args).run_dir)
    storage.write_bytes(
        storage.join(paths(args).run_dir, "config.yaml"), yaml.safe_dump(flat_config(args), sort_keys=False).encode()
    )
