"""The methods in the Trainer: how they are reached, the loss they see, what they log, refuse and survive."""

import copy
import functools
import inspect
import json
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from packaging.version import Version
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_noneuclid
from hf_noneuclid import METHODS, DivergedError, NonEuclideanDescent, NonEuclidTrainer, NonEuclidTrainerMixin
from hf_noneuclid.methods import all_names
from hf_noneuclid.observation import OBSERVED, find_optimizer, observe, observe_all_accelerators
from hf_noneuclid.trainer import _watched_steps

VOCABULARY, LENGTH, BATCH = 64, 12, 4
ROWS = 20  # five batches: a window of two or three is short at the end of the epoch
ONE_DIVISION = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.6"),
    reason="this Trainer divides the loss by the accumulation steps twice, and is warned of",
)
BY_NAME_AND_BY_CLASS = pytest.mark.parametrize("trainer_class", [Trainer, NonEuclidTrainer])


def gpt2():
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**shape, **dropouts, bos_token_id=0, eos_token_id=0))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=LENGTH))


def sequences(count=ROWS, seed=0):
    """Random sequences with very different numbers of label tokens.

    The first token is never one: nothing predicts it, but the Trainer counts it for some models, GPT-2 among
    them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + (7 * i) % (LENGTH - 2)] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


@pytest.fixture
def arguments(tmp_path):
    """Makes TrainingArguments for a few quick steps that read the rows in their order."""

    def make(arguments_class=TrainingArguments, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "optim": "muonmax_momo",
            "learning_rate": 1e-2,
            "max_steps": 4,
            "per_device_train_batch_size": BATCH,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return arguments_class(**{**defaults, **options})

    return make


@pytest.fixture
def unobserved(monkeypatch):
    """A process in which no Trainer has trained with Momo yet."""
    for name in OBSERVED:
        monkeypatch.setattr(Accelerator, name, inspect.unwrap(getattr(Accelerator, name)))


def parameters(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def logged(trainer, key):
    """The values of a metric in the log of training, a log that lacks it left out."""
    return [entry[key] for entry in trainer.state.log_history if "learning_rate" in entry and key in entry]


def written(args):
    return [path for path in Path(args.output_dir).rglob("*") if path.is_file()]


def optimizer_of(trainer):
    return find_optimizer(trainer.create_optimizer())


class Witness(TrainerCallback):
    """Notes model and optimizer before each step and after it."""

    def __init__(self):
        self.before, self.after, self.losses = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.before.append((parameters(model), copy.deepcopy(optimizer.state_dict()["state"])))

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.after.append((parameters(model), copy.deepcopy(optimizer.state_dict()["state"])))
        self.losses.append(find_optimizer(optimizer).diagnostics()["loss"])


def train(trainer_class, args, rows=None, model=None, **options):
    """A trainer that has trained, and what its witness saw."""
    witness = Witness()
    trainer = trainer_class(
        model=model or gpt2(), args=args, train_dataset=rows or sequences(), callbacks=[witness], **options
    )
    trainer.train()
    return trainer, witness


# ---------------------------------------------------------------- the ways in


@pytest.mark.parametrize("name", [*METHODS, "momo_muonmax", "muonadam", "muonmax-momo"])
def test_the_trainer_reaches_a_method_by_its_name(arguments, name):
    trainer, witness = train(Trainer, arguments(optim=name, max_steps=2))
    groups = find_optimizer(trainer.optimizer).param_groups
    method = METHODS[{"momo_muonmax": "muonmax_momo", "muonadam": "muon"}.get(name, name.replace("-", "_"))]
    assert {group["norm"] for group in groups} == {"spectral", method.vector_norm}
    for group in groups:
        settings = (group["descent"], group["product_norm"], group["step_size"])
        assert settings == (method.descent, method.product_norm, method.step_size)
    assert any((witness.before[0][0][name] != x).any() for name, x in witness.after[-1][0].items())


def test_the_free_method_takes_its_settings_from_optim_args(arguments):
    settings = "descent=regularized,product_norm=linf,vector_norm=ada_linf,step_size=momo"
    trainer, _ = train(Trainer, arguments(optim="noneuclid", optim_args=settings, max_steps=1))
    group = find_optimizer(trainer.optimizer).param_groups[-1]
    assert [group[key] for key in ("descent", "product_norm", "norm", "step_size")] == [
        "regularized",
        "linf",
        "ada_linf",
        "momo",
    ]


def test_all_ways_in_train_the_same_model(arguments):
    """By name, by class, mixed into another Trainer, and with an optimizer made beforehand."""

    class Mixed(NonEuclidTrainerMixin, Seq2SeqTrainer):
        pass

    default = TrainingArguments.__dataclass_fields__["optim"].default
    by_name, _ = train(Trainer, arguments(optim="muonmax_momo"))
    by_class, _ = train(NonEuclidTrainer, arguments(optim=default))
    mixed, _ = train(Mixed, arguments(Seq2SeqTrainingArguments, optim=default))
    model = gpt2()
    # What a Trainer does not decay is the only thing that an optimizer made without one cannot know.
    optimizer = hf_noneuclid.create_optimizer(model, lr=1e-2)
    given, _ = train(Trainer, arguments(optim=default), model=model, optimizers=(optimizer, None))

    assert find_optimizer(given.optimizer) is optimizer
    for other in (by_class, mixed, given):
        assert_same(parameters(other.model), parameters(by_name.model))
        assert logged(other, "step_size") == logged(by_name, "step_size")


def test_a_class_names_its_method_and_options(arguments):
    class Mine(NonEuclidTrainer):
        method = "scion"
        method_options = {"momentum": 0.8, "polar_steps": 3}  # noqa: RUF012

    default = TrainingArguments.__dataclass_fields__["optim"].default
    group = optimizer_of(Mine(gpt2(), arguments(optim=default, optim_args="momentum=0.7"))).param_groups[0]
    assert (group["descent"], group["momentum"], group["polar_steps"]) == ("constrained", 0.7, 3)


def test_optim_wins_over_the_method_of_the_class(arguments):
    optimizer = optimizer_of(NonEuclidTrainer(gpt2(), arguments(optim="scion")))
    assert optimizer.param_groups[0]["step_size"] == "rate"


def test_a_class_that_is_called_with_groups_of_its_own_routes_them(arguments):
    """As many Trainers do it: they ask for a class, and pass it what decays and what does not."""
    model, args = gpt2(), arguments(weight_decay=0.5)
    optimizer_class, values = Trainer.get_optimizer_cls_and_kwargs(args, model)
    assert optimizer_class is NonEuclideanDescent
    embeddings = list(model.transformer.wte.parameters())
    rest = [p for p in model.parameters() if p is not embeddings[0]]
    rest[0].requires_grad_(False)
    optimizer = optimizer_class(
        [{"params": embeddings, "weight_decay": 0.1}, {"params": rest[:-4]}], **values
    )
    decay = {
        name: (group["norm"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    expected = hf_noneuclid.create_optimizer(model, lr=1.0)
    norms = {name: group["norm"] for group in expected.param_groups for name in group["param_names"]}
    stepped = {id(p): name for name, p in model.named_parameters()}
    kept = [stepped[id(p)] for p in rest[1:-4]]
    assert decay == {"transformer.wte.weight": ("ada_l2", 0.1)} | {name: (norms[name], 0.5) for name in kept}
    assert {"spectral", "ada_l2"} == set(norms.values())


def test_groups_that_cannot_be_routed_are_refused(arguments):
    model, args = gpt2(), arguments()
    optimizer_class, values = Trainer.get_optimizer_cls_and_kwargs(args, model)
    with pytest.raises(ValueError, match=r"learning rate of its own, 0\.5; here is one for all, 0\.01"):
        optimizer_class([{"params": model.parameters(), "lr": 0.5}], **values)
    with pytest.raises(ValueError, match="1 of the parameters to train are not in GPT2LMHeadModel"):
        optimizer_class([*model.parameters(), nn.Parameter(torch.ones(2, 2))], **values)
    for group, message in [({"momentum": 0.5}, "a group of parameters has momentum"), ({}, "in two groups")]:
        with pytest.raises(ValueError, match=message):
            optimizer_class([{"params": p, **group} for p in [model.lm_head.weight] * 2], **values)


def test_a_trainer_that_asks_without_the_model_gets_its_own(arguments):
    class AsksWithoutTheModel(Trainer):
        def create_optimizer(self, model=None):
            optimizer_class, values = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class(self.model.parameters(), **values)
            return self.optimizer

    trainer = AsksWithoutTheModel(gpt2(), arguments(max_steps=3), train_dataset=sequences())
    trainer.train()
    optimizer = find_optimizer(trainer.optimizer)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(trainer.model.parameters())
    assert optimizer.diagnostics()["steps"] == 3
    with pytest.raises(ValueError, match=r"pass optimizers=\(hf_noneuclid.create_optimizer"):
        Trainer.get_optimizer_cls_and_kwargs(arguments())


def test_registering_again_changes_nothing():
    from transformers import trainer as hf_trainer
    from transformers.training_args import OptimizerNames

    before = list(OptimizerNames), list(hf_trainer.DEFAULT_CALLBACKS)
    hf_noneuclid.register()
    assert (list(OptimizerNames), list(hf_trainer.DEFAULT_CALLBACKS)) == before
    assert set(all_names()) <= {member.value for member in OptimizerNames}


# ---------------------------------------------------------------- nothing global


@pytest.mark.usefixtures("unobserved")
def test_the_mixin_leaves_the_accelerator_class_alone(arguments):
    backward = Accelerator.backward
    train(NonEuclidTrainer, arguments())
    assert Accelerator.backward is backward


@pytest.mark.usefixtures("unobserved")
def test_a_trainer_with_another_optimizer_leaves_the_accelerator_class_alone(arguments):
    backward = Accelerator.backward
    Trainer(gpt2(), arguments(optim="adamw_torch"), train_dataset=sequences()).train()
    assert Accelerator.backward is backward


class Preferences(Trainer):
    """Its loss is negative or 0, as that of groups of answers may be."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        log_probabilities = model(inputs["input_ids"]).logits.log_softmax(-1)
        advantages = torch.linspace(-1, 1, len(log_probabilities))
        loss = (advantages * log_probabilities[:, -1, 0]).sum() * (self.state.global_step % 4 > 0) - 7.0
        return (loss, {}) if return_outputs else loss


