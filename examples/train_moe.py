"""Train a small Mixture-of-Experts GPT, its experts dealt out over the ranks and its tokens compressed by commcomp.

    torchrun --standalone --nproc-per-node 2 examples/train_moe.py moe=lsh_int4 moe.lsh.rate=0.6
    torchrun --standalone --nproc-per-node 2 examples/train_moe.py moe=plain steps=100

Settings: configs/train_moe.yaml, training.yaml and configs/moe. Results are as of examples/train_gpt.py; `layers` in
result.json has what each MoE layer's compressor measured.
"""

from __future__ import annotations

from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commcomp import moe
from moe_gpt_model import MoEGPT, MoEGPTConfig
from train_gpt import Recipe, train
from train_setup import check_settings, distributed


@hydra.main(version_base=None, config_path="../configs", config_name="train_moe")
def main(config: DictConfig) -> None:
    check_settings(config)
    if config.parallel != "ddp":
        raise ValueError(f"parallel is {config.parallel!r}; expected ddp: the experts are sharded by themselves")
    with distributed(config.device, config.timeout_seconds) as place:
        train(config, place, recipe(config))


def recipe(config: DictConfig) -> Recipe:
    def objective(model: nn.Module, loss: Tensor) -> Tensor:
        return loss + config.balance_weight * model.balance_loss()

    return Recipe(make_model=make_model, objective=objective, clip=moe.clip_grad_norm_, layer_stats=layer_stats)


def make_model(config: DictConfig, layer_type: type[moe.MoELayer] = moe.MoELayer) -> MoEGPT:
    tokens = moe.MoEConfig.from_dict(OmegaConf.to_container(config.moe, resolve=True))
    model = MoEGPT(MoEGPTConfig(**config.model), lambda: moe.TokenCompressor.from_config(tokens), layer_type)
    # Experts are this rank's own: nobody to average their gradients with.
    own = moe.local_experts_of(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    return model


def layer_stats(model: nn.Module) -> dict[str, Any]:
    """Of each MoE layer: bytes, rate, residual (TokenCompressor.stats)."""
    return {f"moe_{number}": layer.compressor.stats() for number, layer in enumerate(model.moe_layers())}


if __name__ == "__main__":
    main()
