"""The smallest use of commcomp: torchrun --nproc-per-node 2 examples/minimal_ddp.py (or plain python)."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commcomp


def main() -> None:
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    torch.manual_seed(0)
    teacher = nn.Linear(64, 16)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 16)))

    state = commcomp.GradientSync(model, commcomp.LowRank(rank=4))
    model.register_comm_hook(state, commcomp.comm_hook)  # this line compresses the gradients

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(dist.get_rank())  # other data on every rank
    for step in range(1, 201):
        x = torch.randn(32, 64)
        loss = nn.functional.mse_loss(model(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}, {state.stats()['ratio']:.1f} times fewer bytes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
