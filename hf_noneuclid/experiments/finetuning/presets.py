"""Options of our methods that suit fine-tuning, taken where the user gives none."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_noneuclid.experiments.common import option_pairs
from hf_noneuclid.experiments.finetuning.finetune_options import FinetuneArguments, FinetuneModelArguments
from hf_noneuclid.methods import FREE_METHOD, METHODS, all_names, canonical_name

ADAM_LEARNING_RATE = 5e-5  # the Trainer's own default, for its own optimizers


@dataclass(frozen=True)
class Preset:
    """What is taken where the user gives nothing.

    Attributes:
        learning_rate: peak.
        options: of --optim_args.
    """

    learning_rate: float
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Presets:
    """The presets of a task.

    Attributes:
        plain: without Momo, or with a lower bound F* that the user gives.
        momo: where Momo finds its lower bound itself, and steps are truncated far below the learning rate.
    """

    plain: Preset
    momo: Preset


# Of language models: the suite finetune_mini found them, in 16 steps of 512 tokens each. The methods' own
# momentum of 0.95 remembers more steps than that, and the losses of so small batches lie further from their
# mean than half a nat.
SHORT = {"momentum": 0.8}
SHORT_MOMO = {**SHORT, "lower_bound_slack": 1.0}
FULL = Presets(Preset(3e-4, SHORT), Preset(1e-2, SHORT_MOMO))
LORA = Presets(Preset(3e-3, SHORT), Preset(1e-2, SHORT_MOMO))
CLASSIFIER = Presets(Preset(1e-3), Preset(1e-3))  # the best without Momo of the suite lower_bound_finetune


def presets_of(task: str | None, model_args: FinetuneModelArguments) -> Presets:
    """Return the presets of a task, `causal_lm` or `classification`, and of what is trained of the model."""
    if task == "classification":
        return CLASSIFIER
    return LORA if model_args.lora_rank else FULL


def apply_presets(presets: Presets, args: FinetuneArguments) -> None:
    """Fill in the learning rate and the method's options that are not given, and print the options."""
    ours = args.optim.value in all_names()
    given = option_pairs(args.optim_args)
    preset = presets.momo if ours and _finds_bound(args.optim.value, given) else presets.plain
    if args.learning_rate is None:
        args.learning_rate = preset.learning_rate if ours else ADAM_LEARNING_RATE
    missing = [f"{name}={value}" for name, value in preset.options.items() if name not in given]
    if ours and args.preset and missing:
        args.optim_args = ",".join(filter(None, [args.optim_args, *missing]))
        if args.process_index == 0:
            print(f"For fine-tuning, unless --preset false: {', '.join(missing)}")


def _finds_bound(method: str, given: Mapping[str, str]) -> bool:
    name = canonical_name(method)
    momo = given.get("momo", "").lower() == "true" if name == FREE_METHOD else METHODS[name].momo
    return momo and "loss_lower_bound" not in given
