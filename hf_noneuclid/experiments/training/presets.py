"""Options of our methods that suit fine-tuning, for those that the user does not give."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_noneuclid.experiments.common import option_pairs
from hf_noneuclid.experiments.training.options import ClassifyArguments
from hf_noneuclid.methods import FREE_METHOD, METHODS, all_names, canonical_name

ADAM_LEARNING_RATE = 5e-5  # the Trainer's own default, for its own optimizers


@dataclass(frozen=True)
class Preset:
    """A learning rate and options of ``--optim_args``, for a user who gives none.

    Those of Momo hold where it finds its lower bound F* itself: it then truncates most steps.
    """

    learning_rate: float
    momo_learning_rate: float
    options: Mapping[str, float] = field(default_factory=dict)
    momo_options: Mapping[str, float] = field(default_factory=dict)


# Those of language models come from the suite finetune_mini, 16 steps of 512 tokens each. A momentum of 0.95
# remembers more steps than that, and losses of such small batches lie more than half a nat from their mean.
FULL = Preset(3e-4, 1e-2, {"momentum": 0.8}, {"lower_bound_slack": 1.0})
LORA = Preset(3e-3, 1e-2, {"momentum": 0.8}, {"lower_bound_slack": 1.0})
CLASSIFIER = Preset(1e-3, 1e-3)  # the best without Momo of the suite lower_bound_finetune


def apply_preset(preset: Preset, args: ClassifyArguments) -> None:
    """Fills in the learning rate and the method's options that are not given, and prints the options."""
    if args.method not in all_names():
        args.learning_rate = ADAM_LEARNING_RATE if args.learning_rate is None else args.learning_rate
        return
    given = option_pairs(args.optim_args)
    finds_bound = _finds_bound(args.method, given)
    if args.learning_rate is None:
        args.learning_rate = preset.momo_learning_rate if finds_bound else preset.learning_rate
    options = {**preset.options, **(preset.momo_options if finds_bound else {})}
    missing = [f"{name}={value}" for name, value in options.items() if name not in given]
    if args.preset and missing:
        args.optim_args = ",".join(filter(None, [args.optim_args, *missing]))
        if args.process_index == 0:
            print(f"For fine-tuning, unless --preset false: {', '.join(missing)}")


def _finds_bound(method: str, given: Mapping[str, str]) -> bool:
    name = canonical_name(method)
    step_size = given.get("step_size") or ("rate" if name == FREE_METHOD else METHODS[name].step_size)
    return "momo" in step_size and "loss_lower_bound" not in given
