"""Learning rate and momentum as pure functions of the step: nanochat's 2025 recipe."""

from __future__ import annotations

MUON_WARMUP_STEPS = 300


def lr_multiplier(
    step: int, num_iterations: int, warmup_ratio: float = 0.0, warmdown_ratio: float = 0.2, final_lr_frac: float = 0.0
) -> float:
    """Share of the peak learning rate at a step in [0, num_iterations]: linear rise, plateau, linear fall.

    The rise takes `warmup_ratio` of the steps, the fall `warmdown_ratio`, down to `final_lr_frac` of the peak.
    """
    warmup_steps = round(warmup_ratio * num_iterations)
    warmdown_steps = round(warmdown_ratio * num_iterations)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= num_iterations - warmdown_steps:
        return 1.0
    left = (num_iterations - step) / warmdown_steps
    return left + (1.0 - left) * final_lr_frac


def muon_momentum(step: int) -> float:
    """Muon's momentum: 0.85 at the start, 0.95 from step 300, linear between."""
    done = min(step / MUON_WARMUP_STEPS, 1.0)
    return 0.85 + done * (0.95 - 0.85)
