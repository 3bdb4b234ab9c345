"""Train a small vision transformer on the digits of scikit-learn with non-Euclidean gradient descent.

    python recipes/digits.py
    python recipes/digits.py --optim muon --learning_rate 3e-3

The 1,797 images of 8 x 8 pixels are part of the package scikit-learn.
"""

import hashlib
import sys
import time
from collections.abc import Sequence

import datasets
import numpy as np
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, default_data_collator, set_seed

from hf_noneuclid.experiments.common import require
from hf_noneuclid.experiments.training import classification
from hf_noneuclid.experiments.training.checkpoints import find_checkpoint
from hf_noneuclid.experiments.training.data import Corpus
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES, describe_call, parse
from hf_noneuclid.experiments.training.packing import Blocks
from hf_noneuclid.experiments.training.results import write_results
from hf_noneuclid.experiments.training.running import RecipeTrainer, check_optimizer, exit_codes
from hf_noneuclid.log import show_log  # the package makes its methods values of --optim

HELD_OUT, SIZE, BRIGHTEST = 5, 8, 16.0  # one image in five; pixels of a side; the value of a white pixel


@exit_codes("digits.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the recipe; ``argv`` is by default the command line of the process."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, args = parse(argv, ARGUMENT_TYPES["digits"])
    require(not args.push_to_hub, "digits.py makes no model card: leave out --push_to_hub")
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)

    # The images, the model, and whether the optimizer suits it.
    data = read_digits()
    config = ViTConfig(
        image_size=SIZE,
        num_channels=1,
        patch_size=model_args.patch_size,
        hidden_size=model_args.hidden_size,
        intermediate_size=4 * model_args.hidden_size,
        num_hidden_layers=model_args.layers,
        num_attention_heads=4,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    check_optimizer(args, model)
    show_log()

    # Training, and a last evaluation.
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=data.train.dataset,
        eval_dataset=data.validation.dataset,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=classification.keep_logits,
        compute_metrics=classification.summarise,
        facts={**describe_call("digits.py", argv), "resumed_from": checkpoint, "base_model": None},
    )
    began = time.perf_counter()
    trainer.train(checkpoint)
    final = trainer.evaluate(metric_key_prefix="final")
    trainer.save_model()
    results = {
        "seconds": round(time.perf_counter() - began, 1),
        "options": {**vars(model_args), **args.changed()},
        "accuracy": final["final_accuracy"],
        "macro_f1": final["final_macro_f1"],
    }
    if trainer.is_world_process_zero():
        write_results(trainer, data, final["final_loss"], results)
        print(f"Validation loss {final['final_loss']:.4f}, accuracy {final['final_accuracy']:.4f}")


def read_digits() -> Corpus:
    """The images to train on and held out, with their classes."""
    found = load_digits()
    images = (found.images[:, None] / BRIGHTEST).astype(np.float32)
    held_out = np.arange(len(images)) % HELD_OUT == 0
    parts = [_part(images[chosen], found.target[chosen]) for chosen in (~held_out, held_out)]
    return Corpus("digits of scikit-learn", *parts, license="BSD-3-Clause")


def _part(images: np.ndarray, labels: np.ndarray) -> Blocks:
    rows = datasets.Dataset.from_dict({"pixel_values": images, "labels": labels}).with_format("numpy")
    return Blocks(rows, sha256=hashlib.sha256(images.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
