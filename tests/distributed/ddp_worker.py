"""What each of two ranks does under torchrun: it trains with DDP, and writes what it saw to a file.

Usage: torchrun --nproc_per_node=2 ddp_worker.py FOLDER
"""

import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_noneuclid
from hf_noneuclid.trainer import find_optimizer

METHODS = ("muonmax_momo", "muon_momo", "polargrad")
RANKS, BATCH, ACCUMULATION, STEPS = 2, 2, 2, 4
LENGTH, VOCABULARY, LEARNING_RATE = 12, 64, 0.3
BATCHES = 6 * RANKS  # six on a rank: three windows an epoch
BAD_STEP = 2


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=LENGTH))


def sequences():
    """Many label tokens in the batches of rank 0, few in those of rank 1."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(BATCHES * BATCH):
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + i % 3 + (6 if i // BATCH % RANKS else 0)] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def window(step, rank):
    """The rows that a rank reads for a step: batch after batch goes to rank after rank."""
    first = ACCUMULATION * step % (BATCHES // RANKS)
    mine = [(first + i) * RANKS + rank for i in range(ACCUMULATION)]
    return [row for batch in mine for row in sequences()[batch * BATCH : (batch + 1) * BATCH]]


def objective(model, step, average_tokens):
    """The loss that all ranks together minimise in a step, computed in one process.

    The mean over all label tokens, or, without averaging them across devices, the mean of the ranks' means.
    """
    windows = [window(step, rank) for rank in range(RANKS)]
    if average_tokens:
        return token_mean(model, [row for rows in windows for row in rows])
    return torch.stack([token_mean(model, rows) for rows in windows]).mean()


def token_mean(model, rows):
    logits = model(torch.stack([row["input_ids"] for row in rows])).logits[:, :-1]
    labels = torch.stack([row["labels"] for row in rows])[:, 1:]
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Witness(TrainerCallback):
    """Records the parameters before and after each step, and the optimizer's diagnostics."""

    def __init__(self):
        self.before, self.after, self.diagnostics = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.before.append(flat(model))

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.after.append(flat(model))
        self.diagnostics.append(find_optimizer(optimizer).diagnostics())


class NanOnOneRank(Trainer):
    """In one step the loss is NaN on rank 1. The gradients are finite on both ranks."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        bad = dist.get_rank() == 1 and self.state.global_step == BAD_STEP
        return loss + float("nan") if bad else loss


def train(trainer_class, folder, **options):
    """Trains with DDP. The objectives are the losses of plain torch at the same parameters."""
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    witness = Witness()
    trainer = trainer_class(llama(), args, train_dataset=sequences(), callbacks=[witness])
    trainer.train()
    model, objectives = llama(), []
    for step, before in enumerate(witness.before):
        torch.nn.utils.vector_to_parameters(before, model.parameters())
        with torch.no_grad():
            objectives.append(objective(model, step, args.average_tokens_across_devices).item())
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "before": witness.before,
        "after": witness.after,
        "losses": [step["loss"] for step in witness.diagnostics],
        "step_sizes": [step["step_size"] for step in witness.diagnostics],
        "bad_steps": [step["bad_steps"] for step in witness.diagnostics],
        "objectives": objectives,
        "logged": [entry for entry in trainer.state.log_history if "step_size" in entry],
    }


def train_alone(method, average_tokens):
    """The same steps of one process on the global batches, with neither a Trainer nor DDP."""
    model = llama()
    optimizer = hf_noneuclid.create_optimizer(model, method, lr=LEARNING_RATE)
    after = []
    for step in range(STEPS):
        loss = objective(model, step, average_tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.observe_clipping(min(1.0, 1.0 / (norm.item() + 1e-6)))
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        after.append(flat(model))
    return after


def main(folder):
    seen = {}
    for method in METHODS:
        for average_tokens in (True, False):
            seen[method, average_tokens] = train(
                Trainer, folder, optim=method, average_tokens_across_devices=average_tokens
            )
            # Both ranks do this, because the optimizer averages the loss over all processes.
            seen[method, average_tokens]["alone"] = train_alone(method, average_tokens)
    seen["nan"] = train(NanOnOneRank, folder, optim="muonmax_momo", weight_decay=0.1)
    seen["ranks"] = dist.get_world_size()
    torch.save(seen, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)  # two-rank CPU workers sometimes abort while the interpreter shuts down
