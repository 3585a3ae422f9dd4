"""The Hugging Face Trainer with compressed gradients: torchrun --nproc-per-node 2 examples/hf_trainer.py [fsdp2]"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from commcomp import LowRank
from commcomp.transformers import compress
from stdlib_text import load_split


def main() -> None:
    windows = torch.from_numpy(load_split()[0][: 64 * 800].reshape(-1, 64)).long()
    data = [{"input_ids": window, "labels": window} for window in windows]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    arguments = TrainingArguments(
        "runs/hf_trainer",
        use_cpu=True,
        fsdp="fsdp2" in sys.argv,
        max_steps=40,
        learning_rate=3e-3,
        logging_steps=10,
        save_steps=20,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=data)

    compression = compress(trainer, LowRank(rank=4))  # this line compresses the gradients

    trainer.train()  # resume_from_checkpoint=True goes on with the residuals
    if trainer.is_world_process_zero():
        stats = compression.state.stats()
        print(f"{stats['steps']} steps, {stats['ratio']:.1f} times fewer bytes")


if __name__ == "__main__":
    main()
