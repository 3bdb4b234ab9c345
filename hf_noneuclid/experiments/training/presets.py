"""Options of our methods that suit fine-tuning, for those that the user does not give."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_noneuclid.experiments.common import option_pairs
from hf_noneuclid.experiments.training.options import ClassifyArguments

ADAM_LEARNING_RATE = 5e-5  # the Trainer's own default, for its own optimizers


@dataclass(frozen=True)
class Preset:
    """A learning rate and options of ``--optim_args``, for a user who gives none.

    The learning rate is that of methods whose step size nothing else bounds. The slope rule was chosen with
    the options' defaults, and needs none.
    """

    learning_rate: float
    options: Mapping[str, float] = field(default_factory=dict)


# Those of language models come from the suite finetune_mini, 16 steps of 512 tokens each: a momentum of 0.95
# remembers more steps than that. That of classifiers was the best of three for a loss that comes near zero.
FULL = Preset(3e-4, {"momentum": 0.8})
LORA = Preset(3e-3, {"momentum": 0.8})
CLASSIFIER = Preset(1e-3)


def apply_preset(preset: Preset, args: ClassifyArguments) -> None:
    """Fills in the learning rate and the method's options that are not given, and prints the options."""
    if args.learning_rate is None:
        args.learning_rate = preset.learning_rate if args.step_size else ADAM_LEARNING_RATE
    if not args.preset or args.step_size is None or "slope" in args.step_size:
        return
    given = option_pairs(args.optim_args)
    if missing := [f"{name}={value}" for name, value in preset.options.items() if name not in given]:
        args.optim_args = ",".join(filter(None, [args.optim_args, *missing]))
        if args.process_index == 0:
            print(f"For fine-tuning, unless --preset false: {', '.join(missing)}")
