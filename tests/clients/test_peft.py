"""PEFT's adapters, on whole and on 4-bit weights: a model that counts by one learns to count by two."""

import pytest

pytest.importorskip("peft", reason="PEFT is not installed")

import peft
import torch
from common import Record, arguments, build, every_method, every_method_and_rate
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hf_noneuclid  # noqa: F401  (its methods by name)

pytestmark = pytest.mark.clients

STEPS = 60
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def counted(i, by):
    words = (torch.arange(16) * by + i) % 41 + 7
    return {"input_ids": words, "labels": words}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model that counts by one."""
    folder = tmp_path_factory.mktemp("base")
    args = TrainingArguments(**arguments(folder, "adamw_torch", 1e-2))
    model = build(LlamaForCausalLM, "llama", hidden_size=64)  # bitsandbytes packs blocks of 64 numbers
    Trainer(model, args, train_dataset=[counted(i, by=1) for i in range(2000)]).train()
    model.save_pretrained(folder)
    return folder


class UpdateRanks(TrainerCallback):
    """What AdaLoRA's guide says: after each step, ranks are distributed anew."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


def train(base, config, tmp_path, method, rate, callbacks=(), quantization=None, **more):
    torch.manual_seed(0)
    record, args = Record(), TrainingArguments(**arguments(tmp_path, method, rate, **more))
    model = LlamaForCausalLM.from_pretrained(base, quantization_config=quantization, device_map="cpu")
    model = peft.get_peft_model(model, config)
    data = [counted(i, by=2) for i in range(2000)]
    Trainer(model, args, train_dataset=data, callbacks=[record, *callbacks]).train()
    return record


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@every_method_and_rate
def test_lora(base, tmp_path, use_dora, method, rate):
    config = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora)
    train(base, config, tmp_path, method, rate).check(rate, fell_to=0.4)


@every_method
def test_lora_on_4_bits(base, tmp_path, method):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    train(base, config, tmp_path, method, 1.0, quantization=bits).check(1.0, fell_to=0.4)


@every_method
def test_adalora(base, tmp_path, method):
    """Ranks change under the optimizer, and the loss holds a penalty. Its vectors go far."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, tinit=10, tfinal=20, deltaT=2, total_step=STEPS, target_modules=MAPS
    )
    record = train(base, config, tmp_path, method, 1.0, callbacks=[UpdateRanks()])
    record.check_seen()
    assert record.mean_of_last() < 0.4 * record.losses[0]


@every_method
def test_ia3(base, tmp_path, method):
    """It has no matrices, only factors, which go far."""
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    record = train(base, config, tmp_path, method, 1.0, optim_target_modules="none")
    record.check_seen()
    assert record.mean_of_last() < 0.6 * record.losses[0]
