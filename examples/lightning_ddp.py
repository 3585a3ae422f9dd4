"""Lightning with compressed gradients and checkpoints: torchrun --nproc-per-node 2 examples/lightning_ddp.py"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from commcomp import LowRank
from commcomp.lightning import Compression, SnapshotIO
from stdlib_text import load_split


class NextByte(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(8 * 64, 256)
        self.net = nn.Sequential(nn.Embedding(256, 64), nn.Flatten(), hidden, nn.GELU(), nn.Linear(256, 256))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    windows = torch.from_numpy(load_split()[0][: 9 * 6400].reshape(-1, 9)).long()
    data = DataLoader(TensorDataset(windows[:, :8], windows[:, 8]), batch_size=64)
    torch.manual_seed(0)
    compression = Compression(LowRank(rank=4))
    add_ons = {"callbacks": [compression], "plugins": [SnapshotIO()]}  # what commcomp adds
    trainer = Trainer(strategy="ddp", accelerator="cpu", devices=2, max_epochs=2, enable_progress_bar=False, **add_ons)
    trainer.fit(NextByte(), data)  # ckpt_path="last" resumes
    loss, stats = trainer.callback_metrics["loss"], compression.state.stats()
    if trainer.is_global_zero:
        print(f"step {trainer.global_step}: loss {loss:.4f}, {stats['ratio']:.1f} times fewer bytes")
