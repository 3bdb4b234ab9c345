"""What is a matrix, stated model by model on tiny instances of the real classes."""

import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from hf_noneuclid import NonEuclideanDescent
from hf_noneuclid.routing import Route, RoutingTable, route_parameters


def collapse(names):
    return {re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names}


def matrices(model, **options):
    return collapse(route.name for route in route_parameters(model, **options)[1].matrices)


def reason(model, name):
    return next(route.reason for route in route_parameters(model)[1].routes if route.name == name)


def gpt2_config(**options):
    return transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=6, **options)


def gpt2(**options):
    return transformers.GPT2LMHeadModel(gpt2_config(**options))


SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama_config(**options):
    return transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=11, **options)


def llama(**options):
    return transformers.LlamaForCausalLM(llama_config(**options))


def bert_config():
    return transformers.BertConfig(**SMALL, vocab_size=11, max_position_embeddings=6)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **SMALL,
        num_key_value_heads=2,
        head_dim=4,
        moe_intermediate_size=6,
        num_experts=3,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
        vocab_size=11,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def t5_config(**options):
    return transformers.T5Config(
        d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, vocab_size=11, **options
    )


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SMALL,
        vocab_size=7,
        conv_dim=(8, 8),
        conv_kernel=(4, 3),
        conv_stride=(2, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2ForCTC(config)


def lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=2, **options))


