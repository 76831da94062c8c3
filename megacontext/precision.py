"""Dtype, compilation and threads, chosen from what the hardware can do."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass

import torch

from megacontext import arguments
from megacontext.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Hardware:
    """What decides the choices, so that tests can describe machines they do not run on."""

    cuda_capability: tuple[int, int] | None = None
    cpu_bf16: bool = False
    cxx: bool = False
    triton: bool = False

    @classmethod
    def probe(cls, device: torch.device) -> Hardware:
        """This machine, seen from `device`."""
        return cls(
            cuda_capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            cpu_bf16=_cpu_has_bf16(),
            cxx=any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")),
            triton=importlib.util.find_spec("triton") is not None,
        )


def _cpu_has_bf16() -> bool:
    """Whether matrix products in bfloat16 run natively: Intel AMX, or AVX-512 BF16 (Zen 4 and later, Cooper Lake)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def usable_cores() -> int:
    """Cores this process may run on; fewer than the machine has under taskset or a cpuset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_of(given: str | torch.device) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1". Raises UserError for one that is unknown or is not there."""
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {given!r} cannot be used: {reason}. Use cpu, or a GPU that this machine has."
        ) from error
    return device


def choose_dtype(name: str, device: torch.device, hardware: Hardware | None = None) -> torch.dtype:
    """The compute dtype for "auto", "fp32" or "bf16": auto is bfloat16 where it is native, float32 where it is emulated.

    Native means GPUs of compute capability 8.0 on, and CPUs with AMX or AVX-512 BF16. Raises UserError for other names.
    """
    if arguments.choice("dtype", name, ("auto", *DTYPES)) != "auto":
        return DTYPES[name]
    hardware = hardware or Hardware.probe(device)
    if device.type == "cuda":
        native = hardware.cuda_capability is not None and hardware.cuda_capability >= (8, 0)
    else:
        native = device.type == "cpu" and hardware.cpu_bf16
    return torch.bfloat16 if native else torch.float32


def choose_compile(name: str, device: torch.device, hardware: Hardware | None = None) -> bool:
    """Whether to torch.compile for "auto", "on" or "off"; auto is on for GPUs with Triton and off on CPUs.

    On a CPU compiling takes about a minute and gains little over the eager step, which fuses what matters by hand.
    Raises UserError when "on" is asked for and the compiler is missing.
    """
    if arguments.choice("compile", name, ("auto", "on", "off")) == "off":
        return False
    hardware = hardware or Hardware.probe(device)
    available = hardware.triton if device.type == "cuda" else hardware.cxx
    if name == "on" and not available:
        need = "Triton" if device.type == "cuda" else "a C++ compiler (g++ or clang++)"
        raise UserError(f"--compile on needs {need} on this machine; install it, or use --compile off.")
    return available and (name == "on" or device.type == "cuda")


def set_threads(threads: int = 0) -> int:
    """Let torch use `threads` cores in this process (0: all it may run on); returns how many."""
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks instead of returning them to the kernel; True if it did.

    A CPU step frees and takes hundreds of megabytes. By default each large block is a new mapping, and its page faults
    cost more than many of the operations on it. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # names of the parameters in malloc.h
    # The pad is address space, not memory; it keeps the heaps of threads, 64 MiB each, from being unmapped when empty.
    settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 << 20), (arena_max, 1))
    return all([bool(mallopt(key, value)) for key, value in settings])
