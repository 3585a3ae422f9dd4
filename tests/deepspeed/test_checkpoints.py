"""DeepSpeed checkpoints in packed files: real engines, real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from commcomp.checkpoint.chain import SnapshotChain
from commcomp.checkpoint.container_reader import SnapshotReader
from commcomp.checkpoint.decoder import decode, whole
from tests.deepspeed import checkpoint_cases
from tests.deepspeed.checkpoint_cases import WIDTH
from tests.ranks import run_ranks

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")

CASES = [(stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def every_stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("stages")
    return root, run_ranks(checkpoint_cases.every_stage, 2, str(root), CASES)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[dict[str, Any]]]:
    roots = {name: str(tmp_path_factory.mktemp(name)) for name in ("killed", "residuals", "refusals", "snippet")}
    with pytest.raises(AssertionError, match="died"):
        run_ranks(checkpoint_cases.killed_while_saving, 2, roots["killed"])
    return roots, run_ranks(checkpoint_cases.two_ranks, 2, roots)


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_no_file_is_larger_and_plain_engines_go_on_from_ours(every_stage: Any, stage: int, dtype: str) -> None:
    """Files that load alike, and the same losses and states after two more steps, are asserted on the ranks."""
    root, ranks = every_stage
    results = [rank[f"{stage}-{dtype}"] for rank in ranks]
    sizes = results[0]["sizes"]
    assert sizes and all(ours <= plain for ours, plain in sizes.values()), sizes
    ours, plain = (sum(pair[number] for pair in sizes.values()) for number in (0, 1))
    assert plain > 300_000 and ours < 0.95 * plain, (ours, plain)
    stats = [result["stats"] for result in results]
    assert sum(each["bytes"] for each in stats) == ours
    assert sum(each["plain_bytes"] for each in stats) == pytest.approx(plain, rel=0.01)
    assert sum(each["files"] for each in stats) == len(sizes) and all(each["residual_bytes"] == 0 for each in stats)
    assert results[0]["fp32"] == (["dict"] * 2 if stage else ["str"] * 2)
    folder = root / f"{stage}-{dtype}" / "ours"
    assert not list(folder.rglob(".*.unfinished")) and not list(folder.rglob("*.ccsnap"))


@pytest.mark.parametrize(("stage", "dtype"), [case for case in CASES if case[0]])
def test_matrices_in_flat_buffers_are_those_of_the_model(every_stage: Any, stage: int, dtype: str) -> None:
    """Every row that ZeRO's weights were cut into is one of a parameter."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = every_stage[0] / f"{stage}-{dtype}" / "ours"
    weights = get_fp32_state_dict_from_zero_checkpoint(folder, "t")
    rows = {row.numpy().tobytes() for value in weights.values() if value.dim() == 2 for row in value.detach()}
    found = 0
    for path in folder.glob("t/*_optim_states.pt"):
        with zipfile.ZipFile(path) as archive:
            payload = max((archive.read(info) for info in archive.infolist()), key=len)
        reader = SnapshotReader(path.name, memoryview(payload))
        for name, piece in decode(SnapshotChain.alone(reader), whole(reader)).items():
            header = reader.tensors[name].header
            if len(header.shape) == 2 and "exp_avg" not in name:
                found += header.num_values
                assert {row.tobytes() for row in piece.data.reshape(header.shape[0], -1)} <= rows, name
    assert found > 0.95 * sum(value.numel() for value in weights.values() if value.dim() == 2) - WIDTH * 300


