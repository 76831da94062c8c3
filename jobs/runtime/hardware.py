"""The GPUs that a job could train on, and the tier that fits them."""

from __future__ import annotations

import os

from megacontext.config import TIERS

_LARGE = ("H100", "H200", "H20", "A100", "B200", "GH200", "GB200", "MI300")  # accelerator names with 80 GB or more


def gpu_count(launcher: str) -> int:
    """GPUs of this machine; where it has none and Ray launches on a cluster that is running, those of the cluster."""
    here = _local_gpus()
    return here if here or not _joins_cluster(launcher) else int(_cluster_resources().get("GPU", 0))


def searched(launcher: str) -> str:
    """Where `gpu_count` looked, in words."""
    return "this machine or on the Ray cluster" if _joins_cluster(launcher) else "this machine"


def detect_tier(launcher: str) -> str:
    """`cpu` without a GPU, `speedrun` with eight or more, else by the memory of the first GPU."""
    count = gpu_count(launcher)
    if count == 0:
        return "cpu"
    if count >= 8:
        return "speedrun"
    return "h100" if _is_large(launcher) else "5090"


def needs_gpu(tier: str) -> bool:
    """Whether a tier is sized for GPUs."""
    return tier in TIERS and tier != "cpu"


def _is_large(launcher: str) -> bool:
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.get_device_properties(0).total_memory > 48 * 2**30)
    names = [name.partition(":")[2] for name in _cluster_resources() if name.startswith("accelerator_type:")]
    return any(large in name.upper() for name in names for large in _LARGE)


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _joins_cluster(launcher: str) -> bool:
    """Whether training will join a Ray cluster that is running: the driver of a Ray job may sit on a node without GPU.

    RAY_ADDRESS with http is the address of the Jobs API, for a client; no process can join the cluster by it.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    return launcher == "ray" and bool(address) and not address.startswith("http")


def _cluster_resources() -> dict[str, float]:
    import ray

    from jobs.runtime.cluster import start_ray

    start_ray()
    resources: dict[str, float] = ray.cluster_resources()
    return resources
