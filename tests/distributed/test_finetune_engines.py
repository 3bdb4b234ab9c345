"""Fine-tuning on the engines of accelerate_configs, with two CPU processes, beside one process alone."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import launch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_noneuclid.experiments.training.model import train_tokenizer

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
ON_CPU = Path(__file__).with_name("on_cpu.py")
STEPS, BLOCK, GLOBAL_BATCH = 3, 48, 8
RECIPE = f"""
    --use_cpu --task causal_lm --prompt_column ask --response_column answer --max_steps {STEPS}
    --block_size {BLOCK} --global_batch_size {GLOBAL_BATCH} --eval_strategy no --logging_steps 1
    --sample_tokens 4 --disable_tqdm true --report_to none
"""
LORA = ("--lora_rank", "2")
RUNS = {
    "ddp": ("ddp", (), "DistributedDataParallel"),
    "ddp, LoRA": ("ddp", LORA, "DistributedDataParallel"),
    "fsdp2": ("fsdp2", (), "FSDPGPT2LMHeadModel"),
    "zero3": ("zero3", (), "DeepSpeedEngine"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a base model of two layers and its tokenizer, and prompts with responses."""
    folder = tmp_path_factory.mktemp("finetune")
    words = "the king said unto his people that they shall ask and he shall answer them with what he knows"
    tokenizer = train_tokenizer([words] * 20, 300, 64)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, count in (("train", 60), ("validation", 9)):  # the ranks evaluate on unequal parts
        rows = [
            {"ask": f"say {i}", "answer": f"the king said {i} unto them" * (i % 3 + 1)} for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes of the same global batches; run once for all weights, once for adapters."""
    known = {}

    def result(options):
        if options not in known:
            command = [sys.executable, str(ROOT / "recipes" / "finetune.py")]
            known[options] = run(folder, f"alone{len(known)}", command, GLOBAL_BATCH, options)
        return known[options]

    return result


def run(folder, name, command, batch, options):
    """Runs a command with the options of the recipe; what it left behind."""
    launch(
        *(*command, *shlex.split(RECIPE), "--per_device_train_batch_size", str(batch), *options),
        *("--model_name_or_path", str(folder / "base"), "--output_dir", str(folder / name)),
        *("--train_files", str(folder / "train.jsonl")),
        *("--validation_files", str(folder / "validation.jsonl")),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_CACHE=str(folder / "cache"),
    )
    metrics = json.loads((folder / name / "metrics.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder / name, metrics=metrics)


def accelerate(config, folder):
    """The start of a command that runs the recipe on two processes, in float32: losses are compared."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")),
        *("--num_processes", "2", "--mixed_precision", "no"),
        *(str(ON_CPU), str(folder), str(ROOT / "recipes" / "finetune.py")),
    ]


def saved_loss(saved, base, rows):
    """Mean of -log p over the tokens of the responses, of the model that a user loads."""
    model = AutoModelForCausalLM.from_pretrained(base if (saved / "adapter_config.json").is_file() else saved)
    if (saved / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model, saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    losses = []
    for row in rows:
        given = tokenizer(row["ask"] + "\n")["input_ids"]
        ids = (given + tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id])[:BLOCK]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(given) - 1 : -1]
        losses += cross_entropy(logits, torch.tensor(ids[len(given) :]), reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_fine_tune_as_one_does(folder, alone, name, monkeypatch, tmp_path):
    """On the same global batches: losses before and after, counts, and the model that is saved."""
    config, options, wrapped = RUNS[name]
    monkeypatch.chdir(ROOT)  # where DeepSpeed's file is looked for
    one = alone(options)
    two = run(folder, name, accelerate(config, tmp_path), GLOBAL_BATCH // 2, options)
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8"))
        assert (seen["ranks"], seen["wrapped"]) == (2, wrapped)
        assert seen["optimizer"] == "NonEuclideanDescent"
        assert len(seen["losses"]) == STEPS
    assert two.metrics["before"]["loss"] == pytest.approx(one.metrics["before"]["loss"], rel=1e-5)
    assert two.metrics["after"]["loss"] == pytest.approx(one.metrics["after"]["loss"], rel=1e-3)
    assert two.metrics["after"]["loss"] < two.metrics["before"]["loss"]
    for count in ("parameters", "trained_parameters", "steps", "tokens"):
        assert two.metrics[count] == one.metrics[count]
    lines = (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    loss = saved_loss(two.folder, folder / "base", map(json.loads, lines))
    assert two.metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
