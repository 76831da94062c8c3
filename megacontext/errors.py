"""Errors a user can meet. Each message names the value, the limit and the remedy.

    MegaContextError
    ├── UserError (also ValueError)      a flag, a config or an argument is wrong
    │   ├── DataError                    shards, parquet files, manifests
    │   │   └── DamagedError             a stored file is missing, incomplete or has changed
    │   └── CheckpointError              a checkpoint is missing, half written or does not fit
    ├── StorageError (also OSError)      a path or URI cannot be reached, or has no room left
    └── NonFiniteError                   a model computes NaN or infinity where a number must be
        └── NonFiniteLossError           the loss became NaN or infinite

All of them survive pickling: they cross process borders.
"""


class MegaContextError(Exception):
    """Base class of every error this project raises on purpose."""


class UserError(MegaContextError, ValueError):
    """The request cannot be carried out as written."""


class DataError(UserError):
    """Input data is missing, damaged or does not fit the model."""


class DamagedError(DataError):
    """Stored data is missing, incomplete or has changed since it was stored."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit the run."""


class StorageError(MegaContextError, OSError):
    """Storage cannot be reached or is full."""


class NonFiniteError(MegaContextError, ArithmeticError):
    """A model computes NaN or infinity: its weights are damaged, or its dtype is too narrow."""


class NonFiniteLossError(NonFiniteError):
    """The loss is NaN or infinite; raised before the optimizer step, so the weights are still good."""
