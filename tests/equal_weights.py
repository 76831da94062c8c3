"""Weights that depend on a parameter's name and shape alone, so that what two models share is equal in both."""

from __future__ import annotations

import zlib

import torch


def fill_by_name(module: torch.nn.Module) -> None:
    """Set every parameter: normal, of standard deviation 1/√(inputs) for matrices and 0.3 for vectors."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            deviation = 0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
