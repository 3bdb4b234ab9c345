"""Options of our methods that suit fine-tuning, taken where the user gives none.

The values are cautious, and are to be replaced by what the suite finetune_mini finds. A constrained step
moves every matrix by the learning rate times `matrix_lr_scale` in spectral norm, whatever the gradient: a
pretrained matrix with singular values of order one must not be moved by its own size in a hundred steps.
"""

from dataclasses import dataclass, field

from hf_noneuclid.methods import all_names

from finetuning.finetune_options import FinetuneArguments, FinetuneModelArguments

ADAM_LEARNING_RATE = 5e-5  # the Trainer's own default, for its own optimizers


@dataclass(frozen=True)
class Preset:
    """What is taken where the user gives nothing.

    Attributes:
        learning_rate: peak.
        method_options: of --optim_args, of those that every method of ours has.
        reason: why these.
    """

    learning_rate: float
    method_options: dict[str, float] = field(default_factory=dict)
    reason: str = ""


PRESETS = {
    "full": Preset(
        1e-3,
        {"matrix_lr_scale": 10.0},
        "a tenth of the learning rate of pre-training: weights that are good already move less",
    ),
    "lora": Preset(
        1e-3,
        {"matrix_lr_scale": 10.0},
        "as full; B starts from zero, so adapters of any size come from the steps alone",
    ),
}


def apply_preset(model_args: FinetuneModelArguments, args: FinetuneArguments) -> None:
    """Fill in the learning rate and method options that are not given."""
    preset = PRESETS["lora" if model_args.lora_rank else "full"]
    ours = args.optim.value in all_names()
    if args.learning_rate is None:
        args.learning_rate = preset.learning_rate if ours else ADAM_LEARNING_RATE
    if ours and args.preset:
        given = args.optim_args or ""
        named = {pair.partition("=")[0].strip() for pair in given.split(",")}
        missing = [f"{name}={value}" for name, value in preset.method_options.items() if name not in named]
        args.optim_args = ",".join(filter(None, [given, *missing])) or None
