"""Times ways of reducing the gradients of DeepSpeed engines of one ZeRO stage in turn; started by deepspeed_steps.py.

Every way has its own engine and model in one process group. Rank 0 writes the raw figures of every block as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn

# It would reduce through shared memory, over no link at all, after minutes of compiling.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import commcomp.deepspeed  # noqa: E402
from benchmarks.timed_blocks import Contender, alternate  # noqa: E402
from commcomp.telemetry.environment import machine  # noqa: E402
from gpt_model import GPT, GPTConfig  # noqa: E402
from stdlib_text import Batches, load_split  # noqa: E402

NOTHING = "no reduction"
GRADIENTS: dict[str, dict[str, Any] | None] = {
    NOTHING: None,
    "plain fp32": None,
    "communication_data_type fp16": None,
    "commcomp rank 4 int8": {"method": "low_rank", "rank": 4, "factor_dtype": "int8"},
    "commcomp rank 16 int8": {"method": "low_rank", "rank": 16, "factor_dtype": "int8"},
    "commcomp 4 bits": {"method": "quantized", "bits": 4, "rotate": True},
}


class EngineContender(Contender):
    """A way of reducing gradients."""

    def __init__(self, name: str, stage: int, batches: Batches, batch: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self._batches, self._batch = name, batches, 0
        model = GPT(GPTConfig())
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": batch,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1000000,
        }
        if name.startswith("communication_data_type"):
            config["communication_data_type"] = name.split()[-1]
        gradient = GRADIENTS[name]
        if gradient is not None:
            config["commcomp"] = {"gradient": {**gradient, "measure_every": 0}}
        make = deepspeed.initialize if gradient is None else commcomp.deepspeed.initialize
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.engine, *_ = make(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        self._ours = gradient is not None
        if name == NOTHING:
            leave_unreduced(self.engine, stage)

    def step(self) -> None:
        tokens, targets = self._batches.at(self._batch)
        self._batch += 1
        self.engine.backward(self.engine(tokens, targets))
        self.engine.step()

    def counted_bytes(self) -> float:
        """Of gradients; DeepSpeed's own are not counted."""
        return self.engine.commcomp.gradients.stats()["wire_bytes"] if self._ours else 0.0


def leave_unreduced(engine: Any, stage: int) -> None:
    """Let every rank go on with its own gradients, so that only parameters are sent: the limit."""
    optimizer = engine.optimizer
    if stage == 0:
        engine.buffered_allreduce_fallback = lambda *arguments, **keywords: None
    elif stage < 3:
        optimizer.reduce_scatter = False
        optimizer.gradient_reduction_w_predivide = lambda tensor, dtype: tensor
    else:
        rank = dist.get_rank()

        def own_pieces(parameters: list[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
            pieces = []
            for parameter in parameters:
                size = parameter.partition_numel()
                piece = parameter.grad.flatten()[rank * size : (rank + 1) * size]
                pieces.append(nn.functional.pad(piece, (0, size - len(piece))))
            return pieces

        optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = own_pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", required=True)
    for name in ("stage", "batch", "window", "rounds", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    deepspeed.init_distributed("gloo")
    text, _ = load_split()
    batches = Batches(text, batch=options.batch, context=options.window, rank=dist.get_rank(), seed=0)
    contenders = [EngineContender(name, options.stage, batches, options.batch) for name in options.methods]
    alternate(contenders, rounds=options.rounds, steps=options.steps, first=3)
    if dist.get_rank() == 0:
        shapes = [getattr(value, "ds_shape", value.shape) for value in contenders[0].engine.module.parameters()]
        blocks = {contender.name: contender.blocks for contender in contenders}
        parameters = sum(torch.Size(shape).numel() for shape in shapes)
        options.out.write_text(json.dumps({"machine": machine(), "parameters": parameters, "blocks": blocks}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
