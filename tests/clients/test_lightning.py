"""Lightning, which steps with a closure and divides losses by the number of batches that are accumulated."""

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed")

import lightning
import torch
from common import Record, every_method_and_rate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hf_noneuclid

pytestmark = pytest.mark.clients


class ObserveLoss(lightning.Callback):
    """Shows every loss to the optimizers; under accumulation, the closure returns only the last one."""

    def on_before_backward(self, trainer, module, loss):
        for optimizer in trainer.optimizers:  # torch's own, without Lightning's wrapper
            optimizer.observe_loss(loss)


class Regression(lightning.LightningModule):
    def __init__(self, method, rate):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        self.method, self.rate, self.record = method, rate, Record()
        self.losses = []

    def configure_optimizers(self):
        return hf_noneuclid.create_optimizer(self.net, self.method, lr=self.rate)

    def training_step(self, batch, i):
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs, batch, i):
        if len(self.losses) == self.trainer.accumulate_grad_batches:
            self.record.note(sum(self.losses) / len(self.losses), self.optimizers())
            self.losses.clear()


class ClippedRegression(Regression):
    """Clips as Lightning does, and tells by how much."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        self.factor = min(1.0, gradient_clip_val / (norm.item() + 1e-6))
        optimizer.observe_clipping(self.factor)


def fit(module, *, steps=60, batch_size=16, **options):
    torch.manual_seed(0)
    x, weight = torch.randn(2048, 16), torch.randn(16, 4)
    data = DataLoader(TensorDataset(x, torch.tanh(x @ weight)), batch_size=batch_size)
    lightning.Trainer(
        max_steps=steps, max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    ).fit(module, data)  # fmt: skip
    return module.record


@every_method_and_rate
def test_a_closure_returns_the_loss(method, rate):
    """Without accumulation nothing need be done."""
    fit(Regression(method, rate), batch_size=32).check(rate, fell_to=0.5, slowly_to=0.9)


@every_method_and_rate
def test_every_accumulated_loss_counts(method, rate):
    module = Regression(method, rate)
    fit(module, callbacks=[ObserveLoss()], accumulate_grad_batches=2).check(rate, 0.5, slowly_to=0.9)


def test_accumulation_takes_the_steps_of_a_large_batch():
    """Were half of the loss lost, Momo would truncate other steps."""
    whole = fit(Regression("muonmax_momo", 1.0), batch_size=32)
    halves = fit(Regression("muonmax_momo", 1.0), callbacks=[ObserveLoss()], accumulate_grad_batches=2)
    assert whole.last["truncated_steps"] > 0
    assert halves.losses == pytest.approx(whole.losses, rel=1e-2)


def test_clipping_is_known():
    """The gradients of the first step were multiplied by the factor, and so is their model of the loss."""
    plain = fit(Regression("muon_momo", 1.0), callbacks=[ObserveLoss()], steps=1)
    module = ClippedRegression("muon_momo", 1.0)
    clipped = fit(module, callbacks=[ObserveLoss()], steps=1, gradient_clip_val=1e-3)
    assert module.factor < 0.1
    assert clipped.last["running_loss"] == pytest.approx(module.factor * plain.last["running_loss"], rel=1e-4)