GPT2_HIDDEN = {
    "transformer.h.*.attn.c_attn.weight",
    "transformer.h.*.attn.c_proj.weight",
    "transformer.h.*.mlp.c_fc.weight",
    "transformer.h.*.mlp.c_proj.weight",
}
LLAMA_ATTENTION = {f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkvo"}
LLAMA_HIDDEN = LLAMA_ATTENTION | {f"model.layers.*.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
BERT_HIDDEN = {
    "encoder.layer.*.attention.self.query.weight",
    "encoder.layer.*.attention.self.key.weight",
    "encoder.layer.*.attention.self.value.weight",
    "encoder.layer.*.attention.output.dense.weight",
    "encoder.layer.*.intermediate.dense.weight",
    "encoder.layer.*.output.dense.weight",
}
BERT_POOLER = {"pooler.dense.weight"}
T5_HIDDEN = (
    {f"{stack}.block.*.layer.*.SelfAttention.{x}.weight" for stack in ("encoder", "decoder") for x in "qkvo"}
    | {f"decoder.block.*.layer.*.EncDecAttention.{x}.weight" for x in "qkvo"}
    | {
        f"{stack}.block.*.layer.*.DenseReluDense.w{x}.weight"
        for stack in ("encoder", "decoder")
        for x in "io"
    }
)


def under(prefix, names):
    return {f"{prefix}.{name}" for name in names}


# ---- Models


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_has_its_conv1ds_as_matrices_and_neither_embeddings_nor_head(tied):
    assert matrices(gpt2(tie_word_embeddings=tied)) == GPT2_HIDDEN


def test_tied_head_is_one_route_and_says_that_it_is_an_embedding():
    model = gpt2(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert reason(model, "transformer.wte.weight") == "input embedding"
    names = [route.name for route in route_parameters(model)[1].routes]
    assert len(names) == len(set(names)) == len(list(model.named_parameters()))
    assert "lm_head.weight" not in names


def test_untied_head_is_the_output_embedding():
    assert reason(gpt2(tie_word_embeddings=False), "lm_head.weight") == "output embedding"


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied):
    assert matrices(llama(tie_word_embeddings=tied)) == LLAMA_HIDDEN


def test_sequence_classification_head_of_llama_is_no_matrix():
    model = transformers.LlamaForSequenceClassification(llama_config(num_labels=3))
    assert matrices(model) == LLAMA_HIDDEN
    assert reason(model, "score.weight") == "head outside the base model"


def test_bare_base_model_has_the_same_matrices():
    assert under("transformer", matrices(transformers.GPT2Model(gpt2_config()))) == GPT2_HIDDEN


def test_moe_experts_are_stacks_and_routers_linear_maps():
    model = qwen3_moe()
    experts = {"model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"}
    norms_of_attention = {"model.layers.*.self_attn.q_norm.weight", "model.layers.*.self_attn.k_norm.weight"}
    assert model.model.layers[1].mlp.experts.gate_up_proj.shape == (3, 12, 8)
    assert matrices(model) == LLAMA_HIDDEN | experts | {"model.layers.*.mlp.gate.weight"}
    assert norms_of_attention <= collapse(name for name, _ in model.named_parameters())
    assert reason(model, "model.layers.1.mlp.experts.down_proj") == "stack of linear maps"
    assert reason(model, "model.layers.1.mlp.gate.weight") == "linear map"


@pytest.mark.parametrize("tied", [True, False])
def test_t5_has_neither_shared_embedding_nor_relative_biases_nor_head(tied):
    model = transformers.T5ForConditionalGeneration(t5_config(tie_word_embeddings=tied))
    assert any("relative_attention_bias" in name for name, _ in model.named_parameters())
    assert matrices(model) == T5_HIDDEN


def test_heads_of_t5_without_a_base_model_are_known_by_name():
    question_answering = transformers.T5ForQuestionAnswering(t5_config())
    classification = transformers.T5ForSequenceClassification(t5_config(num_labels=3))
    assert matrices(question_answering) == T5_HIDDEN
    assert matrices(classification) == under("transformer", T5_HIDDEN)


def test_bert_base_model_counts_its_pooler():
    assert matrices(transformers.BertModel(bert_config())) == BERT_HIDDEN | BERT_POOLER


@pytest.mark.parametrize(
    ("model_class", "hidden"),
    [
        (transformers.BertForSequenceClassification, BERT_HIDDEN | BERT_POOLER),
        (transformers.BertForQuestionAnswering, BERT_HIDDEN),
        (transformers.BertForMaskedLM, BERT_HIDDEN),
        (transformers.BertForPreTraining, BERT_HIDDEN | BERT_POOLER),
    ],
)
def test_bert_heads_are_no_matrices(model_class, hidden):
    assert matrices(model_class(bert_config())) == under("bert", hidden)


def test_vit_projects_patches_with_a_matrix():
    model = vit()
    # The names of its linear layers differ between versions of transformers.
    linear = {f"{name}.weight" for name, module in model.vit.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 6 * len(
        model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers
    )
    found = {route.name for route in route_parameters(model)[1].matrices}
    assert found == {f"vit.{name}" for name in linear | {"embeddings.patch_embeddings.projection.weight"}}
    assert reason(model, "vit.embeddings.patch_embeddings.projection.weight") == "convolution"
    assert reason(model, "vit.embeddings.position_embeddings") == "not a known linear map"
    assert reason(model, "classifier.weight") == "head outside the base model"


def test_layers_that_only_bear_the_name_of_a_base_model_leave_the_patches_inside():
    config = transformers.DINOv3ViTConfig(**SMALL, image_size=8, patch_size=4)
    model = transformers.DINOv3ViTModel(config)
    assert reason(model, "embeddings.patch_embeddings.weight") == "convolution"


def test_clip_classifier_is_a_head_known_by_name():
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(vision_config=vision, num_labels=3)
    model = transformers.CLIPForImageClassification(config)
    assert reason(model, "classifier.weight") == "head outside the base model"
    assert "vision_model.embeddings.patch_embedding.weight" in matrices(model)


def test_wav2vec2_convolutions_are_flattened_and_no_weight_norm_is_a_stack_of_matrices():
    groups, table = route_parameters(wav2vec2())
    flattened = {name for group in groups if group.get("flatten") for name, _ in group["params"]}
    assert flattened == {f"wav2vec2.feature_extractor.conv_layers.{i}.conv.weight" for i in (0, 1)}
    names = {route.name for route in table.matrices} - flattened
    attention = {f"wav2vec2.encoder.layers.*.attention.{x}_proj.weight" for x in ("k", "v", "q", "out")}
    feed_forward = {
        f"wav2vec2.encoder.layers.*.feed_forward.{x}_dense.weight" for x in ("intermediate", "output")
    }
    assert collapse(names) == attention | feed_forward | {"wav2vec2.feature_projection.projection.weight"}


def test_encoder_decoder_of_two_models_has_no_head_of_the_inner_decoder():
    encoder = transformers.BertModel(bert_config())
    decoder_config = bert_config()
    decoder_config.is_decoder = decoder_config.add_cross_attention = True
    decoder = transformers.BertLMHeadModel(decoder_config)
    names = matrices(transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder))
    assert under("encoder", BERT_HIDDEN) < names
    assert under("decoder.bert", BERT_HIDDEN) < names
    assert not any(name.startswith("decoder.cls") for name in names)


# ---- PEFT

LORA_C_ATTN = {f"base_model.model.transformer.h.*.attn.c_attn.lora_{x}.default.weight" for x in "AB"}


def test_lora_factors_are_matrices_and_the_base_is_frozen():
    model = lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    table = route_parameters(model)[1]
    assert collapse(route.name for route in table.matrices) == LORA_C_ATTN
    assert not table.vectors
    assert len(table.frozen) == len(list(gpt2().parameters()))


def test_classifier_saved_beside_lora_is_a_head():
    config = llama_config(num_labels=3)
    config.pad_token_id = 0
    model = lora(
        transformers.LlamaForSequenceClassification(config),
        target_modules=["q_proj"],
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    table = route_parameters(model)[1]
    prefix = "base_model.model"
    assert collapse(route.name for route in table.matrices) == {
        f"{prefix}.model.layers.*.self_attn.q_proj.lora_{x}.default.weight" for x in "AB"
    }
    assert [(route.name, route.reason) for route in table.vectors] == [
        (f"{prefix}.score.modules_to_save.default.weight", "head outside the base model")
    ]


def test_embedding_and_head_saved_beside_lora_are_vectors():
    model = lora(
        llama(tie_word_embeddings=False),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    assert {(route.name, route.reason) for route in route_parameters(model)[1].vectors} == {
        ("base_model.model.model.embed_tokens.modules_to_save.default.weight", "embedding"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "output embedding"),
    }


def test_hidden_layer_saved_beside_lora_is_a_matrix():
    model = lora(llama(), target_modules=["q_proj"], modules_to_save=["up_proj"])
    assert "base_model.model.model.layers.*.mlp.up_proj.modules_to_save.default.weight" in matrices(model)


def test_lora_of_an_embedding_or_a_head_goes_with_what_it_adapts():
    model = lora(llama(tie_word_embeddings=False), target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert {(route.name, route.reason) for route in route_parameters(model)[1].vectors} == {
        *((f"base_model.model.model.embed_tokens.lora_embedding_{x}.default", "embedding") for x in "AB"),
        *((f"base_model.model.lm_head.lora_{x}.default.weight", "output embedding") for x in "AB"),
    }


def test_adalora_factors_are_matrices_and_its_singular_values_are_not():
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=3, target_r=2, total_step=10)
    table = route_parameters(peft.get_peft_model(llama(), config))[1]
    leaves = {(route.name.split(".")[-2], route.kind) for route in (*table.matrices, *table.vectors)}
    assert leaves == {("lora_A", "matrix"), ("lora_B", "matrix"), ("lora_E", "vector")}


def test_prompt_encoder_beside_the_wrapped_model_is_no_head_of_it():
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8)
    table = route_parameters(peft.get_peft_model(gpt2(), config))[1]
    assert {route.name for route in table.matrices} == {
        f"prompt_encoder.default.mlp_head.{i}.weight" for i in (0, 2, 4)
    }
    assert ("prompt_encoder.default.embedding.weight", "embedding") in {
        (route.name, route.reason) for route in table.vectors
    }


# ---- Modules that are not of transformers


class Torch(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(5, 4)
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm((3, 4))
        self.recurrent = nn.LSTM(4, 4)
        self.bottleneck = nn.Linear(4, 1)


def test_raw_parameters_are_matrices_only_if_known_as_linear_maps():
    assert matrices(Torch()) == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "bottleneck.weight",
    }


def test_get_output_embeddings_tells_the_head_of_a_plain_module():
    class Model(nn.Sequential):
        def get_output_embeddings(self):
            return self[2]

    table = route_parameters(Model(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)))[1]
    assert [route.name for route in table.matrices] == ["1.weight"]


def test_linear_tied_to_an_embedding_that_no_getter_returns_is_a_vector():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(4, 4), nn.Embedding(5, 4))
    model[2].weight = model[0].weight
    assert [route.name for route in route_parameters(model)[1].matrices] == ["1.weight"]


def test_linear_tied_to_a_table_is_a_vector():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(4, 4))
    model.position_table = model[0].weight
    assert [route.name for route in route_parameters(model)[1].matrices] == ["1.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_a_convolution_or_linear_map_is_no_matrix():
    convolution, linear = nn.utils.weight_norm(nn.Conv1d(3, 4, 2)), nn.utils.weight_norm(nn.Linear(4, 4))
    assert matrices(nn.Sequential(convolution, linear, nn.Linear(4, 4))) == {"*.weight"}


def test_two_linears_that_share_a_weight_are_one_matrix():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    groups, table = route_parameters(model)
    assert [name for group in groups for name, _ in group["params"]] == ["0.weight"]
    assert len(table.routes) == 1


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_convolutions_stand_in_a_group_to_be_flattened(convolution):
    model = nn.Sequential(convolution(2, 3, 2), nn.Linear(3, 3))
    groups, _ = route_parameters(model)
    flattened = [[name for name, _ in group["params"]] for group in groups if group.get("flatten")]
    assert flattened == [["0.weight"]]
    assert all(group["flatten"] is True for group in groups if "flatten" in group)


def test_stack_of_experts_is_not_flattened():
    groups, _ = route_parameters(qwen3_moe())
    assert not any("flatten" in group for group in groups)


# ---- Groups


@pytest.mark.parametrize("build", [gpt2, llama, qwen3_moe, vit, wav2vec2, Torch])
def test_every_trainable_parameter_is_in_exactly_one_group(build):
    model = build()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    decayed = [name for name, _ in model.named_parameters()][::2]
    groups, table = route_parameters(model, weight_decay=0.1, decay_parameters=decayed)
    grouped = [named for group in groups for named in group["params"]]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(grouped) == len(trainable)
    assert all(trainable[name] is parameter for name, parameter in grouped)
    assert all(group["params"] for group in groups)
    assert [route.name for route in table.routes] == [name for name, _ in model.named_parameters()]


def test_groups_agree_with_the_table():
    groups, table = route_parameters(vit(), vector_norm="linf")
    by_norm = {"spectral": set(), "linf": set()}
    for group in groups:
        by_norm[group["norm"]] |= {name for name, _ in group["params"]}
    assert by_norm["spectral"] == {route.name for route in table.matrices}
    assert by_norm["linf"] == {route.name for route in table.vectors}


def test_weight_decay_reaches_exactly_the_decay_parameters():
    model = vit()
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    groups, _ = route_parameters(model, weight_decay=0.1, decay_parameters=decayed)
    got = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert got == {name: 0.1 if name in decayed else 0.0 for name in got}
    assert len(groups) == 4  # linear maps, convolutions, vectors with and without decay


def test_weight_decay_reaches_everything_by_default():
    groups, _ = route_parameters(gpt2(), weight_decay=0.1)
    assert [(group["norm"], group["weight_decay"]) for group in groups] == [
        ("spectral", 0.1),
        ("ada_l2", 0.1),
    ]


def test_no_decay_parameter_means_no_decay():
    groups, _ = route_parameters(gpt2(), weight_decay=0.1, decay_parameters=[])
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_only_matrices_have_the_matrix_lr_scale():
    groups, _ = route_parameters(vit(), matrix_lr_scale=10.0)
    assert {(group["norm"], group["lr_scale"]) for group in groups} == {("spectral", 10.0), ("ada_l2", 1.0)}


def test_torch_accepts_the_groups():
    groups, _ = route_parameters(vit())
    optimizer = torch.optim.SGD(groups, lr=0.1)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {name for name, _ in vit().named_parameters()}


def test_frozen_parameters_are_counted_and_nothing_else():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    groups, table = route_parameters(model)
    assert [route.name for route in table.frozen] == ["model.embed_tokens.weight"]
    assert table.counts["frozen"] == (1, 11 * 8)
    assert "model.embed_tokens.weight" not in {name for group in groups for name, _ in group["params"]}


# ---- Target modules


def test_target_modules_as_a_list_are_parts_of_names():
    assert matrices(gpt2(), target_modules=["attn"]) == {name for name in GPT2_HIDDEN if ".attn." in name}


def test_target_modules_in_a_list_may_be_whole_regular_expressions():
    assert matrices(gpt2(), target_modules=["mlp.c_fc", r".*\.c_at+n"]) == {
        "transformer.h.*.mlp.c_fc.weight",
        "transformer.h.*.attn.c_attn.weight",
    }


def test_target_modules_as_a_string_is_a_regular_expression_for_the_whole_name():
    _, table = route_parameters(gpt2(), target_modules=r".*\.0\.mlp\.c_(fc|proj)")
    assert {route.name for route in table.matrices} == {
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    }
    with pytest.raises(ValueError, match="'mlp' matches no module"):
        route_parameters(gpt2(), target_modules="mlp")


def test_target_modules_agree_with_transformers():
    from transformers.trainer_utils import check_target_module_exists

    model = llama()
    for target in (["attn"], ["q_proj", "mlp"], r".*\.1\..*", [r".*layers\.0.*_proj"]):
        expected = {
            f"{path}.weight"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and check_target_module_exists(target, path)
        }
        assert {
            route.name for route in route_parameters(model, target_modules=target)[1].matrices
        } == expected


@pytest.mark.parametrize("target", ["all-linear", "all_linear"])
def test_all_linear_is_every_linear_map_but_the_output_embedding(target):
    assert matrices(gpt2(), target_modules=target) == GPT2_HIDDEN
    assert matrices(llama(tie_word_embeddings=False), target_modules=target) == LLAMA_HIDDEN
    classifier = transformers.BertForSequenceClassification(bert_config())
    expected = under("bert", BERT_HIDDEN | BERT_POOLER) | {"classifier.weight"}
    assert matrices(classifier, target_modules=target) == expected


def test_everything_else_is_a_vector_beside_target_modules():
    _, table = route_parameters(gpt2(), target_modules=["c_fc"])
    assert {route.reason for route in table.vectors} == {"not a target module", "fewer than two dimensions"}
    assert table.counts["matrix"][0] + table.counts["vector"][0] == len(list(gpt2().parameters()))


def test_embedding_may_be_targeted():
    assert matrices(gpt2(), target_modules=["wpe"]) == {"transformer.wpe.weight"}


def test_experts_and_convolutions_may_be_targeted():
    assert matrices(qwen3_moe(), target_modules=["experts"]) == {
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
    }
    groups, _ = route_parameters(vit(), target_modules=["patch_embeddings"])
    assert [group["norm"] for group in groups if group.get("flatten")] == ["spectral"]


@pytest.mark.parametrize("target", [["c_fc", "nowhere"], ["ln_1"], r"nowhere.*"])
def test_target_that_matches_nothing_is_an_error_that_names_modules(target):
    with pytest.raises(
        ValueError, match=r"optim_target_modules: .* such as .*transformer\.h\.\*\.attn\.c_attn"
    ):
        route_parameters(gpt2(), target_modules=target)


# ---- Refusals


def test_no_matrix_is_an_error_that_says_what_was_found_and_what_to_do():
    with pytest.raises(
        ValueError, match=r"1 x embedding, 1 x fewer than two dimensions.*optim_target_modules"
    ):
        route_parameters(nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4, affine=False), nn.PReLU()))


