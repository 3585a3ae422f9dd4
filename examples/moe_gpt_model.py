"""The GPT of the examples with a Mixture of Experts in every second block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from commcomp.moe import MoELayer, TokenCompressor
from gpt_model import GPT, Block, GPTConfig


@dataclass(frozen=True, kw_only=True)
class MoEGPTConfig(GPTConfig):
    """Shape of the model; the experts are as wide inside as the other blocks' MLP."""

    experts: int = 8
    top_k: int = 2
    capacity_factor: float | None = None


class MoEBlock(Block):
    """A block whose MLP is a layer of experts."""

    def __init__(
        self, config: MoEGPTConfig, number: int, compressor: TokenCompressor | None, layer_type: type[MoELayer]
    ) -> None:
        super().__init__(config)
        self.mlp = layer_type(
            config.width,
            4 * config.width,
            config.experts,
            config.top_k,
            capacity_factor=config.capacity_factor,
            compressor=compressor,
            seed=number,
        )
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.attended(x)
        made, self.balance_loss = self.mlp(self.mlp_norm(x))
        return x + made


class MoEGPT(GPT):
    """Experts in blocks 1, 3, ...; `make_compressor` is called for each of these."""

    def __init__(
        self,
        config: MoEGPTConfig,
        make_compressor: Callable[[], TokenCompressor | None],
        layer_type: type[MoELayer] = MoELayer,
    ) -> None:
        super().__init__(config)
        for number in range(1, config.layers, 2):
            block = MoEBlock(config, number, make_compressor(), layer_type)
            block.load_state_dict(self.blocks[number].state_dict(), strict=False)  # all but the MLP
            with torch.no_grad():
                for expert in block.mlp.experts.values():
                    expert.down.div_((2 * config.layers) ** 0.5)  # as the other blocks' MLP
            self.blocks[number] = block

    def moe_layers(self) -> list[MoELayer]:
        return [block.mlp for block in self.blocks if isinstance(block, MoEBlock)]

    def balance_loss(self) -> Tensor:
        """Of the forward pass just made, the mean over layers: 1 where all experts get as many tokens."""
        return torch.stack([block.balance_loss for block in self.blocks if isinstance(block, MoEBlock)]).mean()
