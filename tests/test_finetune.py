"""The fine-tuning recipe: what is learnt of what, what it leaves behind, and what it refuses."""

import copy
import json
import math
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import classify
import datasets
import finetune
import gguf
import pytest
import torch
import transformers
from accelerate import PartialState
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_noneuclid.experiments.sweeping.commands import as_arguments, recipe_flags
from hf_noneuclid.experiments.sweeping.suite import load_suites
from hf_noneuclid.experiments.training import causal, default_run, embedded, presets
from hf_noneuclid.experiments.training.adapters import add_adapters
from hf_noneuclid.experiments.training.arguments import (
    ClassifyDataArguments,
    FinetuneDataArguments,
    PretrainedArguments,
)
from hf_noneuclid.experiments.training.classification import AccuracyAndMacroF1, class_names
from hf_noneuclid.experiments.training.data import Corpus, check_columns, hold_out, load_rows
from hf_noneuclid.experiments.training.isolation import check_isolation
from hf_noneuclid.experiments.training.model import train_tokenizer
from hf_noneuclid.experiments.training.options import ARGUMENT_TYPES, parse
from hf_noneuclid.experiments.training.packing import Blocks

RECIPES = Path(__file__).parents[1] / "recipes"
QUICK = [
    *("--use_cpu=true", "--max_steps=2", "--block_size=48", "--logging_steps=1"),
    *("--per_device_train_batch_size=4", "--eval_steps=0.999", "--eval_blocks=4"),
]
RECIPE = {"default": finetune, "causal_lm": finetune, "classification": classify}
OWN = {"default": [], "causal_lm": ["--task=causal_lm", "--sample_tokens=0"], "classification": []}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def state():
    """What accelerate's logger asks for; a run makes it before anything is logged."""
    PartialState(cpu=True)


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tokenizer():
    words = "the king said unto his people that they shall ask and he shall answer them with what he knows"
    return train_tokenizer([words] * 20, 300, 64)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """A folder with a GPT-2 of one layer and its tokenizer, as pretrain.py leaves them."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"ask": f"say {i}", "answer": f"the king said {i} unto them" * (i % 3 + 1)} for i in range(30)]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": f"{i} the people shall ask the king and he shall answer"} for i in range(80)]
    return write_rows(tmp_path / "texts.jsonl", rows)


@pytest.fixture
def classes(tmp_path):
    rows = [
        {"text": f"{'king' if i % 3 else 'people'} number {i}", "label": "ab"[i % 3 > 0]} for i in range(60)
    ]
    return write_rows(tmp_path / "classes.jsonl", rows)


def train(folder, base, task, *flags):
    names = [f"--model_name_or_path={base}", f"--output_dir={folder}"]
    RECIPE[task].main([*QUICK, *OWN[task], *names, *flags])
    return json.loads((Path(folder) / "metrics.json").read_text())


PROMPTS = ["--prompt_column=ask", "--response_column=answer"]


def response_loss(model, tokenizer, rows, block_size):
    """Mean of -log p over the tokens of the responses alone, one row after the other."""
    losses = []
    for row in rows:
        given = tokenizer(row["ask"] + "\n")["input_ids"]
        ids = (given + tokenizer(row["answer"])["input_ids"] + [tokenizer.eos_token_id])[:block_size]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        losses += cross_entropy(
            logits[len(given) - 1 : -1], torch.tensor(ids[len(given) :]), reduction="none"
        ).tolist()
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- causal language models


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_loss_is_of_the_responses_alone_before_and_after(tmp_path, base, pairs, packing):
    flags = [*PROMPTS, f"--train_files={pairs}", f"--validation_files={pairs}", f"--packing={packing}"]
    metrics = train(tmp_path / "out", base, "causal_lm", *flags)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    for moment, folder in (("before", base), ("after", tmp_path / "out")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = response_loss(model, tokenizer, rows, 48)
        assert metrics[moment]["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["tokens"] > 0
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "history.json").is_file()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_examples_do_not_see_each_other(kind, tokenizer):
    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=50))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50))
    model.eval()
    examples = [
        causal.Example(torch.randint(50, (n,)).tolist(), given) for n, given in ((7, 3), (5, 1), (9, 2))
    ]
    packed = causal.pack_examples(examples, 16, 0)
    assert [len(row["input_ids"]) for row in packed] == [16, 16]
    alone = not_packed(examples)
    filling = copy.copy(tokenizer)
    filling.pad_token = tokenizer.eos_token
    with torch.no_grad():
        losses = []
        for rows in (packed, alone):
            batch = causal.Collator(filling)(rows)
            labels = batch.pop("labels")
            # As the Trainer does: with a cache transformers takes positions for those of one sequence.
            logits = model(**batch, use_cache=False).logits
            losses.append(causal.summed_losses(logits, labels).sum(dim=0))
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][1] == (7 - 3) + (5 - 1) + (9 - 2)


def not_packed(examples):
    return [{"input_ids": example.ids, "labels": example.labels()} for example in examples]


def leaky_model(kind, vocab_size):
    """A model in which packed examples see each other, whether it takes position_ids (OPT) or not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "opt":
        heads = {"num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16}
        config = OPTConfig(**sizes, **heads, num_hidden_layers=1, max_position_embeddings=64)
        return OPTForCausalLM(config)
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(**sizes, n_layer=1, n_head=2))
    return MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=1))