def test_model_that_is_frozen_has_no_matrix():
    with pytest.raises(ValueError, match="does not require a gradient"):
        route_parameters(gpt2().requires_grad_(False))


@pytest.mark.parametrize("product_norm", ["linf", "l2", "hybrid"])
def test_none_makes_every_parameter_a_vector_and_trains(product_norm):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    groups, table = route_parameters(model, target_modules="none")
    assert [group["norm"] for group in groups] == ["ada_l2"]
    assert len(table.vectors) == 4
    options = {"descent": "constrained", "product_norm": product_norm, "step_size": "momo+slope"}
    optimizer = NonEuclideanDescent(groups, 1.0, **options)
    xs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(xs) - xs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    with pytest.raises(ValueError, match="say 'none' there to step all as vectors"):
        route_parameters(nn.Sequential(nn.Embedding(5, 4)))


def test_empty_target_modules_leave_no_matrix():
    with pytest.raises(ValueError, match="no trainable matrix"):
        route_parameters(gpt2(), target_modules=[])


def test_zero3_shapes_are_those_before_partitioning():
    model = gpt2()
    expected = [(route.name, route.kind, route.shape) for route in route_parameters(model)[1].routes]
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    _, table = route_parameters(model)
    assert [(route.name, route.kind, route.shape) for route in table.routes] == expected
    assert matrices(model, target_modules=["attn"]) == {name for name in GPT2_HIDDEN if ".attn." in name}