class MixedPreferences(NonEuclidTrainerMixin, Preferences):
    pass


@pytest.mark.usefixtures("unobserved")
@pytest.mark.parametrize("trainer_class", [Trainer, NonEuclidTrainer, Preferences, MixedPreferences])
@pytest.mark.parametrize("step_size", ["rate", "slope"])
def test_without_momo_no_loss_is_needed_and_nothing_is_patched(arguments, trainer_class, step_size):
    plain = {name: getattr(Accelerator, name) for name in OBSERVED}
    args = arguments(optim="muon", optim_args=f"step_size={step_size}", max_steps=8)
    trainer, witness = train(trainer_class, args)
    assert {name: getattr(Accelerator, name) for name in OBSERVED} == plain
    assert not OBSERVED.keys() & vars(trainer.accelerator).keys()
    assert witness.losses == [None] * 8
    # Every fourth gradient of Preferences is 0: the slope does not step then, and nothing does at first.
    moved = [size > 0 for size in logged(trainer, "step_size")]
    assert all(moved[1:4] + moved[5:])
    assert moved[4] == (step_size == "rate" or not issubclass(trainer_class, Preferences))
    assert any((witness.before[0][0][name] != x).any() for name, x in witness.after[-1][0].items())


@pytest.mark.parametrize("trainer_class", [Preferences, MixedPreferences])
def test_momo_warns_of_a_negative_loss_below_its_bound(arguments, trainer_class, caplog):
    args = arguments(optim="muon", optim_args="step_size=momo,loss_lower_bound=0.0")
    with pytest.warns(UserWarning, match="loss_lower_bound is 0, above the first loss, -7"):
        train(trainer_class, args)
    assert "the loss, -7, is below loss_lower_bound=0.0" in caplog.text


def test_a_loss_is_counted_once_where_both_ways_meet(arguments):
    accumulate = {"gradient_accumulation_steps": 2, "max_steps": 2}
    earlier = NonEuclidTrainer(
        gpt2(), arguments(**accumulate), train_dataset=sequences(), callbacks=[first := Witness()]
    )
    _, by_name = train(Trainer, arguments(**accumulate))
    earlier.train()
    _, later = train(NonEuclidTrainer, arguments(**accumulate))
    assert first.losses == by_name.losses == later.losses


# ---------------------------------------------------------------- the loss


def windows(rows, accumulation, steps):
    """The micro-batches of each step, epoch after epoch."""
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    epoch = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    return [epoch[step % len(epoch)] for step in range(steps)]


def forward(weights, rows):
    """Logits that predict a token, and labels, of a fresh model with these weights."""
    model = gpt2()
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in rows])).logits
    return logits[:, :-1].double(), torch.stack([row["labels"] for row in rows])[:, 1:]


def mean_over_tokens(weights, window, label_smoothing=0.0):
    """Mean cross-entropy over the label tokens of a whole window."""
    logits, labels = forward(weights, [row for batch in window for row in batch])
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing).item()


