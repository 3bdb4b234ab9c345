"""The arguments of the Trainer with the defaults of the recipes, and those that the recipes add."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import get_available_reporting_integrations

from hf_noneuclid.experiments.common import InputError
from hf_noneuclid.experiments.secrets import keep_token
from hf_noneuclid.experiments.training.arguments import DEFAULT_MODEL, option

NEVER_LISTED = {"azure_ml", "flyte"}  # transformers never lists these trackers as installed


@dataclass
class RecipeArguments(TrainingArguments):
    """The Trainer's own arguments with the defaults of the recipes, and what they add to them."""

    output_dir: str = option(DEFAULT_MODEL, "Where checkpoints, the model, metrics.json and curves.png go.")
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left in the output folder.")
    resume_from_checkpoint: str | None = option(
        None, "true: go on from the last checkpoint of the output folder; or a path."
    )
    global_batch_size: int | None = option(
        None, "Sequences in a step on all devices together; an error if the other options differ."
    )
    decay_fraction: float = option(
        0.6, "Last part of the steps, over which warmup_stable_decay lowers the learning rate."
    )
    overwrite_hub_model: bool = option(False, "Replace another model that the repository on the Hub holds.")
    hub_license: str | None = option(None, "Licence of the weights for the model card: apache-2.0, mit, ...")
    data_license: str | None = option(None, "Licence of the data for the model card, where it is not known.")

    optim: str = option("muonmax_momo", "A method of hf_noneuclid or an optimizer of the Trainer.")
    learning_rate: float | None = option(1e-2, "Peak learning rate.")
    lr_scheduler_type: str = option(
        "warmup_stable_decay", "Without lr_scheduler_kwargs: constant, then linear down to 10%% of the peak."
    )
    max_grad_norm: float = option(1.0, "Largest norm of the gradient.")
    max_steps: int = option(200, "Steps; -1 to train for num_train_epochs instead.")
    per_device_train_batch_size: int = option(8, "Sequences in a step on each device.")
    per_device_eval_batch_size: int = option(8, "Sequences in an evaluation step on each device.")
    data_seed: int | None = option(None, "Seed of the order of the data. Default: --seed.")
    # The Trainer's own default, True, searches the graph in every step; these models use all their weights.
    ddp_find_unused_parameters: bool | None = option(False, "Look for weights without a gradient under DDP.")
    logging_steps: float = option(5, "Steps between logs; below 1 a part of all.")
    # The filter replaces a NaN by the mean so far: a diverged run would look healthy.
    logging_nan_inf_filter: bool = option(False, "Leave NaN out of logged losses.")
    eval_strategy: str = option("steps", "When to evaluate: no, steps, epoch.")
    eval_steps: float | None = option(0.2, "Steps between evaluations; below 1 a part of all steps.")
    save_steps: float = option(0.5, "Steps between checkpoints; below 1 a part of all steps.")
    save_total_limit: int | None = option(2, "Checkpoints kept.")

    def __post_init__(self) -> None:
        keep_token(self)
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed
        self.dataloader_pin_memory &= self.device.type != "cpu"  # torch warns of it at every evaluation
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(
                f"--max_steps must be at least 1, or -1 to train for --num_train_epochs, not {self.max_steps}"
            )
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise InputError(f"--decay_fraction must lie in [0, 1], not {self.decay_fraction}")
        if str(self.resume_from_checkpoint).lower() in ("none", "false", ""):
            self.resume_from_checkpoint = None
        self._check_global_batch_size()
        self._check_trackers()

    def changed(self) -> dict[str, Any]:
        """The options that differ from the plain Trainer's defaults, and those that recipes add."""
        plain = {item.name: item.default for item in fields(TrainingArguments)}
        values = {key: value for key, value in self.to_dict().items() if not key.endswith("_token")}
        return {key: value for key, value in values.items() if key not in plain or value != plain[key]}

    @property
    def method(self) -> str:
        """The name given with --optim, which the Trainer makes a member of an enumeration."""
        return str(getattr(self.optim, "value", self.optim))

    @property
    def sequences_per_step(self) -> int:
        """The global batch size: sequences in a step on all devices together."""
        return int(self.train_batch_size * self.gradient_accumulation_steps * self.world_size)

    def _check_global_batch_size(self) -> None:
        if self.global_batch_size not in (None, self.sequences_per_step):
            factors = {
                "per_device_train_batch_size": self.per_device_train_batch_size,
                "gradient_accumulation_steps": self.gradient_accumulation_steps,
                "devices": self.world_size * max(1, self.n_gpu),
            }
            product = " x ".join(f"{value} ({name})" for name, value in factors.items())
            raise InputError(
                f"--global_batch_size {self.global_batch_size} is not {product} = {self.sequences_per_step}: "
                f"change --per_device_train_batch_size or --gradient_accumulation_steps"
            )

    def _check_trackers(self) -> None:
        """The Trainer itself would complain only after model and data are loaded."""
        try:
            get_reporting_integration_callbacks(self.report_to)
        except ValueError as error:
            raise InputError(f"--report_to: {error}") from error
        missing = set(self.report_to) - {*get_available_reporting_integrations(), *NEVER_LISTED}
        if missing:
            raise InputError(f"--report_to {', '.join(sorted(missing))}: it is not installed, or too old")


@dataclass
class SampleArguments:
    """The text that a language model writes at the end."""

    sample_tokens: int = option(120, "Length of the text generated at the end; 0 for none.")
    prompt: str | None = option(None, "Start of that text. Default: the start of the validation part.")


@dataclass
class PretrainArguments(SampleArguments, RecipeArguments):
    """How pretrain.py trains."""


@dataclass
class ClassifyArguments(RecipeArguments):
    """How classify.py trains."""

    output_dir: str = option(
        "outputs/classify", "Where checkpoints, the model, metrics.json and curves.png go."
    )
    learning_rate: float | None = option(None, "Peak learning rate. Default: the preset's.")
    preset: bool = option(
        True, "Take options of our methods that are not given from experiments/training/presets.py."
    )
    max_steps: int = option(60, "Steps; -1 to train for num_train_epochs instead.")
    include_num_input_tokens_seen: str = option("all", "Which tokens are counted: all, non_padding, no.")


@dataclass
class FinetuneArguments(SampleArguments, ClassifyArguments):
    """How finetune.py trains: as a classifier, with other defaults."""

    output_dir: str = option(
        "outputs/finetune", "Where checkpoints, the model, metrics.json and curves.png go."
    )
