"""Engines of a small model that write and load real checkpoints; each function runs on every rank."""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from commcomp import GradientSync, LowRank
from tests.checkpoint.same_objects import assert_same_object

WIDTH = 160


class Model(nn.Module):
    """250 k parameters, one of which stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 300, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return nn.functional.cross_entropy(self.head(x[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_engine(rank: int, stage: int = 0, dtype: str = "fp32", seed: int = 0, **settings: Any) -> Any:
    """As deepspeed.initialize gives it, inside the group that there is."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()))
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(seed)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
        **settings,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), 1e-3), config=config)[0]


def train(engine: Any, steps: int, rank: int, seed: int = 0) -> list[float]:
    """The losses of a few steps on tokens of which each is told by the one before."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    losses = []
    for _ in range(steps):
        start = torch.randint(0, 300, (4, 1), generator=generator)
        loss = engine((start + 7 * torch.arange(24)) % 300)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def same_files(one: Path, other: Path) -> dict[str, tuple[int, int]]:
    """Both folders have the same files, which load as the same objects; their sizes, by name."""
    names = sorted(path.name for path in one.glob("*.pt"))
    assert names == sorted(path.name for path in other.glob("*.pt")) and names
    for name in names:
        loaded = [torch.load(folder / name, map_location="cpu", weights_only=False) for folder in (one, other)]
        assert_same_object(*loaded)
    return {name: (os.path.getsize(one / name), os.path.getsize(other / name)) for name in names}


def fp32_weights(folder: Path) -> Any:
    """What zero_to_fp32 makes of a checkpoint, or what it says that it cannot."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        return {key: value.clone() for key, value in get_fp32_state_dict_from_zero_checkpoint(folder, "t").items()}
    except Exception as error:
        return type(error).__name__


def every_stage(rank: int, root: str, cases: list[tuple[int, str]]) -> dict[str, Any]:
    """Of each (stage, dtype): sizes of (ours, plain), kinds of zero_to_fp32's results, stats; rest is asserted here."""
    from commcomp.deepspeed.checkpoints import CheckpointConfig, attach_checkpoints

    results = {}
    for stage, dtype in cases:
        folder = Path(root) / f"{stage}-{dtype}"
        ours, plain = folder / "ours", folder / "plain"
        engine = make_engine(rank, stage, dtype)
        train(engine, 4, rank)
        engine.save_checkpoint(plain, "t", client_state={"note": [1, torch.ones(3)]})
        writer = attach_checkpoints(engine, CheckpointConfig())
        engine.save_checkpoint(ours, "t", client_state={"note": [1, torch.ones(3)]})
        dist.barrier()
        sizes = same_files(ours / "t", plain / "t") if rank == 0 else {}
        continued = {}
        for name, saved in (("ours", ours), ("plain", plain)):
            other = make_engine(rank, stage, dtype, seed=1)  # a plain engine
            path, client_state = other.load_checkpoint(saved, "t" if name == "plain" else None)
            assert path is not None and client_state["note"][0] == 1
            continued[name] = train(other, 2, rank, seed=1)
            other.save_checkpoint(folder / f"after-{name}", "t")
        dist.barrier()
        kinds = []
        if rank == 0:
            same_files(folder / "after-ours" / "t", folder / "after-plain" / "t")
            for one, other in (("ours", "plain"), ("after-ours", "after-plain")):
                pair = fp32_weights(folder / one), fp32_weights(folder / other)
                assert_same_object(*pair)
                kinds.append(type(pair[0]).__name__)
        assert continued["ours"] == continued["plain"]
        results[f"{stage}-{dtype}"] = {"sizes": sizes, "fp32": kinds, "stats": writer.stats()}
    return results


class Bomb:
    """Ends the process when it is pickled for the second time: in the middle of a file."""

    def __init__(self) -> None:
        self.left = 2

    def __reduce__(self) -> Any:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return str, ("bomb",)


def killed_while_saving(rank: int, root: str) -> None:
    """One good checkpoint, and another that no rank finishes."""
    from commcomp.deepspeed.checkpoints import attach_checkpoints

    engine = make_engine(rank, 2)
    attach_checkpoints(engine)
    train(engine, 2, rank)
    engine.save_checkpoint(root, "good")
    train(engine, 2, rank)
    engine.optimizer.state_dict = lambda: {"bomb": Bomb(), "values": torch.randn(50_000)}
    engine.save_checkpoint(root, "never", client_state={"bomb": Bomb()})


def loaded_after_the_kill(rank: int, root: str) -> tuple[str, int, str]:
    """Also what an engine says when one rank's file is damaged then."""
    from commcomp.deepspeed.checkpoints import attach_checkpoints

    engine = make_engine(rank, 2)
    path, _ = engine.load_checkpoint(root)
    train(engine, 1, rank)
    if rank == 0:
        damaged = Path(root, "good", "zero_pp_rank_1_mp_rank_00_optim_states.pt")
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    attach_checkpoints(engine)
    try:
        engine.load_checkpoint(root)
    except Exception as error:
        return path, engine.global_steps, f"{type(error).__name__}: {error}"
    return path, engine.global_steps, ""


def make_sync() -> GradientSync:
    torch.manual_seed(3)
    return GradientSync(nn.Sequential(nn.Linear(90, 60), nn.Linear(60, 90)), LowRank(rank=2), measure_every=0)


def synchronise(sync: GradientSync, seed: int, steps: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    parameters = list(sync.parameters.values())
    means = []
    for _ in range(steps):
        buffer = torch.randn(sum(each.numel() for each in parameters), generator=generator)
        gradients = [
            piece.view_as(each) for piece, each in zip(buffer.split([p.numel() for p in parameters]), parameters)
        ]
        means.append(sync.reduce_bucket(buffer, parameters, gradients, first=True, last=True).wait().clone())
    return means


@contextmanager
def warned() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(each.message) for each in caught if "commcomp" in str(each.message)]