def token_mean(outputs, labels, num_items_in_batch, label_smoothing=0.0):
    """A loss for the Trainer, as compute_loss_func."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return (
        cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing) / num_items_in_batch
    )


def assert_observed(witness, rows, accumulation, objective):
    expected = [
        objective(weights, window)
        for (weights, _), window in zip(
            witness.before, windows(rows, accumulation, len(witness.before)), strict=True
        )
    ]
    assert witness.losses == pytest.approx(expected, rel=1e-6)


CASES = {
    "plain": {},
    "accumulation with a short last window": {"gradient_accumulation_steps": 3},
    "accumulation over a whole epoch": {"gradient_accumulation_steps": 5},
    "tokens not averaged across devices": {
        "average_tokens_across_devices": False,
        "gradient_accumulation_steps": 2,
    },
    "evaluation in between": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "gradient_accumulation_steps": 2,
    },
    "no clipping": {"max_grad_norm": 0.0},
}


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(case, id=name, marks=[ONE_DIVISION] if "gradient_accumulation_steps" in case else [])
        for name, case in CASES.items()
    ],
)
def test_the_observed_loss_is_the_objective(arguments, trainer_class, options):
    args = arguments(**options)
    _, witness = train(trainer_class, args, eval_dataset=sequences(12, seed=1))
    assert_observed(witness, sequences(), args.gradient_accumulation_steps, mean_over_tokens)


@ONE_DIVISION
def test_the_observed_loss_is_the_smoothed_objective_under_label_smoothing(arguments):
    _, witness = train(Trainer, arguments(label_smoothing_factor=0.2, gradient_accumulation_steps=3))
    assert_observed(witness, sequences(), 3, lambda weights, window: mean_over_tokens(weights, window, 0.2))


@ONE_DIVISION
@pytest.mark.parametrize("scaled", [False, True])
def test_the_observed_loss_is_that_of_an_overridden_compute_loss(arguments, scaled):
    """Averaged over the micro-batches unless the class says that it has done so itself."""

    class SmallLogits(Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs["input_ids"])
            loss = 10 * outputs.logits[:, :-1].square().mean()
            return (loss, outputs) if return_outputs else loss

    def objective(weights, window):
        losses = [10 * forward(weights, batch)[0].square().mean().item() for batch in window]
        return sum(losses) / (1 if scaled else len(losses))

    _, witness = train(SmallLogits, arguments(gradient_accumulation_steps=3))
    assert_observed(witness, sequences(), 3, objective)


@ONE_DIVISION
def test_the_observed_loss_is_that_of_a_compute_loss_func(arguments):
    loss_func = functools.partial(token_mean, label_smoothing=0.5)
    _, witness = train(Trainer, arguments(gradient_accumulation_steps=3), compute_loss_func=loss_func)
    assert_observed(witness, sequences(), 3, lambda weights, window: mean_over_tokens(weights, window, 0.5))


@ONE_DIVISION
@pytest.mark.parametrize("method", ["muonmax_momo", "muon_momo"])
@pytest.mark.parametrize(
    ("model", "loss", "steps", "tolerance"),
    [
        (lambda: gpt2().double(), lambda: {"compute_loss_func": token_mean}, 4, 1e-9),
        # Not GPT-2: the gradient of its key biases is zero but for rounding, which adaptive norms scale up.
        (lambda: llama(), dict, 2, 1e-4),
    ],
    ids=["float64", "float32"],
)
def test_accumulating_four_batches_of_four_is_one_batch_of_sixteen(
    arguments, method, model, loss, steps, tolerance
):
    rows = sequences(32)
    common = {"optim": method, "learning_rate": 0.3, "max_steps": steps}
    small, _ = train(Trainer, arguments(**common, gradient_accumulation_steps=4), rows, model(), **loss())
    large, _ = train(Trainer, arguments(**common, per_device_train_batch_size=16), rows, model(), **loss())
    assert min(logged(large, "step_size")) < 0.1  # truncated, so the loss enters the parameters
    assert logged(small, "step_size") == pytest.approx(logged(large, "step_size"), rel=tolerance)
    torch.testing.assert_close(
        parameters(small.model), parameters(large.model), rtol=tolerance, atol=tolerance
    )


def accelerated(accumulation):
    """A model, an optimizer, an accelerator and batches, as a hand-written loop has them."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = gpt2()
    optimizer = hf_noneuclid.create_optimizer(model, lr=1e-2)
    model, prepared, loader = accelerator.prepare(
        model, optimizer, DataLoader(sequences(), batch_size=BATCH, shuffle=False)
    )
    return accelerator, model, optimizer, prepared, loader


def mean_of_batches(weights, window):
    """What a hand-written loop minimises: the losses of the micro-batches, each over the window's length."""
    return sum(mean_over_tokens(weights, [batch]) for batch in window) / 2


@pytest.mark.usefixtures("unobserved")
@pytest.mark.parametrize("alone", [False, True])
def test_a_hand_written_accelerate_loop_observes_its_loss(alone):
    accelerator, model, optimizer, prepared, loader = accelerated(accumulation=2)
    for _ in range(2):  # again changes nothing
        observe(accelerator) if alone else observe_all_accelerators()
    witness = Witness()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                witness.before.append((parameters(model), None))
            prepared.step()
            prepared.zero_grad()
            if accelerator.sync_gradients:
                witness.losses.append(optimizer.diagnostics()["loss"])
    assert len(witness.losses) == 3
    assert_observed(witness, sequences(), 2, mean_of_batches)


@pytest.mark.usefixtures("unobserved")
def test_the_loss_of_a_step_that_was_skipped_is_not_added_to_the_next():
    accelerator, model, optimizer, prepared, loader = accelerated(accumulation=1)
    observe_all_accelerators()
    skipped, taken, *_ = loader
    accelerator.backward(100 * model(**skipped).loss)
    prepared.zero_grad()  # as a loss scaler does that found an overflow
    weights = parameters(model)
    accelerator.backward(model(**taken).loss)
    prepared.step()
    assert optimizer.diagnostics()["loss"] == pytest.approx(
        mean_over_tokens(weights, [sequences()[BATCH : 2 * BATCH]]), rel=1e-6
    )


@pytest.mark.usefixtures("unobserved")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_backward_between_two_steps_counts(accumulation):
    accelerator, model, optimizer, prepared, loader = accelerated(accumulation)
    observe(accelerator)
    expected = 0.0
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(0.75 * loss, retain_graph=True)
            accelerator.backward(0.25 * loss)
            expected += loss.item() / accumulation
            prepared.step()
            prepared.zero_grad()
            if accelerator.sync_gradients:
                assert optimizer.diagnostics()["loss"] == pytest.approx(expected, rel=1e-6)
                expected = 0.0


