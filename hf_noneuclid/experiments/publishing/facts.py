"""What the folder of a run says about it, for the card."""

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.experiments.common import InputError, option_pairs
from hf_noneuclid.experiments.publishing.hub import WEIGHTS
from hf_noneuclid.experiments.secrets import scrub
from hf_noneuclid.methods import DEFAULT_MATRIX_LR_SCALE, canonical_name, parse_options, resolve

# What metrics.json holds beside results. "after" repeats results, and "before" has a column of its own.
NO_RESULTS = {
    *("seconds", "steps", "tokens", "parameters", "trained_parameters", "diverged_at", "best_eval_step"),
    *("corpus", "hardware", "versions", "options", "config", "before", "after", "base_model"),
}


@dataclass(frozen=True)
class RunFacts:
    """A finished run.

    Attributes:
        folder: Folder of the run.
        metrics: What its metrics.json holds, without secrets.
    """

    folder: Path
    metrics: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "RunFacts":
        """Reads the folder of a run.

        Raises:
            InputError: It holds no finished run with a model.
        """
        path = folder / "metrics.json"
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder} holds no finished run: {path} cannot be read ({error})") from error
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
        path = self.folder / ("adapter_config.json" if self.is_adapter else "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        kinds = f"{config.get('task_type')} {config.get('architectures')}"
        is_classifier = "SEQ_CLS" in kinds or "ForSequenceClassification" in kinds
        return "text-classification" if is_classifier else "text-generation"

    @property
    def hub_base(self) -> str | None:
        """The Hub's name of the model that training started from; None if it has none."""
        base = self.metrics.get("base_model")
        return base["name"] if base and base["on_hub"] else None

    def results(self) -> dict[str, float]:
        """Every number that is a result, by its place in metrics.json."""
        return dict(_numbers(self.metrics))

    def method(self) -> dict[str, Any]:
        """The method with the value of every option; empty for an optimizer that is not of this package."""
        try:
            name = canonical_name(self.optimizer)
        except ValueError:
            return {}
        settings, tuning = resolve(name, **parse_options(option_pairs(self.options.get("optim_args"))))
        parameters = inspect.signature(NonEuclideanDescent).parameters.values()
        defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
        del defaults["momo"], defaults["spectral_scale"]  # part of the settings; set by no method
        values = {**asdict(settings), **defaults, "matrix_lr_scale": DEFAULT_MATRIX_LR_SCALE, **tuning}
        shown = {key: value for key, value in values.items() if settings.momo or "lower_bound" not in key}
        run = {key: value for key, value in self.options.items() if key in ("weight_decay", "learning_rate")}
        return {"method": name, **shown, **run}


def has_model(folder: Path) -> bool:
    """Whether a folder holds weights that ``from_pretrained`` can load."""
    return any(path for pattern in WEIGHTS for path in folder.glob(pattern))


def _numbers(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in NO_RESULTS:
            yield from _numbers(value, f"{place}{key} / ")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in NO_RESULTS:
            yield place + key, value
