"""How long a test waits for another process.

The bound is for a machine with twenty busy processes a core: there, what takes a minute alone takes twenty. A process
that hangs fails its test in the end, and no test is right or wrong by how long anything took.
"""

PATIENCE_S = 1500.0  # less than pytest's own `timeout`, whose message says less