class TwoBackwards(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        first = super().training_step(model, inputs, num_items_in_batch)
        second = 0.125 * model.transformer.wte.weight.square().sum()
        self.accelerator.backward(second)
        self.seen = getattr(self, "seen", 0.0) + first.item() + second.item()
        return first + second.detach()


class MixedTwoBackwards(NonEuclidTrainerMixin, TwoBackwards):
    pass


@pytest.mark.parametrize("trainer_class", [TwoBackwards, MixedTwoBackwards])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_second_backward_in_a_training_step_counts(arguments, trainer_class, accumulation):
    args = arguments(max_steps=1, gradient_accumulation_steps=accumulation)
    trainer = trainer_class(gpt2(), args, train_dataset=sequences())
    trainer.train()
    assert optimizer_of(trainer).diagnostics()["loss"] == pytest.approx(trainer.seen, rel=1e-5)


@pytest.mark.usefixtures("unobserved")
def test_two_optimizers_on_one_accelerator_see_their_own_losses():
    """A generator and its critic, each with its own loss, which reaches the other's parameters as well."""
    accelerator = Accelerator(cpu=True)
    generator, critic = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    ours = [hf_noneuclid.create_optimizer(net, lr=1e-2) for net in (generator, critic)]
    generator, critic, of_generator, of_critic = accelerator.prepare(generator, critic, *ours)
    observe(accelerator)
    noise = torch.randn(8, 4)
    for _ in range(3):
        of_critic.zero_grad()
        loss = 2 + critic(generator(noise).detach()).square().mean()
        accelerator.backward(loss)
        of_critic.step()
        assert ours[1].diagnostics()["loss"] == loss.item()
        of_generator.zero_grad()
        loss = 3 - critic(generator(noise)).mean()  # it leaves gradients in the critic
        accelerator.backward(loss)
        of_generator.step()
        assert ours[0].diagnostics()["loss"] == loss.item()


def test_observed_losses_count_instead_of_what_a_closure_returns():
    """As Lightning does it: the closure of a step is only the last of its micro-batches."""
    model = nn.Linear(3, 2)
    optimizer = hf_noneuclid.create_optimizer(model, lr=1e-2)
    for step in range(2):
        optimizer.observe_loss(4.0 + step)

        def closure():
            optimizer.observe_loss(2.0)
            return torch.tensor(2.0)

        optimizer.step(closure)
        assert optimizer.diagnostics()["loss"] == 6.0 + step


def test_observed_losses_add_up_until_a_window_begins():
    model = nn.Linear(3, 2)
    optimizer = hf_noneuclid.create_optimizer(model, lr=1e-2)
    for loss, begin in [(7.0, True), (5.0, False), (2.0, True), (1.0, False)]:
        optimizer.observe_loss(loss, begin=begin)
    optimizer.step()
    assert optimizer.diagnostics()["loss"] == 3.0
    with pytest.raises(RuntimeError, match="none was observed"):
        optimizer.step()


@pytest.mark.usefixtures("unobserved")
def test_momo_without_an_observed_loss_says_what_to_do():
    accelerator, model, _, prepared, loader = accelerated(accumulation=1)
    before = parameters(model)
    accelerator.backward(model(**next(iter(loader))).loss)
    with pytest.raises(RuntimeError, match=r"observe_loss\(loss\) before step\(\)"):
        prepared.step()
    assert_same(parameters(model), before)


# ---------------------------------------------------------------- clipping

MOMO_ALONE = "step_size=momo,loss_lower_bound=0.0"


def scaled(factor):
    """The mean over tokens times a factor, as compute_loss_func."""
    return {"compute_loss_func": lambda *args, **kwargs: factor * token_mean(*args, **kwargs)}


@ONE_DIVISION
@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_a_thousand_times_as_large_is_clipped_to_the_same_steps(
    arguments, trainer_class, accumulation
):
    """Without the factor, the steps of the larger loss would be a thousand times as long."""
    args = arguments(
        optim="muon",
        optim_args=f"{MOMO_ALONE},polar_method=svd",
        learning_rate=100.0,
        max_grad_norm=1.0,
        gradient_accumulation_steps=accumulation,
    )
    # Not GPT-2, as above.
    small, _ = train(trainer_class, args, model=llama(), **scaled(10))
    large, _ = train(trainer_class, args, model=llama(), **scaled(10_000))
    assert min(logged(small, "grad_norm")) > 1  # all are clipped
    assert logged(large, "truncation_rate") == logged(small, "truncation_rate") == [1.0] * 4
    assert logged(large, "step_size") == pytest.approx(logged(small, "step_size"), rel=1e-4)
    torch.testing.assert_close(parameters(large.model), parameters(small.model), rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self):
        return 100 * self.second(self.first(torch.arange(4.0) + 1)).square().sum()


@pytest.fixture
def pairs():
    """Two models with their optimizers, on one accelerator that observes loss and clipping."""
    accelerator = Accelerator(cpu=True)
    observe_all_accelerators()
    made = []
    for seed in range(2):
        net = Net(seed)
        method = {"step_size": "momo", "loss_lower_bound": 0.0}
        optimizer = hf_noneuclid.create_optimizer(net, "muon", lr=1.0, **method)
        made.append((*accelerator.prepare(net, optimizer), optimizer))
    return accelerator, made


def noted(optimizer):
    """By how much the first gradients were clipped, as the optimizer has been told."""
    optimizer.step()
    (weight,) = {float(its["running_weight"]) for its in optimizer.state.values() if "running_weight" in its}
    return weight


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.usefixtures("unobserved")
@pytest.mark.parametrize("norm_type", [2, 1, float("inf")])
def test_clipping_is_known_for_any_norm_to_the_optimizer_whose_gradients_are_clipped(pairs, norm_type):
    accelerator, ((net, _, optimizer), (other, _, untouched)) = pairs
    accelerator.backward(net() + other())
    before = gradients(net)
    accelerator.clip_grad_norm_(net.parameters(), max_norm=0.5, norm_type=norm_type)  # a generator
    factor = (gradients(net).norm() / before.norm()).item()
    assert 0 < factor < 0.1
    assert noted(optimizer) == pytest.approx(factor, rel=1e-5)
    assert noted(untouched) == 1.0


@pytest.mark.usefixtures("unobserved")
def test_what_is_clipped_twice_is_scaled_by_both_factors(pairs):
    accelerator, ((net, _, optimizer), _) = pairs
    accelerator.backward(net())
    before = gradients(net)
    for norm in (10.0, float("inf"), 0.5):
        accelerator.clip_grad_norm_(net.parameters(), norm)
    assert noted(optimizer) == pytest.approx((gradients(net).norm() / before.norm()).item(), rel=1e-5)


@pytest.mark.usefixtures("unobserved")
def test_the_clipping_of_a_step_that_was_skipped_is_forgotten(pairs):
    accelerator, ((net, prepared, optimizer), _) = pairs
    accelerator.backward(net())
    accelerator.clip_grad_norm_(net.parameters(), 0.5)
    prepared.zero_grad()  # as a loss scaler does that found an overflow
    accelerator.backward(net())
    assert noted(optimizer) == 1.0


@pytest.mark.usefixtures("unobserved")
@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (lambda a, net: a.clip_grad_value_(net.parameters(), 0.1), "clip_grad_value_ .*use clip_grad_norm_"),
        (lambda a, net: a.clip_grad_norm_(net.first.parameters(), 0.1), "only a part .*all of them at once"),
    ],
    ids=["values", "a part"],
)
def test_clipping_by_an_unknown_factor_is_warned_of_once(pairs, caplog, clip, message):
    accelerator, ((net, prepared, _), _) = pairs
    for _ in range(3):
        accelerator.backward(net())
        clip(accelerator, net)
        prepared.step()
        prepared.zero_grad()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert re.search(message, warning)


