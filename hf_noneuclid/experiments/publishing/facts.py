"""What a run folder says of its run, for the card."""

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.experiments.common import InputError, option_pairs
from hf_noneuclid.experiments.training.base_model import describe_base
from hf_noneuclid.methods import DEFAULT_MATRIX_LR_SCALE, canonical_name, parse_options, resolve
from hf_noneuclid.options import LOWER_BOUND_OPTIONS, OPTIMIZER_OPTIONS

# Parts of metrics.json that are no results.
DESCRIPTION = {
    *("seconds", "steps", "tokens", "parameters", "trained_parameters"),
    *("diverged_at", "best_eval_step"),
}
# "after" repeats what stands beside it; "before" is what it is compared with.
NESTED_DESCRIPTION = {"corpus", "hardware", "versions", "options", "config", "before", "after", "base_model"}
CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class RunFacts:
    """A finished run.

    Attributes:
        folder: the run folder.
        metrics: what its metrics.json holds.
    """

    folder: Path
    metrics: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "RunFacts":
        """Read a run folder.

        Raises:
            InputError: it holds no finished run with a model.
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
        return cls(folder, metrics)

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the recipe and its Trainer."""
        return self.metrics.get("options", {})

    @property
    def optimizer(self) -> str:
        """The name given with --optim."""
        return str(self.options.get("optim", "adamw_torch"))

    @property
    def corpus(self) -> Mapping[str, Any]:
        """Name, sizes and hashes of the data."""
        return self.metrics.get("corpus", {})

    @property
    def data_name(self) -> str:
        """What the data is called where it stands alone: of local files not where they were."""
        files = self.options.get("train_files")
        named = ", ".join(Path(file).name for file in files) if files else self.corpus.get("name")
        return str(named or "the training corpus")

    @cached_property
    def task(self) -> str:
        """The Hub's name of what the model does."""
        return "text-classification" if CLASSIFIER in "".join(self._architectures()) else "text-generation"

    @cached_property
    def adapter(self) -> bool:
        """Whether the folder holds an adapter of another model."""
        return (self.folder / "adapter_config.json").is_file()

    @cached_property
    def base_model(self) -> Mapping[str, Any] | None:
        """What the training started from (`describe_base`); None from scratch."""
        if "base_model" in self.metrics:
            return self.metrics["base_model"]
        names = ("model_name_or_path", "model_revision", "model_package", "gguf_file")
        return describe_base(*map(self.options.get, names))  # of a run that did not keep it

    @property
    def hub_base(self) -> str | None:
        """The Hub name of what the training started from, None if it has none."""
        base = self.base_model
        return base["name"] if base and base["on_hub"] else None

    def results(self) -> dict[str, float]:
        """Return every number that is a result, by its place in metrics.json."""
        return dict(_numbers(self.metrics))

    @property
    def before(self) -> Mapping[str, float]:
        """What a fine-tuning measured before it began, {} of a training from scratch."""
        return self.metrics.get("before", {})

    def method(self) -> dict[str, Any]:
        """Return the optimizer with every option of it, {} where it is none of the package's."""
        try:
            name = canonical_name(self.optimizer)
        except ValueError:
            return {}
        settings, tuning = resolve(name, **parse_options(_pairs(self.options.get("optim_args"))))
        signature = inspect.signature(NonEuclideanDescent.__init__).parameters
        defaults = {key: signature[key].default for key in OPTIMIZER_OPTIONS if key in signature}
        del defaults["lr"], defaults["spectral_scale"]  # the learning rate of the run, and matrix_lr_scale
        fixed = {key: getattr(settings, key) for key in settings.__slots__}
        values = {**defaults, **fixed, "matrix_lr_scale": DEFAULT_MATRIX_LR_SCALE, **tuning}
        values["weight_decay"] = self.options.get("weight_decay", values.get("weight_decay"))
        hidden = set() if values["momo"] else set(LOWER_BOUND_OPTIONS)
        return {"method": name, **{key: value for key, value in values.items() if key not in hidden}}

    def _architectures(self) -> list[str]:
        task = _json(self.folder / "adapter_config.json").get("task_type")
        if task is not None:
            return [CLASSIFIER] if task == "SEQ_CLS" else []
        return _json(self.folder / "config.json").get("architectures") or []


def has_model(folder: Path) -> bool:
    """Say whether a folder holds weights that from_pretrained can load."""
    return any(next(folder.glob(name), None) for name in ("model*.safetensors", "adapter_model.safetensors"))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _pairs(text: str | Mapping[str, Any] | None) -> dict[str, str]:
    if isinstance(text, Mapping):
        return {key: str(value) for key, value in text.items()}
    return option_pairs(text)


def _numbers(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in NESTED_DESCRIPTION:
            yield from _numbers(value, f"{place}{key} / ")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in DESCRIPTION:
            yield place + key, value
