"""A run whose numbers are no longer finite ends before they are saved."""

from __future__ import annotations

from torch import Tensor

from fastuft.runfolder import Checkpoints
from fastuft.trainer.learner import Learner
from fastuft.trainer.learner_state import ranks_without_finite_weights


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step, the rank and the last good checkpoint."""


def check_losses(losses: Tensor, last_step: int, checkpoints: Checkpoints) -> None:
    """Check the losses [ranks, steps] of the steps up to ``last_step``.

    Raises:
        NonFiniteLossError: one is not finite; the message names the first such step.
    """
    bad = (~losses.T.isfinite()).nonzero().tolist()
    if bad:
        step, rank = last_step - losses.shape[1] + bad[0][0] + 1, bad[0][1]
        raise _error(f"the loss is not finite at step {step} on rank {rank}", checkpoints)


def check_weights(learner: Learner, step: int, checkpoints: Checkpoints) -> None:
    """Check the weights and the queue of all ranks; the host waits for the device.

    Raises:
        NonFiniteLossError: a value is not finite.
    """
    bad = ranks_without_finite_weights(learner)
    if bad:
        raise _error(f"the weights are not finite after step {step} on rank {bad[0]}", checkpoints)


def _error(what: str, checkpoints: Checkpoints) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what}; the last good checkpoint is {checkpoints.last_good()}. Lower optim.lr, set optim.clip_grad, or use "
        "runtime.precision=fp32, and continue with resume=auto"
    )