class ClipsElsewhere(Trainer):
    def _clip_grad_norm(self, model):
        return nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)


@pytest.mark.parametrize(
    ("trainer_class", "options", "warnings"),
    [
        (ClipsElsewhere, {"optim_args": MOMO_ALONE}, 1),
        (ClipsElsewhere, {"optim_args": MOMO_ALONE, "max_grad_norm": 0.0}, 0),
        (ClipsElsewhere, {"optim_args": "step_size=slope"}, 0),
        (Trainer, {"optim_args": MOMO_ALONE}, 0),
        (NonEuclidTrainer, {"optim_args": MOMO_ALONE}, 0),
    ],
)
def test_a_trainer_that_clips_where_nobody_sees_it_is_warned_of(
    arguments, caplog, trainer_class, options, warnings
):
    train(trainer_class, arguments(optim="muon", **options))
    assert caplog.text.count("does not clip gradients by Accelerator.clip_grad_norm_") == warnings


# ---------------------------------------------------------------- the learning rate as a bound


@dataclass
class OfAnotherLibrary(TrainingArguments):
    learning_rate: float = 1e-6


@dataclass
class ForTheseMethods(TrainingArguments):
    optim: str = "muon"
    learning_rate: float = 0.02


def with_default_rate(arguments, arguments_class=TrainingArguments, **options):
    default = arguments_class.__dataclass_fields__["learning_rate"].default
    return arguments(arguments_class, **{"learning_rate": default, **options})


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize("optim_args", ["step_size=slope", MOMO_ALONE])
@pytest.mark.parametrize(
    ("arguments_class", "default", "instead"),
    [(TrainingArguments, "5e-05", "5.0005e-05"), (OfAnotherLibrary, "1e-06", "1.0001e-06")],
)
def test_a_default_that_nobody_chose_does_not_bound_the_steps(
    arguments, caplog, trainer_class, optim_args, arguments_class, default, instead
):
    args = with_default_rate(arguments, arguments_class, optim="muon", optim_args=optim_args)
    trainer, _ = train(trainer_class, args)
    trainer.save_model()
    saved = torch.load(f"{args.output_dir}/training_args.bin", weights_only=False)
    assert trainer.args.learning_rate == saved.learning_rate == 1.0
    assert trainer.lr_scheduler.base_lrs == [1.0] * len(find_optimizer(trainer.optimizer).param_groups)
    assert logged(trainer, "learning_rate") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert logged(trainer, "step_size")[0] > 0
    (warning,) = [record for record in caplog.records if "learning_rate was left" in record.getMessage()]
    assert warning.levelname == "WARNING"
    for words in (f"at its default, {default}", "1.0 is used", f"such as {instead}"):
        assert words in warning.getMessage()


@pytest.mark.parametrize(
    ("arguments_class", "options", "rate"),
    [
        (TrainingArguments, {"optim": "muon"}, 5e-5),
        (TrainingArguments, {"optim": "adamw_torch"}, 5e-5),
        (
            TrainingArguments,
            {"optim": "muon", "optim_args": "step_size=slope", "learning_rate": 5.0005e-5},
            5.0005e-5,
        ),
        (ForTheseMethods, {"optim": "muon_momo", "optim_args": "step_size=slope"}, 0.02),
    ],
    ids=["plain", "foreign", "chosen", "chosen by the class"],
)
def test_any_other_learning_rate_is_left_alone(arguments, caplog, arguments_class, options, rate):
    args = with_default_rate(arguments, arguments_class, **options)
    trainer = Trainer(gpt2(), args, train_dataset=sequences())
    trainer.train()
    assert trainer.args.learning_rate == logged(trainer, "learning_rate")[0] == rate
    assert "learning_rate was left" not in caplog.text


LIMITS = "the learning rate bounded each of the last 10 steps"


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize(
    ("options", "warnings", "at_the_end"),
    [
        ({"optim_args": "step_size=slope", "learning_rate": 1e-5}, 1, r"\d+ of 40 steps were limited by"),
        ({"optim_args": MOMO_ALONE, "learning_rate": 1e-5}, 1, "40 of 40 steps were limited by"),
        ({"optim_args": MOMO_ALONE, "learning_rate": 100.0}, 0, "no step was limited by"),
        ({"optim_args": "step_size=slope", "learning_rate": 1.0}, 0, "no step was limited by"),
        ({"learning_rate": 1e-5}, 0, None),
    ],
    ids=["slope, low", "momo, low", "momo, high", "slope, high", "rate"],
)
def test_a_run_that_the_learning_rate_limits_says_so(
    arguments, caplog, trainer_class, options, warnings, at_the_end
):
    caplog.set_level("INFO", "hf_noneuclid")
    args = arguments(optim="muon", max_steps=40, lr_scheduler_type="constant", logging_steps=4, **options)
    trainer, _ = train(trainer_class, args)
    assert caplog.text.count(LIMITS) == warnings
    told = [record.getMessage() for record in caplog.records if " limited by the " in record.getMessage()]
    assert len(told) == (at_the_end is not None)
    assert all(re.match(at_the_end, line) for line in told)
    rates = logged(trainer, "limited_rate")
    assert rates[-1:] == ([float(warnings)] if at_the_end else [])


@pytest.mark.parametrize(
    ("done", "steps", "warmup", "expected"),
    [
        (0, 1000, 0, [50, 100, 150, 200, 250]),
        (0, 1000, 100, [100, 150, 200, 250, 300]),
        (500, 1000, 100, [525, 550, 575, 600, 625]),
        (0, 30, 0, [10, 20, 30, 40, 50]),
    ],
)
def test_the_watch_for_a_limit_begins_after_the_growth_and_the_warm_up(
    arguments, done, steps, warmup, expected
):
    assert list(_watched_steps(done, steps, arguments(warmup_steps=warmup))) == expected


# ---------------------------------------------------------------- options


