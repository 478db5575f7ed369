"""The operations that ``balora bench`` knows, by name."""

from __future__ import annotations

from . import linear_objective, logit_losses, pissa_setup, randomized_svd
from .operation import Operation

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        linear_objective.OPERATION,
        logit_losses.CONSISTENCY,
        logit_losses.DIVERSITY,
        logit_losses.SVD,
        logit_losses.COVARIANCE,
        randomized_svd.OPERATION,
        pissa_setup.OPERATION,
    )
}