def test_fsdp1_is_refused_in_favour_of_fsdp2():
    from torch.distributed.fsdp import FullyShardedDataParallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inner = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
        with pytest.raises(ValueError, match=r"FSDP1.*flattens.*fsdp_version: 2"):
            route_parameters(nn.Sequential(inner))
    finally:
        torch.distributed.destroy_process_group()


def test_fsdp2_routes_like_the_bare_model():
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = gpt2(tie_word_embeddings=False)
        for layer in model.transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert route_parameters(model)[1] == route_parameters(gpt2(tie_word_embeddings=False))[1]
    finally:
        torch.distributed.destroy_process_group()


def test_routing_imports_without_transformers():
    source = Path(__file__).parent.parent / "hf_noneuclid" / "routing.py"
    script = (
        "import runpy, sys; sys.modules['transformers'] = None; "
        f"route = runpy.run_path({str(source)!r})['route_parameters']; "
        "from torch import nn; assert len(route(nn.Linear(3, 3))[0]) == 2"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# ---- The table


def test_table_counts_tensors_and_elements():
    table = RoutingTable(
        (
            Route("a", (3, 4), "matrix", "linear map"),
            Route("b", (2, 3, 4), "matrix", "stack of linear maps"),
            Route("c", (), "vector", "fewer than two dimensions"),
            Route("d", (5,), "frozen", "does not require a gradient"),
        )
    )
    assert table.counts == {"matrix": (2, 36), "vector": (1, 1), "frozen": (1, 5)}


def test_table_has_one_row_a_pattern_of_names_and_then_the_totals():
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    rows = [re.split(r"\s{2,}", row) for row in str(route_parameters(model)[1]).splitlines()]
    assert ["transformer.h.*.attn.c_attn.weight", "(8, 24)", "x2", "matrix", "linear map"] in rows
    assert ["transformer.wte.weight", "(11, 8)", "x1", "vector", "input embedding"] in rows
    assert not any(row[0] == "transformer.wpe.weight" for row in rows)
    assert len(rows) == 1 + 12 + 2 + 1  # wte, a layer, the last norm, the totals
    assert rows[-1][0].split("; ") == [
        "matrices: 8 tensors, 1,536 elements",
        "vectors: 19 tensors, 312 elements",
        "frozen: 1 tensors, 48 elements",
    ]


def test_table_is_as_long_for_a_deep_model_as_for_a_shallow_one():
    shallow = str(route_parameters(transformers.GPT2Model(gpt2_config()))[1])
    deep_config = gpt2_config()
    deep_config.n_layer = 12
    deep = str(route_parameters(transformers.GPT2Model(deep_config))[1])
    assert len(deep.splitlines()) == len(shallow.splitlines())


def test_table_without_anything_trainable_is_only_totals():
    assert str(RoutingTable(())) == (
        "matrices: 0 tensors, 0 elements; vectors: 0 tensors, 0 elements; frozen: 0 tensors, 0 elements"
    )