@BY_NAME_AND_BY_CLASS
def test_exactly_the_decay_parameters_of_the_trainer_decay(arguments, trainer_class):
    at_rate = {"weight_decay": 0.5, "learning_rate": 0.1, "optim_args": "decay_at=rate"}
    trainer = trainer_class(gpt2(), arguments(**at_rate))
    optimizer = optimizer_of(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(loss=0.0)  # no gradient: nothing but decay can move a parameter
    decayed = {
        name for name, p in trainer.model.named_parameters() if torch.equal(p, torch.full_like(p, 0.95))
    }
    kept = {name for name, p in trainer.model.named_parameters() if torch.equal(p, torch.ones_like(p))}
    names = {name for name, _ in trainer.model.named_parameters()}
    assert decayed == names & set(trainer.get_decay_parameter_names(trainer.model))
    assert kept == names - decayed
    assert decayed
    assert kept


@BY_NAME_AND_BY_CLASS
def test_optim_args_reach_the_optimizer_with_their_types(arguments, trainer_class):
    text = "momentum=0.9, beta2=0.8, eps=1e-6, polar_steps=3, nuclear_norm=stale, loss_lower_bound=1.5"
    trainer = trainer_class(gpt2(), arguments(optim_args=f"{text}, matrix_lr_scale=4"))
    expected = {
        "momentum": 0.9,
        "beta2": 0.8,
        "eps": 1e-6,
        "polar_steps": 3,
        "nuclear_norm": "stale",
        "loss_lower_bound": 1.5,
        "lr": 1e-2,
    }
    for group in optimizer_of(trainer).param_groups:
        assert {key: group[key] for key in expected} == expected
        assert group["lr_scale"] == (4.0 if group["norm"] == "spectral" else 1.0)


def test_the_adam_arguments_do_not_reach_the_optimizer(arguments):
    args = arguments(adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=0.1)
    group = optimizer_of(Trainer(gpt2(), args)).param_groups[0]
    assert [group[key] for key in ("momentum", "beta2", "eps")] == [0.95, 0.95, 1e-8]


@BY_NAME_AND_BY_CLASS
def test_optim_target_modules_chooses_the_matrices(arguments, trainer_class):
    args = arguments(optim_target_modules=["c_fc", "wpe"])
    groups = optimizer_of(trainer_class(gpt2(), args)).param_groups
    matrices = {name for group in groups if group["norm"] == "spectral" for name in group["param_names"]}
    assert matrices == {
        "transformer.wpe.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_fc.weight",
    }


def test_the_constant_linear_schedule_of_the_paper_has_a_name(arguments):
    schedule = {"num_decay_steps": 6, "min_lr_ratio": 0.1, "decay_type": "linear"}
    args = arguments(max_steps=10, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=schedule)
    trainer, _ = train(Trainer, args)
    ratios = [1, 1, 1, 1, *(1 - 0.9 * k / 6 for k in range(6))]
    assert logged(trainer, "learning_rate") == pytest.approx([1e-2 * ratio for ratio in ratios])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3)


# ---------------------------------------------------------------- the log

OF_MOMO, OF_SLOPE = ("truncation_rate", "loss_lower_bound"), ("vector_step_size", "limited_rate")


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize(
    ("step_size", "present", "absent"),
    [
        ("momo", (*OF_MOMO, "limited_rate"), ("vector_step_size",)),
        ("momo+slope", (*OF_MOMO, *OF_SLOPE), ()),
        ("slope", OF_SLOPE, OF_MOMO),
        ("rate", (), (*OF_MOMO, *OF_SLOPE)),
    ],
)
def test_each_log_of_training_says_what_the_steps_were(arguments, trainer_class, step_size, present, absent):
    trainer, _ = train(trainer_class, arguments(optim="muonmax", optim_args=f"step_size={step_size}"))
    present, absent = (*present, "step_size", "dual_norm"), (*absent, "bad_steps", "zero_steps")
    for key in present:
        assert len(logged(trainer, key)) == 4
    for key in absent:
        assert logged(trainer, key) == []
    assert all(dual > 0 for dual in logged(trainer, "dual_norm"))


def test_the_log_of_another_optimizer_is_left_alone(arguments):
    trainer = Trainer(gpt2(), arguments(optim="adamw_torch"), train_dataset=sequences())
    trainer.train()
    ours = {"step_size", "dual_norm", "truncation_rate", "loss_lower_bound", "nuclear_norm_max", "bad_steps"}
    assert not any(ours & set(entry) for entry in trainer.state.log_history)


def test_other_callbacks_see_the_step_size_in_the_log(arguments):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(logs.get("step_size"))

    trainer = Trainer(gpt2(), arguments(), train_dataset=sequences(), callbacks=[Reporter()])
    trainer.train()
    assert seen[:4] == logged(trainer, "step_size")


@BY_NAME_AND_BY_CLASS
def test_a_huge_learning_rate_is_truncated_and_the_log_shows_it(arguments, trainer_class):
    trainer, _ = train(
        trainer_class, arguments(optim_args=MOMO_ALONE, learning_rate=100.0, max_steps=6, logging_steps=3)
    )
    assert logged(trainer, "truncation_rate") == [1.0, 1.0]
    pairs = zip(logged(trainer, "step_size"), logged(trainer, "learning_rate"), strict=True)
    assert all(0 <= step_size < learning_rate for step_size, learning_rate in pairs)


def test_a_step_size_that_is_not_truncated_is_the_learning_rate(arguments):
    trainer, _ = train(Trainer, arguments(optim_args=MOMO_ALONE, learning_rate=1e-4))
    assert logged(trainer, "step_size") == pytest.approx(logged(trainer, "learning_rate"), rel=1e-6)
    assert logged(trainer, "truncation_rate") == [0.0] * 4


# ---------------------------------------------------------------- bad input


