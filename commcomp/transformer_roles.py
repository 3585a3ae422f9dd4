"""What each matrix of a transformer is for, told from the module tree: for methods that treat layers differently.

TAGC (arXiv:2504.05638) compresses the MLP matrices, the embeddings and the head, and leaves attention alone: it is
small, and every message has a price.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from commcomp.module_tree import find_ddp, plain_name

EMBEDDING, HEAD, MLP, ATTENTION, OTHER = "embedding", "head", "mlp", "attention", "other"

_ATTENTION = re.compile(
    r"attn|attention|^(w?[qkvo]|qkv|query|key|value|out)(_proj|_lin|_[ab]_proj|_a_proj_with_mqa)?$|^(kv|qkv)_proj$"
)
_MLP = re.compile(
    r"mlp|ffn|ff\b|feed_?forward|expert|moe|^fc|^c_fc$|^(gate|up|down|gate_up)_proj$|^w[123]$|^lin[12]$|^dense_"
)
_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
_ROUTER = re.compile(r"^(gate|router|wg|gating)$")
_ROUTER_RATIO = 4
"""Of its longer to its shorter side, the number of experts; a gated MLP's gate is nearer to a square."""
_HEAD = re.compile(r"(^|_)head$|^output$|^unembed|^embed_out$")


def transformer_roles(model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """The role of every parameter of two dimensions and more, by plain name; empty if no transformer block is found.

    `parameters`: by plain name, where the model's own have lost their names and shapes (FSDP1); only shapes are read.

    A block is an entry of a ModuleList, ModuleDict or Sequential that holds attention, or of a ModuleList or ModuleDict
    one of whose entries does (mixed models). In a block, a matrix under an attention module (or named like one: q_proj,
    qkv, ...) is attention, unless it is under an MLP; an MLP's router is neither; all others are MLP. Outside,
    nn.Embedding weights are embeddings, and matrices that are named like a head, or have as many rows or columns as an
    embedding, are heads.
    """
    wrapper = find_ddp(model)
    module = model if wrapper is None else wrapper.module
    modules = list(module.named_modules())
    kinds = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    lists = [(name, child) for name, child in modules if isinstance(child, kinds)]
    blocks = [plain_name(block) for name, child in lists for block in _blocks(name, child)]
    if not blocks:
        return {}
    embeddings = {
        plain_name(f"{name}.weight".lstrip(".")): child.num_embeddings
        for name, child in modules
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag))
    }
    if parameters is None:
        parameters = {plain_name(name): parameter for name, parameter in module.named_parameters()}
    roles = {}
    for name, parameter in parameters.items():
        if parameter.dim() < 2:
            continue
        inside = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if inside is not None:
            roles[name] = _role_in_block(name[len(inside) + 1 :].split(".")[:-1], parameter.shape)
        elif name in embeddings:
            roles[name] = EMBEDDING
        else:
            module_name = name.split(".")[-2] if "." in name else ""
            named = _HEAD.search(module_name.lower()) is not None
            roles[name] = HEAD if named or set(parameter.shape) & set(embeddings.values()) else OTHER
    return roles


def _blocks(name: str, container: nn.Module) -> list[str]:
    """The entries of a container that hold attention somewhere inside, and what stands in a row with them."""
    holds = {
        f"{name}.{entry}".lstrip("."): any(_is_attention(path.split(".")) for path, _ in child.named_modules() if path)
        for entry, child in container.named_children()
    }
    all_alike = not isinstance(container, nn.Sequential) and any(holds.values())
    return [entry for entry, found in holds.items() if found or all_alike]


def _is_attention(path: list[str]) -> bool:
    return any(_ATTENTION.search(part.lower()) and not _NORM.search(part) for part in path)


def _role_in_block(path: list[str], shape: torch.Size) -> str:
    for part in path:  # the outermost name that says anything decides
        lower = part.lower()
        if _MLP.search(lower):
            is_router = _ROUTER.search(path[-1].lower()) and max(shape) >= _ROUTER_RATIO * min(shape)
            return OTHER if is_router else MLP
        if _ATTENTION.search(lower) and not _NORM.search(lower):
            return ATTENTION
    return ATTENTION if path[-1:] in (["proj"], ["c_proj"]) else MLP
