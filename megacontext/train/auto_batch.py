"""The device batch of an `--mc` run: small enough that a row's views take no more memory than the rows alone did."""

from __future__ import annotations

from megacontext.config import MemoryConfig
from megacontext.train.views import ViewSettings


def fitting_batch(device_batch: int, config: MemoryConfig, tokens: int) -> int:
    """The largest device_batch / 2^k whose rows of T tokens, with their variants, are no more entries than before.

    The first steps decide, whose variants are the longest. Rows that a batch loses are made up by accumulation, so the
    tokens of a step stay the same. 1 when nothing else fits; the batch itself with `mc_auto_batch` 0 or without variants.
    """
    if not config.mc_auto_batch:
        return device_batch
    settings = ViewSettings.of(config, tokens)
    per_row = tokens + settings.variants * settings.first_entries
    fitting = device_batch
    while fitting > 1 and fitting * per_row > device_batch * tokens:
        fitting = fitting // 2 if fitting % 2 == 0 else 1
    return fitting
