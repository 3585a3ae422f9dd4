"""accelerate with compressed gradients: torchrun --nproc-per-node 2 examples/accelerate_ddp.py (GPUs: ... fsdp2)"""

import sys
import tempfile

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn

from commcomp import LowRank
from commcomp.accelerate import compress


def main() -> None:
    fsdp2 = "fsdp2" in sys.argv  # accelerate shards on GPUs only
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True) if fsdp2 else None
    accelerator = Accelerator(cpu=not fsdp2, fsdp_plugin=plugin)
    torch.manual_seed(0)
    teacher = nn.Linear(64, 16).to(accelerator.device)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 16))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=3e-3))

    state = compress(accelerator, model, LowRank(rank=4))  # this line compresses the gradients

    torch.manual_seed(accelerator.process_index)  # other data on every rank
    for step in range(1, 201):
        x = torch.randn(32, 64, device=accelerator.device)
        loss = nn.functional.mse_loss(model(x), teacher(x))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}, {state.stats()['ratio']:.1f} times fewer bytes")
    accelerator.save_state(tempfile.gettempdir() + "/commcomp_accelerate")  # residuals too; load_state reads them
    accelerator.end_training()


if __name__ == "__main__":
    main()