class Bigrams(nn.Module):
    """A language model that has an embedding and no matrix."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids, labels=None):
        logits = self.table(input_ids)[:, :-1]
        return {"loss": cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


BAD_OPTIONS = {
    "an unknown option": ({"optim_args": "nuclear=stale"}, r"unknown option 'nuclear'.*nuclear_norm"),
    "an option of momo without momo": (
        {"optim": "muonmax", "optim_args": "loss_lower_bound=1"},
        r"method muonmax: unknown option 'loss_lower_bound'.*momentum",
    ),
    "an option of the free method": (
        {"optim": "muon", "optim_args": "descent=regularized"},
        r"method muon: unknown option 'descent'",
    ),
    "a value out of range": ({"optim_args": "momentum=1.5"}, r"momentum must be .* not 1\.5"),
    "no such choice": ({"optim_args": "nuclear_norm=old"}, r"one of exact, stale, frobenius, not 'old'"),
    "not a number": ({"optim_args": "momentum=high"}, r"momentum must be a number in \[0, 1\), not 'high'"),
    "not an integer": ({"optim_args": "polar_steps=2.5"}, r"polar_steps must be an integer >= 1, not '2\.5'"),
    "a negative learning rate": ({"learning_rate": -1.0}, r"lr must be .* not -1\.0"),
    "negative weight decay": ({"weight_decay": -0.1}, r"weight_decay must be .* not -0\.1"),
    "a free method with settings missing": (
        {"optim": "noneuclid", "optim_args": "product_norm=l2"},
        r"missing descent, vector_norm .*constrained, regularized",
    ),
    "a target that matches nothing": ({"optim_target_modules": ["no_such"]}, r"'no_such' matches no module"),
}


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused_before_training(arguments, trainer_class, options, message):
    args = arguments(**options)
    trainer = trainer_class(gpt2(), args, train_dataset=sequences())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert written(args) == []


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize("text", ["momentum", "momentum=0.9,", "a=b=c", {"momentum": 0.9}])
def test_optim_args_that_are_no_pairs_are_refused_at_once(arguments, trainer_class, text):
    with pytest.raises(ValueError, match=r"optim_args must be text.*'momentum=0.9,nuclear_norm=stale', not"):
        trainer_class(gpt2(), arguments(optim_args=text))


def test_a_misspelt_optimizer_is_refused_with_the_nearest_names(arguments):
    with pytest.raises(
        ValueError, match=r"'muonmax-mom' is not an optimizer.*Did you mean muonmax_momo"
    ) as error:
        arguments(optim="muonmax-mom")
    assert "muonmax-momo" not in str(error.value)
    with pytest.raises(ValueError, match="Did you mean adamw_torch"):
        arguments(optim="adamw_torchh")


def test_sparse_gradients_are_refused_before_training(arguments):
    model = gpt2()
    model.transformer.wpe.sparse = True
    with pytest.raises(
        RuntimeError, match=r"transformer.wpe: sparse gradients have no norm here.*sparse=False"
    ):
        Trainer(model, arguments(), train_dataset=sequences()).train()


def test_the_parameters_are_not_taken_for_the_model():
    with pytest.raises(TypeError, match="needs the model, not generator"):
        hf_noneuclid.create_optimizer(gpt2().parameters(), lr=1.0)


@BY_NAME_AND_BY_CLASS
def test_a_resumed_run_says_that_it_keeps_its_learning_rate(arguments, trainer_class, caplog):
    args = arguments(max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.25)
    train(trainer_class, args)
    checkpoint = f"{args.output_dir}/checkpoint-2"
    for rate, is_said in [(0.25, False), (0.5, True)]:
        caplog.clear()
        again = arguments(max_steps=4, learning_rate=rate, output_dir=args.output_dir)
        trainer = trainer_class(gpt2(), again, train_dataset=sequences())
        trainer.train(resume_from_checkpoint=checkpoint)
        message = "learning_rate=0.25 is taken from the checkpoint of step 2, not 0.5"
        assert (message in caplog.text) is is_said
        assert find_optimizer(trainer.optimizer).param_groups[0]["initial_lr"] == 0.25


@BY_NAME_AND_BY_CLASS
def test_the_log_begins_with_what_trains(arguments, trainer_class, caplog):
    with caplog.at_level("INFO", logger="hf_noneuclid"):
        trainer_class(gpt2(), arguments(learning_rate=1.0), train_dataset=sequences()).train()
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    assert lines[0].startswith("matrices: 8 tensors, ")
    assert "such as 2 x transformer.h.*.mlp.c_fc.weight (16, 64)" in lines[0]
    assert lines[1].startswith("vectors: 20 tensors, ")
    assert lines[2] == (
        "muonmax_momo: the step size is bounded by the slope along the last step, by Momo with "
        "loss_lower_bound=0 and by the learning rate, 1; one device"
    )
    with caplog.at_level("DEBUG", logger="hf_noneuclid"):
        optimizer_of(trainer_class(gpt2(), arguments()))
    assert "transformer.h.*.attn.c_attn.weight" in caplog.text


def test_an_unknown_method_is_refused_with_the_known_ones(arguments):
    with pytest.raises(ValueError, match=r"muonmx.*muonmax_momo"):
        arguments(optim="muonmx")
    with pytest.raises(ValueError, match=r"'muonmx'.*muonmax_momo"):
        hf_noneuclid.create_optimizer(gpt2(), "muonmx", lr=1e-2)

    class Misspelt(NonEuclidTrainer):
        method = "muonmx"

    default = TrainingArguments.__dataclass_fields__["optim"].default
    with pytest.raises(ValueError, match=r"'muonmx'.*muonmax_momo"):
        Misspelt(gpt2(), arguments(optim=default)).create_optimizer()


@BY_NAME_AND_BY_CLASS
def test_a_model_without_matrices_is_refused(arguments, trainer_class):
    args = arguments()
    with pytest.raises(ValueError, match="Bigrams"):
        trainer_class(Bigrams(), args, train_dataset=sequences()).train()
    assert written(args) == []


def test_a_trainer_of_ours_refuses_a_foreign_optimizer(arguments):
    trainer = NonEuclidTrainer(gpt2(), arguments(optim="adafactor"), train_dataset=sequences())
    with pytest.raises(ValueError, match=r"NonEuclidTrainer trains with 'muonmax_momo'.*'adafactor'"):
        trainer.train()


@BY_NAME_AND_BY_CLASS
def test_a_lower_bound_above_the_first_loss_is_warned_of(arguments, trainer_class):
    with pytest.warns(UserWarning, match=r"loss_lower_bound is 77, above the first loss, 4\.\d+") as caught:
        trainer, _ = train(trainer_class, arguments(optim_args="step_size=momo,loss_lower_bound=77"))
    assert sum("loss_lower_bound" in str(warning.message) for warning in caught) == 1
    assert logged(trainer, "loss_lower_bound") == [77.0] * 4


@BY_NAME_AND_BY_CLASS
def test_fsdp_version_1_is_refused_and_version_2_named(arguments, trainer_class, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # the Trainer sets it; undone with the test
    config = {"version": 1, "transformer_layer_cls_to_wrap": ["GPT2Block"], "sync_module_states": False}
    args = arguments(fsdp=True, fsdp_config={**config, "cpu_ram_efficient_loading": False})
    assert args.device.type == "cpu"
    # Without this the state takes a CPU for no place where FSDP could run.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    with pytest.raises(RuntimeError, match=r"FSDP version 1 .*FSDP2"):
        trainer_class(gpt2(), args, train_dataset=sequences())


# ---------------------------------------------------------------- bad steps


def nan_in_call(*bad):
    """A loss for the Trainer, NaN in these of its calls, counted from 1."""
    calls = 0

    def loss_func(outputs, labels, num_items_in_batch=None):
        nonlocal calls
        calls += 1
        return token_mean(outputs, labels, num_items_in_batch) * (float("nan") if calls in bad else 1.0)

    return loss_func


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize("method", ["muonmax_momo", "muon"])
def test_a_nan_loss_changes_nothing_and_training_goes_on(arguments, trainer_class, method, caplog):
    args = arguments(optim=method, weight_decay=0.1, max_steps=5, optim_args="nuclear_norm=stale")
    trainer, witness = train(trainer_class, args, compute_loss_func=nan_in_call(3))
    unchanged = []
    for before, after in zip(witness.before, witness.after, strict=True):
        try:
            assert_same(after, before)
            unchanged.append(True)
        except AssertionError:
            unchanged.append(False)
    assert unchanged == [False, False, True, False, False]
    assert all(value.isfinite().all() for value in parameters(trainer.model).values())
    bad = {entry["step"]: entry["bad_steps"] for entry in trainer.state.log_history if "bad_steps" in entry}
    assert bad == {3: 1}
    warnings = [record.getMessage() for record in caplog.records if "changed nothing" in record.getMessage()]
    assert len(warnings) == 1


def test_a_second_training_does_not_report_the_steps_of_the_first(arguments):
    args = arguments(learning_rate=100.0, max_steps=3, optim_args="loss_lower_bound=0.0")
    trainer, _ = train(Trainer, args, compute_loss_func=nan_in_call(2))
    trainer.args.learning_rate = 1e-5
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1e-5
    trainer.train()
    assert logged(trainer, "bad_steps") == []
    assert logged(trainer, "truncation_rate") == [0.0] * 3


@BY_NAME_AND_BY_CLASS
def test_a_training_after_one_that_was_stopped_is_judged_by_its_own_steps(arguments, trainer_class):
    losses = {"compute_loss_func": nan_in_call(*range(1, 11))}
    trainer = trainer_class(gpt2(), arguments(max_steps=12), train_dataset=sequences(), **losses)
    with pytest.raises(RuntimeError, match=r"step 1;"):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == 12


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize("logging_steps", [5, 1000])
def test_ten_nan_losses_in_a_row_stop_the_training_at_the_next_log(arguments, trainer_class, logging_steps):
    args = arguments(max_steps=20, logging_steps=logging_steps)
    trainer = trainer_class(
        gpt2(), args, train_dataset=sequences(), compute_loss_func=nan_in_call(*range(3, 21))
    )
    with pytest.raises(DivergedError, match=r"ten steps in a row .* step 3;") as caught:
        trainer.train()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (caught.value.first_step, again.first_step, str(again)) == (3, 3, str(caught.value))
    assert trainer.state.global_step == (15 if logging_steps == 5 else 20)


@BY_NAME_AND_BY_CLASS
def test_nine_nan_losses_in_a_row_do_not_stop_the_training(arguments, trainer_class):
    args = arguments(max_steps=24, logging_steps=3)
    bad = [*range(2, 11), *range(12, 21)]
    trainer, _ = train(trainer_class, args, compute_loss_func=nan_in_call(*bad))
    assert trainer.state.global_step == 24
    assert sum(logged(trainer, "bad_steps")) == 18


@BY_NAME_AND_BY_CLASS
def test_the_first_bad_step_of_a_resumed_run_is_counted_from_its_start(arguments, trainer_class):
    train(trainer_class, arguments(max_steps=4, save_strategy="steps", save_steps=4))
    args = arguments(max_steps=30)
    # Its third call is step 7: four steps were taken before.
    trainer = trainer_class(
        gpt2(), args, train_dataset=sequences(), compute_loss_func=nan_in_call(*range(3, 31))
    )
    with pytest.raises(DivergedError, match=r"ten steps in a row .* step 7;"):
        trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-4")
    assert trainer.state.global_step == 16


# ---------------------------------------------------------------- checkpoints


@BY_NAME_AND_BY_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "text"),
    [("muonmax_momo", ""), ("muonmax_momo", "nuclear_norm=stale"), ("muonmax", "nuclear_norm=stale")],
)
def test_a_resumed_run_goes_on_bit_for_bit(arguments, trainer_class, method, text, dtype):
    args = arguments(
        optim=method,
        optim_args=text,
        learning_rate=0.3,
        weight_decay=0.1,
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
    )
    whole, _ = train(trainer_class, args, model=gpt2().to(dtype))
    checkpoint = f"{args.output_dir}/checkpoint-3"
    resumed = trainer_class(gpt2().to(dtype), args, train_dataset=sequences())
    resumed.train(resume_from_checkpoint=checkpoint)

    assert next(resumed.model.parameters()).dtype == dtype
    assert_same(parameters(resumed.model), parameters(whole.model))
    assert resumed.state.global_step == 6
    for key in ("step_size", "dual_norm"):
        assert logged(resumed, key) == logged(whole, key)
    saved = torch.load(f"{checkpoint}/optimizer.pt", weights_only=True)["state"]
    live = find_optimizer(resumed.optimizer).state_dict()["state"]
    for state in (saved, live):
        dtypes = {(key, x.dtype) for entry in state.values() for key, x in entry.items()}
        assert {dtype for key, dtype in dtypes if key != "last_step"} == {torch.float32}
        assert {dtype for key, dtype in dtypes if key == "last_step"} <= {torch.bfloat16}


# ---------------------------------------------------------------- arguments as data


def test_arguments_survive_pickling_into_another_process(arguments, tmp_path):
    """Every name, an alias and a hyphenated one included, with nothing but our import on the other side."""
    torch.save({name: arguments(optim=name) for name in all_names()}, tmp_path / "arguments.bin")
    program = (
        "import json, sys, torch, hf_noneuclid\n"
        "loaded = torch.load(sys.argv[1], weights_only=False)\n"
        "print(json.dumps({name: args.optim.value for name, args in loaded.items()}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "arguments.bin")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {name: name for name in all_names()}


@pytest.mark.parametrize("name", all_names())
def test_arguments_are_parsed_and_written_as_json(arguments, tmp_path, name):
    line = ["--output_dir", str(tmp_path), "--optim", name, "--optim_args", "momentum=0.9", "--use_cpu"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    assert args.optim == name
    assert json.loads(args.to_json_string())["optim"] == name
    assert copy.deepcopy(args).optim is args.optim


def test_a_trainer_that_divides_the_loss_twice_is_warned_of(arguments, caplog, monkeypatch):
    monkeypatch.setattr("hf_noneuclid.trainer.transformers.__version__", "5.5.4")
    args = arguments(gradient_accumulation_steps=2)
    Trainer(gpt2(), args, train_dataset=sequences()).train()
    assert "transformers 5.5.4 divides most losses by the 2 accumulation steps twice" in caplog.text


class WithParametersInTheLoss(Trainer):
    """Adds parameters that the model does not have, as sentence-transformers does for its losses."""

    head = nn.Linear(3, 3)

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        whole = nn.ModuleList([self.model, self.head])
        optimizer_class, values = super().get_optimizer_cls_and_kwargs(args, whole)
        assert not {"params", "model", "optimizer_dict"} & set(values)
        return optimizer_class, {**values, "optimizer_dict": [{"params": list(whole.parameters())}]}


class MixedWithParametersInTheLoss(NonEuclidTrainerMixin, WithParametersInTheLoss):
    method_options = {"beta2": 0.5}  # noqa: RUF012


@pytest.mark.parametrize("optim", ["muonmax_momo", None])
def test_the_mixin_keeps_parameters_that_a_trainer_adds(arguments, optim):
    args = arguments(**({"optim": optim} if optim else {"optim": TrainingArguments.default_optim}))
    trainer = MixedWithParametersInTheLoss(gpt2(), args, train_dataset=sequences())
    asked = trainer.args.optim
    optimizer = find_optimizer(trainer.create_optimizer())
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in [*trainer.model.parameters(), *trainer.head.parameters()]} == stepped
    assert optimizer.param_groups[0]["beta2"] == (0.95 if optim else 0.5)
    assert trainer.args.optim is asked


class MakesAdam(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer


class MixedWithOneThatMakesAdam(NonEuclidTrainerMixin, MakesAdam):
    pass


def test_the_mixin_refuses_an_optimizer_that_it_did_not_ask_for(arguments):
    trainer = MixedWithOneThatMakesAdam(gpt2(), arguments(), train_dataset=sequences())
    with pytest.raises(RuntimeError, match=r"trains with 'muonmax_momo'.*made AdamW"):
        trainer.create_optimizer()
