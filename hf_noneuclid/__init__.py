"""Non-Euclidean gradient descent for the Hugging Face Trainer.

Muon, Scion, PolarGrad and MuonMax: ``import hf_noneuclid``, then ``TrainingArguments(optim="muonmax_momo")``.
There is no learning rate to choose: methods named ``_momo`` find their step size (``hf_noneuclid.slope``,
``hf_noneuclid.momo``), and so do the others with ``step_size=slope``. The optimizer itself needs only torch.
The algorithm on one device is in ``hf_noneuclid.reference``: read it first.

References:
    M. Crawshaw, C. Modi, M. Liu, R. M. Gower, "An Exploration of Non-Euclidean Gradient Descent: Muon and
    its Many Variants", arXiv 2510.09827, 2025.
"""

from __future__ import annotations

import importlib
import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .diagnostics import DivergedError
from .groups import one_group
from .methods import METHODS, create_optimizer
from .optimizer import NonEuclideanDescent
from .routing import route_parameters

if TYPE_CHECKING:
    from .observation import observe
    from .trainer import NonEuclidTrainer, NonEuclidTrainerMixin

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "DivergedError",
    "NonEuclidTrainer",
    "NonEuclidTrainerMixin",
    "NonEuclideanDescent",
    "create_optimizer",
    "observe",
    "one_group",
    "register",
    "route_parameters",
]


def register() -> None:
    """Makes the methods known to the Trainer by name. May be called again; importing the package does.

    Raises:
        ImportError: transformers or accelerate is missing or too old.
    """
    from .trainer import register as register_with_transformers

    register_with_transformers()


def __getattr__(name: str) -> Any:
    module = {"NonEuclidTrainer": ".trainer", "NonEuclidTrainerMixin": ".trainer", "observe": ".observation"}
    if name in module:
        return getattr(importlib.import_module(module[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


try:
    if find_spec("transformers") and find_spec("accelerate"):
        register()
except ImportError as error:  # without them the optimizer still works
    logging.getLogger(__name__).warning("the methods are not registered with the Trainer: %s", error)