def residuals(rank: int, root: str) -> dict[str, Any]:
    """Saved on two ranks, and loaded on them in several ways."""
    from commcomp.checkpoint import SnapshotError
    from commcomp.deepspeed.checkpoints import CheckpointConfig, attach_checkpoints

    engine, plain, sync = make_engine(rank), make_engine(rank, seed=2), make_sync()
    original = type(plain).save_checkpoint
    writer = attach_checkpoints(engine, residual_state=sync)
    again = attach_checkpoints(engine, CheckpointConfig.from_dict({"mode": "lossless"}), residual_state=sync)
    assert again is writer and engine.checkpoint_engine is writer
    assert plain.save_checkpoint.__func__ is original and plain.checkpoint_engine is not writer
    synchronise(sync, 0)
    train(engine, 2, rank)
    engine.save_checkpoint(root)
    tag = Path(root) / (Path(root) / "latest").read_text()
    saved = {key: value.clone() for key, value in sync.state_dict().items()}
    mean = sync.state_dict(mean_residual=True)
    expected = synchronise(sync, 1)

    engine.load_checkpoint(root)
    assert_same_object(sync.state_dict(), saved)
    other = make_sync()
    attach_checkpoints(plain, residual_state=other)
    plain.load_checkpoint(root, load_module_only=True)
    plain.load_checkpoint(root, load_optimizer_states=False)
    assert plain.load_checkpoint(Path(root) / "nothing") == (None, None)
    assert other.step == 0
    plain.load_checkpoint(root)
    assert_same_object(other.state_dict(), saved)
    assert_same_object(synchronise(other, 1), expected)

    attach_checkpoints(engine, CheckpointConfig(save_residuals=False), residual_state=sync)
    engine.save_checkpoint(Path(root) / "without")
    with warned() as said:
        engine.load_checkpoint(Path(root) / "without")
    assert len(said) == 1 and "begin anew" in said[0], said
    assert all(not value.any() for key, value in sync.state_dict().items() if "/residual/" in key)

    dist.barrier()
    own = tag / f"commcomp_rank_{rank}.ccsnap"
    good = own.read_bytes()
    if rank == 1:
        own.write_bytes(good[:900] + b"!" + good[901:])
    dist.barrier()
    errors = []
    for strict in (True, False):
        attach_checkpoints(engine, strict=strict, residual_state=sync)
        with warned() as said:
            try:
                engine.load_checkpoint(root)
            except SnapshotError as error:
                said.append(str(error))
        errors += said
    dist.barrier()
    own.write_bytes(good)
    return {"mean": mean, "errors": errors, "stats": writer.stats()}


def refusals(rank: int, root: str) -> dict[str, str]:
    """What attaching says of engines that cannot be taken over, and saving where one rank cannot write."""
    from commcomp.deepspeed.checkpoints import CheckpointConfig, attach_checkpoints

    said = {}

    def note(name: str, work: Any) -> None:
        try:
            work()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    engine = make_engine(rank)
    torch_engine = engine.checkpoint_engine
    engine.checkpoint_engine = type("Background", (type(torch_engine),), {"is_decoupled": lambda self: True})()
    note("decoupled", lambda: attach_checkpoints(engine))
    engine.checkpoint_engine = type("OwnWriter", (type(torch_engine),), {"save": lambda self, state, path: None})()
    note("own writer", lambda: attach_checkpoints(engine))
    engine.checkpoint_engine = torch_engine
    note("different", lambda: attach_checkpoints(engine, CheckpointConfig(save_residuals=rank == 0)))
    note("no engine", lambda: attach_checkpoints(nn.Linear(2, 2)))
    attach_checkpoints(engine)
    engine.save_checkpoint(root, "first")
    note("unpicklable", lambda: engine.save_checkpoint(root, "second", client_state={"bad": lambda: None}))
    said["latest"] = (Path(root) / "latest").read_text()
    engine.save_checkpoint(root, "third", save_latest=False)
    said["still"] = (Path(root) / "latest").read_text()
    damaged = Path(root) / "third" / "mp_rank_00_model_states.pt"
    if rank == 0:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    note("damaged", lambda: engine.load_checkpoint(root, "third"))
    engine.save_16bit_model(root, "weights.bin")
    dist.barrier()
    note("weights", lambda: torch.load(Path(root) / "weights.bin", weights_only=False)["up.weight"].shape)
    return said


def snippet(rank: int, root: str) -> dict[str, Any]:
    """What docs/deepspeed_checkpoints.md shows."""
    page = Path(__file__).parents[2] / "docs" / "deepspeed_checkpoints.md"
    (source,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    scope: dict[str, Any] = {"engine": make_engine(rank), "folder": root}
    exec(compile(source, "deepspeed_checkpoints", "exec"), scope)
    return scope["writer"].stats()


def two_ranks(rank: int, roots: dict[str, str]) -> dict[str, Any]:
    """All that needs two ranks in one go: importing DeepSpeed takes longer than any of it."""
    return {
        "killed": loaded_after_the_kill(rank, roots["killed"]),
        "residuals": residuals(rank, roots["residuals"]),
        "refusals": refusals(rank, roots["refusals"]),
        "snippet": snippet(rank, roots["snippet"]),
    }


def residuals_on_one_rank(rank: int, root: str) -> dict[str, torch.Tensor]:
    from commcomp.deepspeed.checkpoints import attach_checkpoints

    engine, sync = make_engine(rank), make_sync()
    attach_checkpoints(engine, residual_state=sync)
    engine.load_checkpoint(root)
    return {key: value.clone() for key, value in sync.state_dict().items()}