@pytest.mark.parametrize("kind", ["opt", "bloom", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_refused_only_where_examples_that_see_each_other_are_joined(kind, dtype):
    model = leaky_model(kind, 50).train()
    for weight in model.parameters():
        weight.data *= 8  # as large as trained ones: what is seen is then more than bf16's rounding
    model = model.to(dtype)
    examples = [causal.Example(torch.randint(50, (6,)).tolist(), 2) for _ in range(3)]
    data = {}
    for name, rows in (
        ("joined", causal.pack_examples(examples, 16, 0)),
        ("one to a sequence", causal.pack_examples(examples, 8, 0)),
        ("not packed", not_packed(examples)),
    ):
        blocks = Blocks(datasets.Dataset.from_list(rows))
        data[name] = Corpus(name, blocks, blocks)
    check_isolation(model, data["one to a sequence"])
    check_isolation(model, data["not packed"])
    with pytest.raises(ValueError, match="--packing false"):
        check_isolation(model, data["joined"])
    assert model.training
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    check_isolation(LlamaForCausalLM(LlamaConfig(**llama, vocab_size=50)).to(dtype), data["joined"])


@pytest.mark.parametrize("lora", [[], ["--lora_rank=2"]])
def test_a_model_that_cannot_isolate_trains_without_packing(capsys, tmp_path, tokenizer, pairs, lora):
    leaky_model("opt", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = [*PROMPTS, f"--train_files={pairs}", *lora]
    named = [f"--model_name_or_path={tmp_path / 'base'}", f"--output_dir={tmp_path / 'out'}"]
    assert "--packing false" in refused(capsys, "causal_lm", *named, *run)
    assert not (tmp_path / "out").exists()
    metrics = train(tmp_path / "out", tmp_path / "base", "causal_lm", *run, "--packing=false")
    assert math.isfinite(metrics["eval_loss"])


def test_nothing_of_an_example_is_lost_in_packing():
    examples = [causal.Example(list(range(i * 10, i * 10 + n)), 1) for i, n in enumerate((4, 8, 3, 3, 8), 1)]
    rows = causal.pack_examples(examples, 8, 0)
    learnt = [label for row in rows for label in row["labels"] if label != causal.IGNORED]
    assert learnt == [token for example in examples for token in example.ids[1:]]
    assert all(row["position_ids"][0] == 0 and len(row["input_ids"]) == 8 for row in rows)


def test_the_chat_template_is_used_where_there_is_one(tokenizer):
    plain = causal.render("ask", "answer", tokenizer)
    assert plain == ("ask\n", "answer")
    tokenizer.chat_template = CHAT
    try:
        asked, answered = causal.render("ask", "answer", tokenizer)
        tokenizer.chat_template = "{{ messages | length }}"
        with pytest.raises(ValueError, match="--text_column"):
            causal.render("ask", "answer", tokenizer)
    finally:
        tokenizer.chat_template = None
    assert asked == "<user>ask</s><assistant>"
    assert answered == "answer</s>"


def test_overwriting_leaves_no_chat_template_of_the_old_run(tmp_path, base, texts):
    chatty = tmp_path / "chatty"
    shutil.copytree(base, chatty)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": CHAT, "other": CHAT}
    tokenizer.save_pretrained(chatty)
    out, flags = tmp_path / "out", [f"--train_files={texts}", "--max_steps=1"]
    train(out, chatty, "causal_lm", *flags)
    assert AutoTokenizer.from_pretrained(out).chat_template
    (out / "tokenizer_notes").mkdir()
    train(out, base, "causal_lm", *flags, "--overwrite_output_dir")
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    assert (out / "tokenizer_notes").is_dir()


ENDLESS = (
    "<|endoftext|>{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_response_ends_with_a_token_whatever_the_chat_template_says(tokenizer, caplog):
    for template, count in ((ENDLESS, 1), (ENDLESS.replace("}{% endfor", "}<|endoftext|>{% endfor"), 0)):
        tokenizer.chat_template = template
        try:
            (example,) = causal._of_pairs(["ask"], ["answer"], tokenizer)
        finally:
            tokenizer.chat_template = None
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.ids.count(tokenizer.eos_token_id) == (2 if count else 3)
        assert ("1 responses have no end in the chat template" in caplog.text) == bool(count)
        caplog.clear()


def test_the_sample_begins_with_one_token_of_the_beginning(tokenizer):
    adding = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        chat_template=ENDLESS,
    )
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    part = datasets.Dataset.from_list([{"ask": "the king", "answer": "said"}])
    args = FinetuneDataArguments(
        task="causal_lm", train_files=["a"], prompt_column="ask", response_column="answer"
    )
    prompt = causal.first_prompt(Corpus("data", part, part), args, adding)
    (example,) = causal._of_pairs(["the king"], ["said"], adding)
    assert adding(prompt)["input_ids"] == example.ids[: example.given]


def test_an_encoder_is_no_causal_language_model(capsys, tmp_path, tokenizer, texts):
    masked_model("bert", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = ["causal_lm", f"--train_files={texts}", f"--output_dir={tmp_path / 'out'}"]
    message = refused(capsys, *run, f"--model_name_or_path={tmp_path}")
    assert "it is an encoder" in message


@pytest.mark.parametrize("packing", ["true", "false"])
def test_texts_without_text_are_counted(tmp_path, tokenizer, caplog, packing):
    part = datasets.Dataset.from_list([{"text": "the king said " * 9}, {"text": None}, {"text": ""}])
    args = FinetuneDataArguments(task="causal_lm", train_files=["a"], packing=packing == "true", block_size=4)
    causal.encode(part, tokenizer, args, None)
    assert "2 rows have no text" in caplog.text


@pytest.mark.parametrize("packing", ["true", "false"])
def test_texts_and_the_old_domain(tmp_path, base, texts, packing):
    (tmp_path / "old.txt").write_text("the king said unto his people\n" * 20)
    flags = [f"--train_files={texts}", f"--packing={packing}", f"--old_domain_files={tmp_path / 'old.txt'}"]
    metrics = train(tmp_path / "out", base, "causal_lm", *flags, "--sample_tokens=3")
    assert metrics["after"]["old_domain_loss"] != metrics["before"]["old_domain_loss"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = tokenizer((tmp_path / "old.txt").read_text())["input_ids"] + [tokenizer.eos_token_id]
    blocks = torch.tensor(ids[: len(ids) // 48 * 48]).view(-1, 48)
    with torch.no_grad():
        logits = model(blocks).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
    assert metrics["before"]["old_domain_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_knows_what_was_before(tmp_path, base, texts):
    flags = [f"--train_files={texts}", "--max_steps=4", "--save_steps=2"]
    straight = train(tmp_path / "straight", base, "causal_lm", *flags)
    (tmp_path / "cut").mkdir()
    (tmp_path / "straight" / "checkpoint-2").rename(tmp_path / "cut" / "checkpoint-2")
    resumed = train(tmp_path / "cut", base, "causal_lm", *flags, "--resume_from_checkpoint=true")
    assert resumed["before"] == straight["before"]
    assert resumed["eval_loss"] == straight["eval_loss"]


@pytest.mark.parametrize("lora", [[], ["--lora_rank=2", "--lora_merge=true"]])
def test_a_run_killed_after_its_last_step_writes_its_results(tmp_path, base, texts, lora):
    flags = [f"--train_files={texts}", *lora]
    straight = train(tmp_path, base, "causal_lm", *flags)
    for name in ("metrics.json", "history.json", "model.safetensors"):
        (tmp_path / name).unlink()
    resumed = train(tmp_path, base, "causal_lm", *flags, "--resume_from_checkpoint=true")
    for name in ("before", "after", "train_loss", "steps", "tokens"):
        assert resumed[name] == straight[name]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() > 0


def test_a_model_in_an_installed_package(tmp_path, base, texts, monkeypatch):
    shutil.copytree(base, tmp_path / "some_model")
    (tmp_path / "some_model" / "__init__.py").write_text("raise ImportError('is not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--model_package=some_model", f"--train_files={texts}", "--learning_rate=0"]
    finetune.main([*QUICK, *OWN["causal_lm"], *flags, f"--output_dir={tmp_path / 'out'}"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["before"] == metrics["after"]


# ---------------------------------------------------------------- GGUF


def interleave(weight, heads):
    """The rows of a query or key projection in llama.cpp's order: halves of a head, rotated as pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, tokenizer):
    """A Llama of one layer with its tokenizer, as llama.cpp's converter writes them; returns the model."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, **heads}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, **tokens, max_position_embeddings=64, tie_word_embeddings=False)
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(parts["vocab"], key=parts["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokenizer) - 1))
    writer.add_token_merges([" ".join(merge) for merge in parts["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, weight in model.state_dict().items():
        for projection, count in (("q_proj", 4), ("k_proj", 2)):
            weight = interleave(weight, count) if projection in name else weight
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.6"),
    reason="transformers before 5.6 takes the tokenizer of a Llama in a GGUF file for Code Llama's",
)
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_gguf_file_is_fine_tuned_into_a_model_of_its_own(tmp_path, tokenizer, pairs, lora_rank):
    (tmp_path / "base").mkdir()
    original = write_gguf(tmp_path / "base" / "tiny.gguf", tokenizer)
    flags = [*PROMPTS, f"--train_files={pairs}", f"--validation_files={pairs}", f"--lora_rank={lora_rank}"]
    out = tmp_path / "out"
    metrics = train(out, tmp_path / "base", "causal_lm", *flags, "--gguf_file=tiny.gguf")
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    before = response_loss(original.eval(), tokenizer, rows, 48)
    after = response_loss(
        AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out), rows, 48
    )
    assert metrics["before"]["loss"] == pytest.approx(before, rel=1e-5)
    assert metrics["after"]["loss"] == pytest.approx(after, rel=1e-5)
    assert after < before
    assert not list(out.glob("adapter_*"))


# ---------------------------------------------------------------- LoRA


def test_lora_trains_adapters_alone_and_can_be_merged(tmp_path, base, texts):
    flags = [f"--train_files={texts}", "--lora_rank=2", "--lora_target_modules=c_attn"]
    adapter = train(tmp_path / "adapter", base, "causal_lm", *flags)
    merged = train(tmp_path / "merged", base, "causal_lm", *flags, "--lora_merge=true")
    assert adapter["trained_parameters"] == 2 * (16 + 48)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert adapter["eval_loss"] == merged["eval_loss"] < adapter["before"]["loss"]
    assert not list((tmp_path / "merged").glob("adapter_*"))
    original = AutoModelForCausalLM.from_pretrained(base)
    added = PeftModel.from_pretrained(original, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(whole[name], added[name], atol=1e-6) for name in whole)
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name in start if not torch.equal(start[name], whole[name])}
    assert changed == {"transformer.h.0.attn.c_attn.weight"}


def test_an_adapter_knows_the_revision_of_its_base(base):
    args = PretrainedArguments(model_name_or_path=base, model_revision="v1", lora_rank=2)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(base), args, classifies=False, new=[])
    assert model.peft_config["default"].to_dict()["revision"] == "v1"


# ---------------------------------------------------------------- classification


def test_accuracy_and_macro_f1_by_hand():
    found = AccuracyAndMacroF1(keep_in_memory=True).compute(
        predictions=[0, 0, 1, 1, 1], references=[0, 1, 1, 2, 1]
    )
    # Class 0: precision 1/2, recall 1; class 1: precision 2/3, recall 2/3; class 2: never predicted.
    assert found == pytest.approx({"accuracy": 3 / 5, "macro_f1": (2 / 3 + 2 / 3 + 0) / 3})


def test_the_saved_classifier_has_the_reported_metrics(tmp_path, base, classes):
    flags = [
        f"--train_files={classes}",
        f"--validation_files={classes}",
        "--max_steps=8",
        "--learning_rate=1e-2",
    ]
    metrics = train(tmp_path / "out", base, "classification", *flags)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    right, loss, rows = 0, 0.0, [json.loads(line) for line in Path(classes).read_text().splitlines()]
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        right += model.config.id2label[logits.argmax().item()] == row["label"]
        loss -= logits.log_softmax(dim=-1)[model.config.label2id[row["label"]]].item()
    assert metrics["accuracy"] == pytest.approx(right / len(rows))
    assert metrics["eval_loss"] == pytest.approx(loss / len(rows), rel=1e-4)
    assert metrics["classes"] == ["a", "b"]
    assert metrics["eval_loss"] < metrics["before"]["loss"]
    assert {"accuracy", "macro_f1", "loss"} == set(metrics["before"])


def class_loss(model, tokenizer, path, names):
    """Mean of -log p of the classes, one row after the other."""
    losses = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(cross_entropy(logits, torch.tensor([names.index(row["label"])])).item())
    return sum(losses) / len(losses)


def masked_model(kind, vocab_size):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": 64}
    if kind == "bert":
        layer = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        return BertForMaskedLM(BertConfig(**sizes, **layer, num_hidden_layers=1))
    return DistilBertForMaskedLM(DistilBertConfig(**sizes, dim=16, n_heads=2, hidden_dim=24, n_layers=1))


@pytest.mark.parametrize(("kind", "new"), [("bert", "pooler.dense"), ("distilbert", "pre_classifier")])
def test_layers_that_the_checkpoint_lacks_are_saved_with_the_adapter(tmp_path, tokenizer, classes, kind, new):
    base = tmp_path / "base"
    masked_model(kind, len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    flags = [f"--train_files={classes}", f"--validation_files={classes}", "--lora_rank=2"]
    for out, merge in ((tmp_path / "adapter", "false"), (tmp_path / "merged", "true")):
        metrics = train(out, base, "classification", *flags, f"--lora_merge={merge}", "--learning_rate=1e-2")
        torch.manual_seed(7)  # other random layers than the run's
        if merge == "false":
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
            model = PeftModel.from_pretrained(model, out)
            saved = load_file(out / "adapter_model.safetensors")
            assert any(f"{new}.weight" in name for name in saved)
            assert not any(f"{new}.lora" in name for name in saved)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(out)
        found = class_loss(model, tokenizer, classes, metrics["classes"])
        assert metrics["eval_loss"] == pytest.approx(found, rel=1e-4)


def test_a_classifier_needs_no_token_at_the_end_of_a_text(capsys, tmp_path, tokenizer, classes):
    base, out = tmp_path / "base", f"--output_dir={tmp_path / 'out'}"
    masked_model("bert", len(tokenizer)).save_pretrained(base)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    other.save_pretrained(base)
    named = [f"--model_name_or_path={base}", f"--train_files={classes}", out]
    assert "neither a pad_token nor" in refused(capsys, "classification", *named)
    other.pad_token = tokenizer.eos_token
    other.save_pretrained(base)
    assert "has no eos_token" in refused(capsys, "causal_lm", *named)
    metrics = train(tmp_path / "out", base, "classification", f"--train_files={classes}")
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("lora", [[], ["--lora_rank=2", "--lora_merge=true"]])
def test_a_classifier_of_other_classes_gets_a_new_head(tmp_path, tokenizer, classes, caplog, lora):
    base = tmp_path / "base"
    config = masked_model("bert", len(tokenizer)).config
    config.num_labels = 5
    BertForSequenceClassification(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    flags = [f"--train_files={classes}", f"--validation_files={classes}", *lora]
    metrics = train(tmp_path / "out", base, "classification", *flags)
    assert "tells 5 classes apart, the data have 2: classifier.weight starts from random" in caplog.text
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "a", 1: "b"}
    found = class_loss(model, tokenizer, classes, metrics["classes"])
    assert metrics["eval_loss"] == pytest.approx(found, rel=1e-4)


def test_weights_that_are_not_of_the_configured_size(capsys, tmp_path, tokenizer, classes):
    masked_model("bert", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    run = ["classification", f"--train_files={classes}", f"--output_dir={tmp_path / 'out'}"]
    assert "its config.json says" in refused(capsys, *run, f"--model_name_or_path={tmp_path}")


def test_numbers_as_classes_stay_in_their_order(tmp_path, base):
    rows = [{"stars": i % 11, "review": f"said {i % 11}"} for i in range(66)]
    path = write_rows(tmp_path / "stars.jsonl", rows)
    flags = [f"--train_files={path}", "--text_column=review", "--label_column=stars", "--lora_rank=2"]
    metrics = train(tmp_path / "out", base, "classification", *flags, "--lora_merge=true", "--max_steps=1")
    assert metrics["classes"] == [str(i) for i in range(11)]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.pad_token_id == 0
    assert model.score.weight.shape == (11, 16)


def test_rows_of_a_parquet_file_are_those_of_the_jsonl_file(tmp_path, classes):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_json(classes).to_parquet(path)
    parts = [load_rows(ClassifyDataArguments(train_files=[name])) for name in (classes, str(path))]
    assert parts[0].train.to_list() == parts[1].train.to_list()
    assert parts[0].validation.to_list() == parts[1].validation.to_list()


def test_the_old_domain_is_read_by_the_text_column(tmp_path, tokenizer):
    text = "the king said unto his people\n" * 40
    (tmp_path / "old.txt").write_text(text)
    files = [str(tmp_path / "old.txt"), write_rows(tmp_path / "old.jsonl", [{"body": text}])]
    read = [
        causal.encode_old_domain(
            FinetuneDataArguments(old_domain_files=[file], text_column="body"), tokenizer
        ).sha256
        for file in files
    ]
    assert read[0] == read[1]


# ---------------------------------------------------------------- the embedded run


def test_docstrings_are_read_without_importing(tmp_path):
    long = (
        "Return what was asked for, and raise an error where there is nothing that could be returned at all."
    )
    inner = f'    """short"""\n    def f(self):\n        """{long} x"""\n'
    source = f'"""{long}"""\nraise SystemExit\nclass A:\n{inner}'
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "broken.py").write_text("def (")
    assert embedded.docstrings_of(tmp_path / "a.py") == [long, long + " x"]
    assert embedded.docstrings_of(tmp_path / "broken.py") == []


def test_no_held_out_docstring_is_trained_on(monkeypatch):
    monkeypatch.setattr(embedded, "CHARACTERS", 40_000)
    _, train_part, held_out, _ = embedded.read_docstrings()
    _, again, *_ = embedded.read_docstrings()
    assert train_part.to_list() == again.to_list()
    assert not set(train_part["text"]) & set(held_out["text"])
    for part in (train_part, held_out):
        assert set(part["label"]) == {"torch", "transformers"}
        assert len(set(part["text"])) == len(part)
        assert min(map(len, part["text"])) > 80


def test_the_domains_are_docstrings_and_as_many_verses(monkeypatch):
    monkeypatch.setattr(embedded, "CHARACTERS", 40_000)
    _, train_part, held_out, _ = embedded.read_domains()
    assert not set(train_part["text"]) & set(held_out["text"])
    for part in (train_part, held_out):
        labels = part["label"]
        assert labels.count("docstring") == labels.count("verse") > 0
        assert min(map(len, part["text"])) > 80
    verses = {row["text"] for row in train_part if row["label"] == "verse"}
    assert all("\n" not in verse for verse in verses)


def only_here(monkeypatch, run):
    """Replaces how the default run starts commands; git is still started to ask for the commit."""
    monkeypatch.setattr(default_run, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the commands of the default run without new processes, on a few docstrings; list them."""
    monkeypatch.setattr(embedded, "CHARACTERS", 40_000)
    started = []

    def start(command, check):
        _, script, *flags = command
        started.append((Path(script).name, flags))
        if Path(script).name != "pretrain.py":
            {"finetune.py": finetune, "classify.py": classify}[Path(script).name].main(flags)
        return subprocess.CompletedProcess(command, 0)

    only_here(monkeypatch, start)
    return started


def test_without_a_task_both_follow_each_other(tmp_path, base, in_this_process, capsys):
    """As commands of their own, the second on the model of the first."""
    flags = [*QUICK, "--max_validation_blocks=8", "--max_steps=1", "--lora_rank=2"]
    flags += [f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'out'}"]
    finetune.main(flags)
    assert [name for name, _ in in_this_process] == ["finetune.py", "classify.py"]
    first, second = (
        json.loads((tmp_path / "out" / name / "metrics.json").read_text())
        for name in ("docstrings", "library")
    )
    assert {"loss", "old_domain_loss"} <= set(first["before"])
    assert second["classes"] == ["torch", "transformers"]
    assert second["options"]["model_name_or_path"] == str(tmp_path / "out" / "docstrings")
    assert capsys.readouterr().out.count("before     after") == 2
    assert "holds another run" in refused(capsys, "default", *flags)


def test_the_config_file_counts_for_both_tasks(tmp_path, base, monkeypatch):
    (tmp_path / "run.yaml").write_text(f"max_steps: 5\nblock_size: 48\nmodel_name_or_path: {base}\n")
    commands = []
    only_here(
        monkeypatch,
        lambda command, check: commands.append(command[2:]) or subprocess.CompletedProcess(command, 0),
    )
    flags = ["--use_cpu=true", f"--config={tmp_path / 'run.yaml'}"]
    for optim, rate in (("muonmax_momo", 1.0), ("muon", 1e-2)):
        commands.clear()
        finetune.main([*flags, f"--optim={optim}", f"--output_dir={tmp_path / optim}"])
        _, data_args, args = parse(commands[1], ARGUMENT_TYPES["classify"])
        assert (args.max_steps, data_args.block_size) == (5, 48)
        assert (args.learning_rate, args.per_device_train_batch_size) == (rate, 32)


def test_the_default_run_writes_and_prints_no_token(tmp_path, base, monkeypatch, capsys):
    token = "hf_aToken0123456789abcdef"
    monkeypatch.setenv("HF_TOKEN", "")
    commands = []
    only_here(
        monkeypatch,
        lambda command, check: commands.append(command) or subprocess.CompletedProcess(command, 0),
    )
    finetune.main([*QUICK, f"--model_name_or_path={base}", f"--output_dir={tmp_path}", "--hub_token", token])
    assert len(commands) == 2
    assert os.environ["HF_TOKEN"] == token
    assert token not in capsys.readouterr().out + str(commands)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_text()] == []
    assert (tmp_path / "library.yaml").is_file()


@pytest.mark.parametrize("named_in", ["command line", "config file"])
def test_without_a_task_a_package_and_a_gguf_file_are_for_the_first(
    tmp_path, tokenizer, in_this_process, monkeypatch, named_in
):
    (tmp_path / "gguf_model").mkdir()
    (tmp_path / "gguf_model" / "__init__.py").touch()
    write_gguf(tmp_path / "gguf_model" / "tiny.gguf", tokenizer)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"model_package": "gguf_model", "gguf_file": "tiny.gguf", "lora_rank": 2}
    flags = [f"--{name}={value}" for name, value in options.items()]
    if named_in == "config file":
        (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in options.items()))
        flags = [f"--config={tmp_path / 'run.yaml'}"]
    sizes = ["--max_validation_blocks=8", "--max_steps=1", f"--output_dir={tmp_path / 'out'}"]
    finetune.main([*QUICK, *flags, *sizes])
    assert len(in_this_process) == 2
    assert (tmp_path / "out" / "library" / "adapter_model.safetensors").is_file()


def test_the_default_model_is_made_if_it_is_not_there(tmp_path, base, in_this_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = default_run.subprocess.run

    def start(command, check):
        if "pretrain.py" in command[1]:
            shutil.copytree(base, "outputs/pretrain", dirs_exist_ok=True)
        return made(command, check)

    only_here(monkeypatch, start)
    flags = [*QUICK, "--max_validation_blocks=8", "--max_steps=1"]
    finetune.main(flags)
    assert in_this_process[0] == ("pretrain.py", ["--output_dir=outputs/pretrain", "--use_cpu=true"])
    assert (tmp_path / "outputs" / "finetune" / "library" / "metrics.json").is_file()
    finetune.main([*flags, "--output_dir=again"])
    assert [name for name, _ in in_this_process] == ["pretrain.py", *["finetune.py", "classify.py"] * 2]


# ---------------------------------------------------------------- presets


def parsed(*flags):
    model_args, _, args = parse(["--use_cpu=true", *flags], ARGUMENT_TYPES["finetune"])
    presets.apply_preset(presets.LORA if model_args.lora_rank else presets.FULL, args)
    return args


def test_presets_fill_in_what_is_not_given(capsys):
    plain = parsed("--optim=muon")
    assert (plain.learning_rate, plain.optim_args) == (3e-4, "momentum=0.8")
    assert "unless --preset false: momentum=0.8" in capsys.readouterr().out
    assert parsed("--optim=muon", "--lora_rank=4").learning_rate == 3e-3
    given = parsed("--optim=muon", "--learning_rate=5e-3", "--optim_args=momentum=0.9")
    assert (given.learning_rate, given.optim_args) == (5e-3, "momentum=0.9")
    assert parsed("--optim=muon", "--preset=false").optim_args is None
    adamw = parsed("--optim=adamw_torch")
    assert (adamw.learning_rate, adamw.optim_args) == (presets.ADAM_LEARNING_RATE, None)


def test_presets_leave_the_slope_alone(capsys):
    for flags in ((), ("--optim=muon", "--optim_args=step_size=slope")):
        args = parsed(*flags)
        assert args.learning_rate == 1.0
        assert "momentum" not in (args.optim_args or "")
    assert "preset" not in capsys.readouterr().out


def test_presets_give_a_method_only_what_it_has():
    args = parsed("--optim_args=step_size=momo")
    assert (args.learning_rate, args.optim_args) == (1.0, "step_size=momo,momentum=0.8")
    free = "descent=constrained,product_norm=linf,vector_norm=linf"
    assert parsed("--optim=noneuclid", f"--optim_args={free}").optim_args == f"{free},momentum=0.8"
    for optim, rate in (("muonmax_momo", 1.0), ("muon", 1e-3)):
        _, _, classifier = parse(
            ["--use_cpu=true", "--label_column=b", f"--optim={optim}"], ARGUMENT_TYPES["classify"]
        )
        presets.apply_preset(presets.CLASSIFIER, classifier)
        assert (classifier.learning_rate, classifier.optim_args) == (rate, None)


# ---------------------------------------------------------------- bad input


def refused(capsys, task, *flags):
    """What a run that must not start says."""
    with pytest.raises(SystemExit) as caught:
        RECIPE[task].main([*QUICK, *OWN[task], *flags])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    return message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["default", "--task=translation"], "invalid choice: 'translation'"),
        (["default", "--train_files=nowhere.txt"], "no file nowhere.txt"),
        (["classification", "--embedded_classes=genre"], "invalid choice: 'genre'"),
        (["causal_lm", "--prompt_column=a"], "give both"),
        (["causal_lm", "--train_files=nowhere.txt"], "no file nowhere.txt"),
        (["causal_lm", "--dataset_name=nobody/nothing"], "cannot load dataset nobody/nothing"),
        (["causal_lm", "--lora_rank=-1"], "must not be negative"),
        (["causal_lm", "--model_package=nothing_here"], "no package nothing_here"),
        (["causal_lm", "--model_package=json", "--model_name_or_path=a"], "give one of them"),
        (["default", "--push_to_hub=true"], "give --task causal_lm"),
        (["causal_lm", "--block_size=1"], "leaves nothing to predict"),
    ],
)
def test_options_that_cannot_be_used(capsys, base, tmp_path, flags, expected):
    named = [] if any("model_name" in flag for flag in flags) or "package" in expected else [base]
    model = [f"--model_name_or_path={name}" for name in named]
    task, *flags = flags
    assert expected in refused(capsys, task, *model, *flags, f"--output_dir={tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--text_column=content"], "no column 'content'; --text_column is one of: ask, answer"),
        (["--prompt_column=ask", "--response_column=reply"], "--response_column is one of: ask, answer"),
        (["--text_column=answer", "--lora_rank=2", "--lora_target_modules=q_proj"], "c_attn, c_fc, c_proj"),
        (
            ["--text_column=answer", "--lora_rank=2", "--lora_target_modules", "c_fc", "q"],
            "--lora_target_modules q:",
        ),
        (["--text_column=answer", "--block_size=65"], "longer than the model's 64 positions"),
        (["--text_column=answer", "--validation_share=0.001"], "leaves a part empty"),
        (["--text_column=answer", "--optim=muonn"], "muonmax_momo"),
    ],
)
def test_data_and_model_that_do_not_fit(capsys, base, pairs, tmp_path, flags, expected):
    run = ["causal_lm", f"--model_name_or_path={base}", f"--train_files={pairs}", "--validation_share=0.2"]
    assert expected in refused(capsys, *run, *flags, f"--output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_models_that_are_none(capsys, texts, tmp_path):
    run = ["causal_lm", f"--train_files={texts}", f"--output_dir={tmp_path / 'out'}"]
    assert "cannot load the tokenizer" in refused(capsys, *run, f"--model_name_or_path={tmp_path}")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "a.csv").write_text("text\n1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n")
    numbers = ["causal_lm", f"--train_files={tmp_path / 'a.csv'}", f"--output_dir={tmp_path / 'out'}"]
    assert "cannot load" in refused(capsys, *numbers, f"--model_name_or_path={tmp_path}")


def test_broken_weights(capsys, base, texts, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    run = ["causal_lm", f"--train_files={texts}", f"--output_dir={tmp_path / 'out'}"]
    run.append(f"--model_name_or_path={tmp_path / 'base'}")
    for content in (weights.read_bytes()[:-500], b"not weights at all", b""):
        weights.write_bytes(content)
        assert "cannot load the model" in refused(capsys, *run)


@pytest.mark.parametrize("kept", [0.002, 0.6])
def test_a_truncated_gguf_file(capsys, tokenizer, texts, tmp_path, kept):
    write_gguf(tmp_path / "tiny.gguf", tokenizer)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content[: int(kept * len(content))])
    run = ["causal_lm", f"--train_files={texts}", f"--output_dir={tmp_path / 'out'}"]
    model = [f"--model_name_or_path={tmp_path}", "--gguf_file=tiny.gguf"]
    assert "cannot load the" in refused(capsys, *run, *model)


def test_an_output_folder_under_a_file(capsys, base, tmp_path):
    (tmp_path / "file").touch()
    run = [f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'file' / 'sub'}"]
    assert "file is a file" in refused(capsys, "default", *run)
    assert "file is a file" in refused(capsys, "causal_lm", *run)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_a_validation_file_without_rows(capsys, base, texts, tmp_path, kind):
    empty = tmp_path / f"empty.{kind}"
    empty.touch()
    run = ["causal_lm", f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'out'}"]
    message = refused(capsys, *run, f"--train_files={texts}", f"--validation_files={empty}")
    assert f"there are no rows in {empty}" in message


def test_labels_that_cannot_be_learnt(capsys, base, classes, tmp_path):
    odd = write_rows(tmp_path / "odd.jsonl", [{"text": "king", "label": "c"}, {"text": "king", "label": "a"}])
    run = ["classification", f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'out'}"]
    message = refused(capsys, *run, f"--train_files={classes}", f"--validation_files={odd}")
    assert "never occur in training: 'c' (1 rows)" in message
    assert "--max_train_rows" in message
    one = write_rows(tmp_path / "one.jsonl", [{"text": "king", "label": "a"}] * 40)
    assert "one class only, 'a'" in refused(capsys, *run, f"--train_files={one}")
    none = write_rows(
        tmp_path / "none.jsonl", [{"text": "k", "label": "a"}, {"text": "k", "label": None}] * 20
    )
    assert "have no label" in refused(capsys, *run, f"--train_files={none}")


def test_every_class_of_two_rows_is_held_out_by_its_share():
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 2 + [f"single {i}" for i in range(18)]
    dataset = datasets.Dataset.from_dict({"text": ["king"] * 100, "label": labels})
    args = ClassifyDataArguments(train_files=["a"], validation_share=0.1)
    kept, held_out = hold_out(dataset, args, "data")
    counts = Counter(held_out["label"])
    assert set(kept["label"]) == set(labels)
    assert counts["a"] in (5, 6)
    assert counts["b"] in (3, 4)
    assert len(held_out) == 10
    assert len(kept) == 90
    args.validation_share = 0.95  # more than the classes can spare
    kept, held_out = hold_out(dataset, args, "data")
    assert Counter(kept["label"]) == dict.fromkeys(set(labels), 1)


def test_scores_are_no_classes(capsys, base, tmp_path):
    run = ["classification", f"--model_name_or_path={base}", f"--output_dir={tmp_path / 'out'}"]
    for name, label in {
        "fractions": lambda i: i % 26 / 5,  # 26 of them, as in STS-B
        "numbers": lambda i: i // 2 * 3 + i % 2,
        "all different": lambda i: i + 0.5,
    }.items():
        rows = [{"text": f"king {i}", "label": label(i)} for i in range(100)]
        message = refused(capsys, *run, f"--train_files={write_rows(tmp_path / f'{name}.jsonl', rows)}")
        assert "choose another --label_column" in message


def test_label_columns_that_hold_no_classes():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    one = datasets.Dataset.from_dict({"text": ["king"] * 4, "label": [1] * 4}, features=features)
    with pytest.raises(ValueError, match="one class only, 'b'"):
        class_names(Corpus("data", one, one), "label")
    lists = datasets.Dataset.from_dict({"text": ["king"] * 2, "label": [[0, 1], [1, 1]]})
    args = ClassifyDataArguments(train_files=["a"])
    with pytest.raises(ValueError, match="not one value a row; choose another --label_column"):
        check_columns(lists, "data", args)


def test_empty_and_long_rows_are_counted(tmp_path, base, caplog):
    rows = [{"ask": "the king", "answer": "said " * (40 if i < 3 else 2)} for i in range(20)]
    rows += [{"ask": "a", "answer": ""}, {"ask": "a", "answer": None}, {"ask": "ask " * 90, "answer": "a"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = [*PROMPTS, f"--train_files={path}", f"--validation_files={path}", "--max_steps=1"]
    metrics = train(tmp_path / "out", base, "causal_lm", *flags)
    said = caplog.text
    assert "2 responses are empty" in said
    assert "4 of 21 sequences are longer than --block_size 48" in said
    assert "1 have no token left to learn" in said
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, BloomForCausalLM])
def test_the_sample_of_a_prompt_longer_than_the_context(tmp_path, base, tokenizer, capsys, model_class):
    """The last tokens of the prompt begin it; a model without positions takes the whole prompt."""
    if model_class is BloomForCausalLM:
        base = tmp_path / "bloom"
        BloomForCausalLM(
            BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
        ).save_pretrained(base)
        tokenizer.save_pretrained(base)
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"ask": "ask " * 90, "answer": "a"}, {"ask": "a", "answer": "b"}]
    )
    flags = [*PROMPTS, f"--train_files={rows}", f"--validation_files={rows}", "--packing=false"]
    train(tmp_path / "out", base, "causal_lm", *flags, "--max_steps=1", "--sample_tokens=20")
    shown = capsys.readouterr().out
    assert "Sample, from 'ask ask" in shown
    assert "before     after" in shown
    prompt = "ask " * 90 + "\n"
    assert (prompt in shown) == (model_class is BloomForCausalLM)
    assert tokenizer.decode(tokenizer(prompt)["input_ids"][-44:]) in shown


def test_a_file_without_anything_to_learn(capsys, base, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"ask": "the king", "answer": " "}] * 30)
    run = ["causal_lm", f"--model_name_or_path={base}", *PROMPTS, f"--output_dir={tmp_path / 'out'}"]
    assert "no row is left" in refused(capsys, *run, f"--train_files={path}")


# ---------------------------------------------------------------- files beside the recipe


def test_the_example_is_the_default_run():
    types = ARGUMENT_TYPES["finetune"]
    written = parse(["--config", str(RECIPES / "configs" / "finetune_docstrings.yaml")], types)
    default = parse(["--task=causal_lm", "--model_name_or_path=outputs/pretrain"], types)
    for *_, args in (written, default):
        presets.apply_preset(presets.FULL, args)
    for given, expected in zip(written, default, strict=True):
        differing = {key for key, value in vars(given).items() if value != vars(expected)[key]}
        assert differing <= {"output_dir", "logging_dir", "distributed_state"}


def test_every_run_of_the_suite_has_flags_that_exist():
    (suite,) = load_suites(RECIPES / "suites" / "finetune_mini.yaml")
    assert {run.options["lora_rank"] for run in suite.runs()} == {0, 8}
    for run in suite.runs():
        flags = as_arguments(recipe_flags(suite, run, processes=1))
        model_args, data_args, args = parse([*flags, "--use_cpu=true"], ARGUMENT_TYPES["finetune"])
        assert (args.learning_rate, data_args.task) == (run.learning_rate, "causal_lm")
        assert model_args.merges == (run.options["lora_rank"] > 0)