def test_the_script_in_the_folder_runs_unmodified(every_stage: Any, tmp_path: Path) -> None:
    """In plain DeepSpeed's process, which knows nothing of commcomp but that it is installed."""
    folder = every_stage[0] / "3-bf16"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "ours" / "zero_to_fp32.py"), str(folder / "ours"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    plain = checkpoint_cases.fp32_weights(folder / "plain")
    assert ours.keys() == plain.keys() and "up.weight" in ours
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_killed_in_the_middle_of_a_save(two_ranks: Any) -> None:
    roots, ranks = two_ranks
    assert Path(roots["killed"], "latest").read_text() == "good"
    assert list(Path(roots["killed"], "never").glob(".*.unfinished")), "the kill came too early"
    assert not list(Path(roots["killed"], "never").glob("*.pt"))
    for result in ranks:
        path, steps, said = result["killed"]
        assert Path(path).parent.name == "good" and steps == 3
        assert "DamagedFileError" in said and "zero_pp_rank_1_mp_rank_00_optim_states.pt" in said


def test_residuals_are_saved_and_loaded_per_rank(two_ranks: Any) -> None:
    """Most is asserted on the ranks; a damaged file of rank 1 is an error on both, or begins anew on both."""
    roots, ranks = two_ranks
    tag = Path(roots["residuals"], "global_step2")
    assert sorted(path.name for path in tag.glob("*.ccsnap")) == ["commcomp_rank_0.ccsnap", "commcomp_rank_1.ccsnap"]
    for result in ranks:
        raised, warned = result["residuals"]["errors"]
        assert "commcomp_rank_1.ccsnap" in raised and "damaged" in raised and "strict=False" in raised
        assert "commcomp_rank_1.ccsnap" in warned
        assert result["residuals"]["stats"]["residual_bytes"] > 0


def test_on_another_number_of_ranks_the_mean_is_loaded(two_ranks: Any) -> None:
    roots, ranks = two_ranks
    (state,) = run_ranks(checkpoint_cases.residuals_on_one_rank, 1, roots["residuals"])
    mean = ranks[0]["residuals"]["mean"]
    assert any("/residual/" in key for key in state) and state.keys() == mean.keys()
    for key, value in mean.items():
        torch.testing.assert_close(state[key], value, msg=key)
    assert any(value.any() for key, value in state.items() if "/residual/" in key)


def test_what_cannot_be_taken_over_is_refused_by_name(two_ranks: Any) -> None:
    for result in two_ranks[1]:
        said = result["refusals"]
        assert said["decoupled"].startswith("ValueError") and "Background" in said["decoupled"]
        assert "remove 'writer'" in said["decoupled"] and "OwnWriter" in said["own writer"]
        assert "rank 1 has" in said["different"] and "Linear has no checkpoint_engine" in said["no engine"]


def test_what_fails_on_one_rank_is_raised_on_all(two_ranks: Any) -> None:
    """Rank 0 alone writes the model's file."""
    first, second = (result["refusals"] for result in two_ranks[1])
    assert "pickle" in first["unpicklable"] and "failed on rank 0" in second["unpicklable"]
    for said in (first, second):
        assert said["latest"] == said["still"] == "first"
        assert "DamagedFileError" in said["damaged"] and "mp_rank_00_model_states.pt" in said["damaged"]
        assert "weights" not in said


def test_the_snippet_of_the_docs_runs(two_ranks: Any) -> None:
    for result in two_ranks[1]:
        assert result["snippet"]["files"] == result["snippet"]["packed_files"] <= 1
    assert sum(result["snippet"]["bytes"] for result in two_ranks[1]) > 300_000


def test_settings_are_read_strictly() -> None:
    from commcomp.deepspeed.checkpoints import CheckpointConfig

    config = CheckpointConfig.from_dict({"save_residuals": False})
    assert CheckpointConfig.from_dict(config.to_dict()) == config and config.mode == "lossless"
    for wrong, message in [
        ({"mod": "lossless"}, "did you mean 'mode'"),
        ({"mode": "standard"}, "SnapshotStore"),
        ({"mode": "zip"}, "expected 'lossless'"),
        ({"save_residuals": 1}, "expected true or false"),
        ([], "expected a mapping"),
    ]:
        with pytest.raises(ValueError, match=message):
            CheckpointConfig.from_dict(wrong)  # type: ignore[arg-type]
