"""Optimizers to compare with, from the extra ``peers``; suites name them as they name methods.

Importing this module is quick; neither torch nor a peer is imported with it.
"""

from importlib.util import find_spec
from typing import Any

from hf_noneuclid.experiments.common import require

PEERS = ("prodigy", "momo_adam")
PACKAGES = {"prodigy": "prodigyopt", "momo_adam": "momo", "schedule_free_adamw": "schedulefree"}
HINT = "pip install 'hf_noneuclid[peers]'"


def check_peer(method: str) -> None:
    """Raises InputError if a method of a suite needs a package that is not installed."""
    package = PACKAGES.get(method)
    is_there = package is None or find_spec(package) is not None
    require(is_there, f"{method}: there is no package {package}: {HINT}")


def peer(args: Any) -> tuple[type, dict[str, Any]]:
    """The class of the optimizer that ``--peer`` names, and its arguments, for the Trainer.

    Raises:
        InputError: Its package is not installed, or the run accumulates gradients where the loss is needed.
    """
    check_peer(args.peer)
    options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    accumulates = args.peer == "momo_adam" and args.gradient_accumulation_steps > 1
    require(not accumulates, "--peer momo_adam takes one loss: it needs --gradient_accumulation_steps 1")
    if args.peer == "momo_adam":
        return _momo_adam(), options
    from prodigyopt import Prodigy

    return Prodigy, {**options, "safeguard_warmup": args.warmup_steps > 0}


def _momo_adam() -> type:
    from momo import MomoAdam

    class MomoAdamOfTrainer(MomoAdam):
        """MoMo-Adam, which takes the loss of the step from an attribute that RecipeTrainer sets."""

        loss: Any = None

        def step(self, closure: Any = None, loss: Any = None) -> Any:
            return super().step(closure, self.loss if closure is None else None)

    return MomoAdamOfTrainer
