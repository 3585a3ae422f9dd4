"""Sizes of DeepSpeed checkpoints of a model that was trained, plain and by commcomp's engine, and the seconds of both.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.deepspeed_checkpoints          # 2 processes, 10 minutes on 2 cores

For every ZeRO stage in fp32 and bf16 a GPT over bytes is trained by AdamW; then the engine saves the same state in both
ways, three times each in turn, and plain DeepSpeed loads both. Bytes are of all files of a checkpoint, of all ranks.
Seconds are the median, from the call until it returns on rank 0; ours keeps its files with fsync, plain does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.record import RESULTS, ROOT, provenance

sys.path.insert(0, str(ROOT / "examples"))

from gpt_model import GPT, GPTConfig
from stdlib_text import Batches, load_split

STAGES, DTYPES, TIMES = (0, 1, 2, 3), ("fp32", "bf16"), 3


def make_engine(options: argparse.Namespace, stage: int, dtype: str) -> Any:
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=options.layers, heads=4, width=options.width, context=options.context))
    config = {
        "train_micro_batch_size_per_gpu": options.batch,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
    }
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, options: argparse.Namespace, rank: int) -> float:
    batches = Batches(load_split()[0], batch=options.batch, context=options.context, rank=rank, seed=0)
    loss = 0.0
    for step in range(options.steps):
        value = engine(*batches.at(step))
        engine.backward(value)
        engine.step()
        loss = value.item()
    return loss


def bytes_of(folder: Path) -> dict[str, int]:
    """By kind of file; scripts and `latest` left out."""
    found: dict[str, int] = {}
    for path in folder.rglob("*.pt"):
        kind = "optimizer" if "optim_states" in path.name else "model"
        found[kind] = found.get(kind, 0) + path.stat().st_size
    return found


def timed(work: Any) -> float:
    dist.barrier()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(options: argparse.Namespace, stage: int, dtype: str, rank: int, folder: Path) -> dict[str, Any]:
    from commcomp.deepspeed.checkpoints import attach_checkpoints

    engine, plain_engine = make_engine(options, stage, dtype), make_engine(options, stage, dtype)
    loss = train(engine, options, rank)
    save_plain = engine.save_checkpoint
    attach_checkpoints(engine)
    ours_engine = engine.checkpoint_engine
    seconds: dict[str, list[float]] = {"save plain": [], "save ours": [], "load plain": [], "load ours": []}
    for _ in range(TIMES):
        engine.checkpoint_engine = ours_engine._inner
        seconds["save plain"].append(timed(lambda: save_plain(folder / "plain", "t")))
        engine.checkpoint_engine = ours_engine
        seconds["save ours"].append(timed(lambda: engine.save_checkpoint(folder / "ours", "t")))
    for kind in ("plain", "ours") if stage < 3 else ():  # an engine of ZeRO-3 loads once
        work = partial(plain_engine.load_checkpoint, folder / kind, "t")
        seconds[f"load {kind}"] = [timed(work) for _ in range(TIMES)]
    sizes = {kind: bytes_of(folder / kind) for kind in ("plain", "ours")}
    totals = {kind: sum(found.values()) for kind, found in sizes.items()}
    return {
        "stage": stage,
        "dtype": dtype,
        "parameters": sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters()),
        "loss": loss,
        "bytes": sizes,
        "ratio": totals["plain"] / totals["ours"],
        "seconds": {name: round(median(values), 4) for name, values in seconds.items() if values},
    }


def worker(rank: int, options: argparse.Namespace, root: str) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    torch.set_num_threads(1)
    store = dist.FileStore(f"{root}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    rows = []
    for stage in STAGES:
        for dtype in DTYPES:
            rows.append(measure(options, stage, dtype, rank, Path(root) / f"{stage}-{dtype}"))
            if rank == 0:
                print(row_text(rows[-1]), flush=True)
    if rank == 0:
        Path(root, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def row_text(row: dict[str, Any]) -> str:
    totals = [sum(row["bytes"][kind].values()) / 1e6 for kind in ("plain", "ours")]
    seconds = "  ".join(f"{name} {value:.2f}" for name, value in row["seconds"].items())
    return (
        f"stage {row['stage']} {row['dtype']}  plain {totals[0]:7.2f} MB  ours {totals[1]:7.2f} MB  "
        f"ratio {row['ratio']:.3f}  loss {row['loss']:.3f}  {seconds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=RESULTS / "deepspeed_checkpoints.json")
    options = parser.parse_args()
    out, options.out = options.out, str(options.out)  # as JSON
    about = provenance(options)
    with tempfile.TemporaryDirectory() as root:
        torch.multiprocessing.spawn(worker, (options, root), nprocs=2)
        rows = json.loads(Path(root, "rows.json").read_text())
    out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
