"""Fixtures shared by the tests: the shared data folder and one local Ray cluster."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from patience import PATIENCE_S

from jobs.runtime.cluster import QUIET
from jobs.runtime.patience import PATIENT, START_TIMEOUT_S, wait_for_own_node
from megacontext.telemetry import otel, otlp

if TYPE_CHECKING:
    from collector import Collector

# No test is about the clock: a busy machine draws examples slowly.
settings.register_profile("any clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any clock")

# A shell's `&` ignores SIGINT for all processes below it, `nohup` SIGHUP. Tests send both to processes of their own.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What a developer has set for jobs of their own does not reach the tests, nor the processes that they start.
SETTINGS = ("WANDB_", "MC_", "OTEL_", "NANOCHAT_BASE_DIR", "RAY_ADDRESS", "TRACEPARENT", "MEGACONTEXT_", "HF_TOKEN")
FOR_TESTS = ("MEGACONTEXT_SHARED_DATA", "MC_SOAK")


def job_settings() -> dict[str, str]:
    """The variables that jobs read, as they are now."""
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS) and name not in FOR_TESTS}


for name in job_settings():
    del os.environ[name]

# Ray reads these when it is first imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("WANDB__SERVICE_WAIT", str(START_TIMEOUT_S))
os.environ.update(QUIET | PATIENT | os.environ)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test sets for jobs ends with the test, also where the code under test sets it."""
    before = job_settings()
    yield
    for name in job_settings():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that sending takes on a busy machine."""
    monkeypatch.setattr(otlp, "SEND_SECONDS", PATIENCE_S)
    monkeypatch.setattr(otel, "CLOSE_SECONDS", PATIENCE_S)


@pytest.fixture(params=otlp.PROTOCOLS)
def protocol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
    return str(request.param)


@pytest.fixture
def collector(patient: None, protocol: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that `MC_OTEL_ENDPOINT` names, of each protocol."""
    from collector import Collector  # gRPC's threads are for those who ask for them

    server = Collector(protocol)
    monkeypatch.setenv(otlp.ENDPOINT, server.address)
    monkeypatch.setenv(otlp.INSECURE, "1")
    yield server
    server.close()


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
