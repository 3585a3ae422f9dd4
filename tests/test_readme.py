"""The Python and the diff in README.md and docs/ do what they show."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(96, 128), nn.Linear(128, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x).relu())


def _run_snippet(rank: int, source: str, folder: str, steps_after: int) -> tuple[float, int]:
    import commcomp

    torch.manual_seed(0)
    model = DistributedDataParallel(Named())
    scope = {"model": model, "folder": folder}
    if "GradientSync(" not in source:
        scope["state"] = commcomp.GradientSync(model, commcomp.LowRank(rank=2))
        model.register_comm_hook(scope["state"], commcomp.comm_hook)
    exec(compile(source, "README", "exec"), scope)
    model = scope["model"]
    for _ in range(steps_after):
        model(torch.randn(8, 96)).pow(2).mean().backward()
    stats = scope["state"].stats()
    return stats["ratio"], stats["steps"]


def test_readme_snippets_compress() -> None:
    snippets = [snippet for snippet in code_blocks("README.md", "python") if "checkpoint" not in snippet]
    assert snippets
    for snippet in snippets:
        for ratio, steps in run_ranks(_run_snippet, 2, snippet, "", 3):
            assert steps == 3 and ratio > 1.5


def test_readme_saves_and_loads_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = (snippet for snippet in code_blocks("README.md", "python") if "checkpoint" in snippet)
    monkeypatch.chdir(tmp_path)
    model = Named()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 96)).pow(2).mean().backward()
    optimizer.step()
    scope: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 1}
    exec(compile(snippet, "README", "exec"), scope)
    optimizer.load_state_dict(scope["state"]["optimizer"])
    model.load_state_dict(scope["state"]["model"])
    assert scope["store"].steps() == [1]


def test_readme_diff_is_a_working_change() -> None:
    (diff,) = code_blocks("README.md", "diff")
    script = "from torch.nn.parallel import DistributedDataParallel\nmodel = model.module\n"
    script += "".join(line[2:] + "\n" for line in diff.splitlines() if not line.startswith("-"))
    for ratio, steps in run_ranks(_run_snippet, 2, script, "", 3):
        assert steps == 3 and ratio > 1.5


def test_checkpoint_snippet_of_the_docs(tmp_path: Path) -> None:
    snippet, of_one_rank = code_blocks("docs/gradients.md", "python")
    results = run_ranks(_run_snippet, 2, snippet, str(tmp_path / "checkpoint"), 2)
    assert [steps for _, steps in results] == [2, 2]
    # Another process loads: not before the first one has written.
    of_one_rank = of_one_rank.replace("\n...\n", "\ntorch.distributed.barrier()\n")
    names = f"import torch\nrank, path = torch.distributed.get_rank(), {str(tmp_path / 'whole.pt')!r}\n"
    results = run_ranks(_run_snippet, 2, names + of_one_rank, "", 2)
    assert [steps for _, steps in results] == [2, 2]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(96, 96) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return x


def _run_sharded_snippets(rank: int, hook: str, gathers: str) -> tuple[float, int, float]:
    torch.manual_seed(0)
    scope: dict[str, Any] = {"model": Blocks(), "world_size": 2}
    exec(compile(hook.replace('"cuda"', '"cpu"'), "sharded", "exec"), scope)
    sent = eval(gathers.strip(), scope)
    for _ in range(3):
        scope["model"](torch.randn(8, 96)).pow(2).mean().backward()
    assert sent.memory_bytes == 0
    stats = scope["state"].stats()
    return stats["ratio"], stats["steps"], sent.plain_wire_bytes / sent.wire_bytes


def _run_fsdp1_snippet(rank: int, source: str) -> tuple[float, int]:
    import commcomp

    torch.manual_seed(0)
    wrap = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))  # it looks for an accelerator else
    scope: dict[str, Any] = {"model": Blocks(), "commcomp": commcomp, "FullyShardedDataParallel": wrap}
    exec(compile(source, "fsdp1", "exec"), scope)
    for _ in range(3):
        scope["model"](torch.randn(8, 96)).pow(2).mean().backward()
    stats = scope["state"].stats()
    return stats["ratio"], stats["steps"]


def test_snippets_of_the_page_on_sharded_training() -> None:
    hook, gathers, fsdp1 = code_blocks("docs/sharded.md", "python")
    assert all(ratio > 1 and steps == 3 for ratio, steps in run_ranks(_run_fsdp1_snippet, 2, fsdp1))
    for ratio, steps, gather_ratio in run_ranks(_run_sharded_snippets, 2, hook, gathers):
        assert steps == 3 and ratio > 3 and gather_ratio > 3


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    folder = str(Path(page).parent)
    named = [f"{folder}/{name}" for name in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    named += [name for name in re.findall(r"(?:launchers|examples|docs|configs|benchmarks)/[\w./-]+", text)]
    missing = [name for name in named if not (ROOT / name.rstrip(".")).exists()]
    assert not missing
    assert len(text.splitlines()) <= 120, "README and docs pages stay short"
    assert not re.search(r"^[A-Z]{4,}$", text, flags=re.M), "a placeholder was left"


def test_every_key_of_stats_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/telemetry.md").read_text(), flags=re.M))
    assert documented == set(run_ranks(_stats_keys, 1)[0])


def _stats_keys(rank: int) -> list[str]:
    import commcomp

    return list(commcomp.GradientSync(DistributedDataParallel(nn.Linear(40, 40)), commcomp.LowRank()).stats())


def _run_moe_page(rank: int) -> list[tuple[int, ...]]:
    from commcomp import moe

    torch.manual_seed(0)
    whole, parts = code_blocks("docs/moe.md", "python")
    scope: dict[str, Any] = {"tokens": torch.randn(2, 12, 512, requires_grad=True)}
    exec(compile(whole, "moe", "exec"), scope)
    scope["output"].sum().backward()
    experts = moe.MoELayer(512, 16, 4).experts
    scope |= {"rows": torch.randn(9, 512), "rows_per_expert": torch.tensor([3, 0, 5, 1]), "my_experts": experts}
    scope["compressor"] = moe.TokenCompressor(moe.Quantized())
    exec(compile(parts, "moe", "exec"), scope)
    (other,) = (block for block in code_blocks("docs/moe_dispatchers.md", "python") if "Dispatcher" not in block)
    scope |= {"output_split_sizes": [4, 4], "input_split_sizes": [4, 4], "rows": torch.randn(8, 16)}
    scope["group"] = torch.distributed.group.WORLD
    before = tuple(scope["rows"].shape)
    exec(compile(other, "moe_dispatchers", "exec"), scope)
    return [tuple(scope["output"].shape), before, tuple(scope["rows"].shape)]


def test_what_the_moe_pages_show_runs() -> None:
    for output, before, after in run_ranks(_run_moe_page, 2):
        assert output == (2, 12, 512) and before == after == (8, 16)
