"""A GPT in a DeepSpeed engine with compressed gradients: torchrun --nproc-per-node 2 examples/deepspeed_gpt.py

Settings are those of examples/deepspeed_gpt.json; another file may be named: deepspeed_gpt.py my_ds_config.json
"""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.ops  # noqa: E402

import commcomp.deepspeed  # noqa: E402
from gpt_model import GPT, GPTConfig  # noqa: E402
from stdlib_text import Batches, load_split  # noqa: E402


def main() -> None:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # DeepSpeed would compile its own reduction through shared memory, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, heads=4, width=128, context=64))
    config = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_suffix(".json"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = commcomp.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    text, _ = load_split()
    batches = Batches(text, batch=engine.train_micro_batch_size_per_gpu(), context=64, rank=engine.global_rank, seed=0)
    for step in range(100):
        tokens, targets = (part.to(engine.device) for part in batches.at(step))
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        if step % 20 == 19 and engine.global_rank == 0:
            ratio = engine.commcomp.stats()["gradient"]["ratio"]
            print(f"step {step + 1}: loss {loss.item():.3f}, {ratio:.1f} times fewer bytes of gradients")
    engine.save_checkpoint("outputs/deepspeed_gpt")
    engine.destroy()


if __name__ == "__main__":
    main()
