"""What the folder of a run says about it, for the card."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_noneuclid import NonEuclideanDescent, methods
from hf_noneuclid.experiments.common import InputError, option_pairs
from hf_noneuclid.experiments.publishing.hub import WEIGHTS
from hf_noneuclid.experiments.secrets import scrub

# Numbers of metrics.json that are not results.
COUNTS = {"seconds", "steps", "limited_steps", "tokens", "parameters", "trained_parameters"}
COUNTS |= {"diverged_at", "best_eval_step"}


@dataclass(frozen=True)
class RunFacts:
    """A finished run."""

    folder: Path
    metrics: Mapping[str, Any]
    """What its metrics.json holds, without secrets."""

    @classmethod
    def read(cls, folder: Path) -> "RunFacts":
        """Reads the folder of a run.

        Raises:
            InputError: It holds no finished run with a model.
        """
        try:
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no finished run (metrics.json: {error})") from error
        if metrics.get("diverged"):
            raise InputError(f"{folder}: the run diverged, so its model is not pushed")
        if not has_model(folder):
            raise InputError(f"{folder} holds no model (model*.safetensors or adapter_model.safetensors)")
        return cls(folder, scrub(metrics))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the recipe and its Trainer."""
        return dict(self.metrics.get("options", {}))

    @property
    def optimizer(self) -> str:
        """The name given with ``--optim``."""
        return str(self.options.get("optim", "adamw_torch"))

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter of another model."""
        return (self.folder / "adapter_config.json").is_file()

    @property
    def task(self) -> str:
        """The Hub's name of what the model does."""
        language = "fill-mask" if self.options.get("task") == "masked_lm" else "text-generation"
        return "text-classification" if "classes" in self.metrics else language

    @property
    def hub_base(self) -> str | None:
        """The Hub's name of the model that training started from; None if it has none."""
        base = self.metrics.get("base_model")
        return base["name"] if base and base["on_hub"] else None

    @property
    def results(self) -> dict[str, float]:
        """Every number that is a result."""
        metrics = self.metrics.items()
        return {key: value for key, value in metrics if type(value) in (int, float) and key not in COUNTS}

    def method(self) -> dict[str, Any]:
        """The method with the value of every option; empty for an optimizer that is not of this package."""
        try:
            name = methods.canonical_name(self.optimizer)
        except ValueError:
            return {}
        given = methods.parse_options(option_pairs(self.options.get("optim_args")))
        settings, tuning = methods.resolve(name, **given)
        parameters = inspect.signature(NonEuclideanDescent).parameters.values()
        defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
        del defaults["step_size"], defaults["spectral_scale"]  # part of the settings; set by no method
        defaults["matrix_lr_scale"] = methods.DEFAULT_MATRIX_LR_SCALE
        values = {**asdict(settings), **defaults, **tuning}
        taken = {*asdict(settings), *methods.method_options(name, settings.step_size), "weight_decay"}
        shown = {key: value for key, value in values.items() if key in taken}
        run = {key: value for key, value in self.options.items() if key in ("weight_decay", "learning_rate")}
        return {"method": name, **shown, **run}


def has_model(folder: Path) -> bool:
    """Whether a folder holds weights that ``from_pretrained`` can load."""
    return any(path for pattern in WEIGHTS for path in folder.glob(pattern))
