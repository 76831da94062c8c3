"""Choices of dtype and compilation on machines described, not owned."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megacontext.config import GPTConfig
from megacontext.errors import UserError
from megacontext.model.gpt import GPT
from megacontext.precision import Hardware, choose_compile, choose_dtype
from megacontext.train.setup import compiled

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "hardware", "dtype"),
    [
        (CPU, Hardware(cpu_bf16=True), torch.bfloat16),
        (CPU, Hardware(cpu_bf16=False), torch.float32),
        (CUDA, Hardware(cuda_capability=(7, 5), cpu_bf16=True), torch.float32),
        (CUDA, Hardware(cuda_capability=(8, 0)), torch.bfloat16),
        (CUDA, Hardware(cuda_capability=(12, 0)), torch.bfloat16),
        (torch.device("mps"), Hardware(cpu_bf16=True), torch.float32),
    ],
)
def test_auto_is_bf16_exactly_where_it_is_native(device: torch.device, hardware: Hardware, dtype: torch.dtype) -> None:
    assert choose_dtype("auto", device, hardware) is dtype
    assert choose_dtype("fp32", device, hardware) is torch.float32
    assert choose_dtype("bf16", device, hardware) is torch.bfloat16


def test_probe_reads_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert Hardware.probe(CPU).cpu_bf16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not Hardware.probe(CPU).cpu_bf16
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert choose_dtype("auto", CPU) is torch.float32


@pytest.mark.parametrize(
    ("name", "device", "hardware", "expected"),
    [
        ("auto", CPU, Hardware(cxx=True), False),
        ("on", CPU, Hardware(cxx=True), True),
        ("auto", CUDA, Hardware(triton=True), True),
        ("auto", CUDA, Hardware(triton=False), False),
        ("off", CUDA, Hardware(triton=True), False),
    ],
)
def test_compile_is_chosen_where_it_pays(name: str, device: torch.device, hardware: Hardware, expected: bool) -> None:
    assert choose_compile(name, device, hardware) is expected


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(UserError, match=r"C\+\+ compiler.*--compile off"):
        choose_compile("on", CPU, Hardware(cxx=False))
    with pytest.raises(UserError, match=r"Triton.*--compile off"):
        choose_compile("on", CUDA, Hardware(triton=False))
    with pytest.raises(UserError, match="'fp16' is unknown"):
        choose_dtype("fp16", CPU)
    with pytest.raises(UserError, match="'yes' is unknown"):
        choose_compile("yes", CPU)


def test_compile_off_is_the_model_itself() -> None:
    model = GPT(GPTConfig(sequence_len=4, vocab_size=8, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    assert compiled(model, "off", CPU) is model
    assert compiled(model, "auto", CPU) is model


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept_in_threads_as_well() -> None:
    """Ray Train runs the loop in a thread, whose heaps glibc unmaps when they are empty unless told otherwise."""
    script = (
        "import resource, threading, torch\n"
        "from megacontext import precision\n"
        "def work():\n"
        "    assert precision.keep_freed_memory()\n"
        "    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for turn in range(12):\n"
        "        if turn == 4: before = faults()\n"
        "        blocks = [torch.ones(n << 20) for n in (1, 4, 8, 3)]\n"
        "    print(faults() - before)\n"
        "torch.set_num_threads(1)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 0.2 * 8 * 16 * 1024  # of 64 MiB in 4 KiB pages, eight times over
