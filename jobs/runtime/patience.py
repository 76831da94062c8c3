"""How long the processes of a one-machine Ray cluster may take to start.

Ray's own limits are 30 to 60 seconds, and a machine that is busy with other work does not keep them: each Python process
of Ray needs seconds of a core to import it.
"""

from __future__ import annotations

import time
from typing import Any

START_TIMEOUT_S = 900
# Environment of whoever starts a cluster or trains on one; an environment that has a value keeps it.
PATIENT = {
    "RAY_worker_register_timeout_seconds": str(START_TIMEOUT_S),
    "RAY_agent_register_timeout_ms": str(1000 * START_TIMEOUT_S),
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_TIMEOUT_S),
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": str(START_TIMEOUT_S),
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
}


def wait_for_own_node() -> None:
    """Make `ray.init(address="local")` wait up to START_TIMEOUT_S for the node that it starts, in this process.

    Ray 2.60 waits 30 seconds, a constant in its code, and the node comes up only after two Python processes have
    imported Ray. With 16 busy processes on its core it gave up (measured). Calling this twice is fine.
    """
    from ray._private import services

    look = services.get_node
    if getattr(look, "patient", False):
        return

    def get_node(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return look(*args, **kwargs)
            except RuntimeError:  # the node is not there yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    get_node.patient = True
    services.get_node = get_node
