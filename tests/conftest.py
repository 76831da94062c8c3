"""Fixtures shared by the tests: the shared data folder and one local Ray cluster."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from jobs.runtime.cluster import QUIET
from jobs.runtime.patience import PATIENT, START_TIMEOUT_S, wait_for_own_node

# No test is about the clock: a busy machine draws examples slowly.
settings.register_profile("any clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any clock")

# A shell's `&` ignores SIGINT for all processes below it, `nohup` SIGHUP. Tests send both to processes of their own.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Ray reads these when it is first imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB__SERVICE_WAIT", str(START_TIMEOUT_S))
os.environ.update(QUIET | PATIENT | os.environ)
os.environ.pop("RAY_ADDRESS", None)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests skip without it, except in CI, where it must be there."""
    folder = Path(os.environ.get("MEGACONTEXT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        message = f"shared data not found at {folder}; set MEGACONTEXT_SHARED_DATA to run this test"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray for the whole test session (four logical CPUs, small object store)."""
    import ray

    wait_for_own_node()
    context = ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=tempfile.mkdtemp(prefix="r", dir="/tmp"),  # Unix sockets have short paths
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}},
    )
    yield context
    ray.shutdown()
