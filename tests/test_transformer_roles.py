"""Roles of matrices in transformers named as GPT-2, Llama, Qwen, BERT and this repository's own GPT name theirs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from commcomp.config import Dense, Sparse
from commcomp.synchronised_model import SynchronisedModel
from commcomp.transformer_roles import transformer_roles
from gpt_model import GPT, GPTConfig

WIDTH, VOCABULARY = 16, 50


def tree(paths: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module tree with parameters at these paths; numbered children in ModuleLists, *embed* and wte embeddings."""
    root = nn.Module()
    for path, shape in paths.items():
        *parents, last = path.split(".")
        module = root
        for index, part in enumerate(parents):
            if part not in module._modules:
                following = [*parents, last][index + 1]
                is_embedding = index == len(parents) - 1 and ("embed" in part or part in ("wte", "wpe"))
                child: nn.Module = nn.ModuleList() if following.isdigit() else nn.Module()
                module.add_module(part, nn.Embedding(*shape) if is_embedding else child)
            module = module._modules[part]
        if last not in module._parameters:
            module.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    return root


GPT2 = {
    "transformer.wte.weight": ((VOCABULARY, WIDTH), "embedding"),
    "transformer.wpe.weight": ((32, WIDTH), "embedding"),
    "transformer.h.0.ln_1.weight": ((WIDTH,), None),
    "transformer.h.0.attn.c_attn.weight": ((WIDTH, 3 * WIDTH), "attention"),
    "transformer.h.0.attn.c_proj.weight": ((WIDTH, WIDTH), "attention"),
    "transformer.h.0.mlp.c_fc.weight": ((WIDTH, 4 * WIDTH), "mlp"),
    "transformer.h.0.mlp.c_proj.weight": ((4 * WIDTH, WIDTH), "mlp"),
    "lm_head.weight": ((VOCABULARY, WIDTH), "head"),
}
LLAMA = {
    "model.embed_tokens.weight": ((VOCABULARY, WIDTH), "embedding"),
    **{f"model.layers.1.self_attn.{part}_proj.weight": ((WIDTH, WIDTH), "attention") for part in "qkvo"},
    "model.layers.1.self_attn.q_norm.weight": ((WIDTH,), None),
    **{f"model.layers.1.mlp.{part}_proj.weight": ((40, WIDTH), "mlp") for part in ("gate", "up", "down")},
    "model.layers.1.input_layernorm.weight": ((WIDTH,), None),
    "model.norm.weight": ((WIDTH,), None),
    "lm_head.weight": ((VOCABULARY, WIDTH), "head"),
}
QWEN_MOE = {
    "model.embed_tokens.weight": ((VOCABULARY, WIDTH), "embedding"),
    "model.layers.0.self_attn.q_proj.weight": ((WIDTH, WIDTH), "attention"),
    "model.layers.0.mlp.gate.weight": ((4, WIDTH), "other"),
    "model.layers.0.mlp.experts.3.down_proj.weight": ((WIDTH, 40), "mlp"),
    "model.layers.0.mlp.shared_expert.up_proj.weight": ((40, WIDTH), "mlp"),
}
BERT = {
    "bert.embeddings.word_embeddings.weight": ((VOCABULARY, WIDTH), "embedding"),
    "bert.encoder.layer.0.attention.self.query.weight": ((WIDTH, WIDTH), "attention"),
    "bert.encoder.layer.0.attention.output.dense.weight": ((WIDTH, WIDTH), "attention"),
    "bert.encoder.layer.0.intermediate.dense.weight": ((64, WIDTH), "mlp"),
    "bert.encoder.layer.0.output.dense.weight": ((WIDTH, 64), "mlp"),
    "bert.pooler.dense.weight": ((WIDTH, WIDTH), "other"),
}


@pytest.mark.parametrize("paths", [GPT2, LLAMA, QWEN_MOE, BERT], ids=["gpt2", "llama", "qwen moe", "bert"])
def test_roles_by_the_names_that_models_use(paths):
    model = tree({path: shape for path, (shape, _) in paths.items()})
    assert transformer_roles(model) == {path: role for path, (_, role) in paths.items() if role}


def test_the_example_and_torchs_own_layers():
    roles = transformer_roles(GPT(GPTConfig(layers=2, heads=2, width=32, context=16)))
    assert roles["blocks.1.qkv.weight"] == roles["blocks.0.proj.weight"] == "attention"
    assert roles["blocks.0.mlp.0.weight"] == roles["blocks.1.mlp.2.weight"] == "mlp"
    assert roles["token_embedding.weight"] == roles["position_embedding.weight"] == "embedding"
    encoder = transformer_roles(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2))
    assert encoder["layers.0.self_attn.in_proj_weight"] == encoder["layers.1.self_attn.out_proj.weight"] == "attention"
    assert encoder["layers.0.linear1.weight"] == encoder["layers.1.linear2.weight"] == "mlp"


def test_other_models_have_no_roles():
    assert transformer_roles(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8))) == {}


SETTINGS = {"start_step": 0, "residual_dtype": "fp32", "measure_every": 0, "strict": True, "seed": 0}


@pytest.mark.parametrize(
    ("layers", "compressed"),
    [
        ("transformer", {"embedding", "head", "mlp"}),
        ("transformer+attention", {"embedding", "head", "mlp", "attention"}),
        ("all", {"embedding", "head", "mlp", "attention", "other"}),
    ],
)
def test_sparse_takes_the_layers_it_is_told(layers, compressed):
    model = tree({path: shape for path, (shape, _) in BERT.items()})
    understood = SynchronisedModel(model, Sparse(layers=layers, dense_dtype="bf16"), None, SETTINGS)
    for name, role in transformer_roles(model).items():
        assert isinstance(understood.effective[name], Sparse) == (role in compressed), name
        assert role in compressed or understood.effective[name] == Dense("bf16")
    plain = SynchronisedModel(nn.Linear(64, 64), Sparse(layers=layers), None, SETTINGS)
    assert isinstance(plain.effective["weight"], Sparse)


def test_blocks_in_a_module_dict_and_a_padded_head():
    """As torchtitan builds its Llama; the head has more rows than the embedding."""
    paths = {"tok_embeddings.weight": (VOCABULARY, WIDTH), "output.weight": (VOCABULARY + 14, WIDTH)}
    paths |= {f"layers.0.attention.{name}.weight": (WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")}
    paths |= {f"layers.0.feed_forward.{name}.weight": (40, WIDTH) for name in ("w1", "w2", "w3")}
    model = tree(paths)
    model.layers = nn.ModuleDict(dict(model.layers.named_children()))
    roles = transformer_roles(model)
    assert {name for name, role in roles.items() if role == "attention"} == {n for n in paths if "attention" in n}
    assert {name for name, role in roles.items() if role == "mlp"} == {n for n in paths if "feed_forward" in n}
    assert roles["output.weight"] == "head"


def test_layers_without_attention_in_a_row_with_others_are_blocks():
    """As in models that mix state space layers and attention."""
    model = tree(
        {
            "layers.0.mamba.in_proj.weight": (64, WIDTH),
            "layers.0.feed_forward.gate_proj.weight": (40, WIDTH),
            "layers.1.self_attn.q_proj.weight": (WIDTH, WIDTH),
            "layers.1.feed_forward.gate_proj.weight": (40, WIDTH),
        }
    )
    assert list(transformer_roles(model).values()) == ["mlp", "mlp", "attention", "mlp"]
