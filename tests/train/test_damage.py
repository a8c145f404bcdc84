"""Damaged checkpoint folders: one message names each kind of damage, and the newest undamaged checkpoint is used."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_spo.checkpoint import folder as checkpoint_folder
from megatron_spo.cli import main
from tests.support.processes import read_metrics
from tests.support.tiny import tiny_model, tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a checkpoint after each of the last three, and its model."""
    folder = tmp_path_factory.mktemp("damage")
    config = tiny_run(
        folder,
        shape={"num_hidden_layers": 2},
        pairs=10,
        reference=None,
        loss={"name": "simpo"},
        training={"global_batch_size": 4},
        checkpoint={"every": 1, "keep": 3},
    )
    assert main(["train", str(config)]) == 0
    assert main(["convert", str(folder / "run"), str(folder / "hf"), "--to", "hf"]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def train(trained: Path, run: Path, *overrides: str) -> int:
    return main(["train", str(trained / "config.yaml"), f"output={run}", *overrides])


def newest(run: Path) -> Path:
    return run / "checkpoints/step_00000004"


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flip(name: str, at: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(at * (len(content) - 1))] ^= 4
        (folder / name).write_bytes(content)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def reseal(folder: Path, **changes: object) -> None:
    """Writes a new seal for the current files, as an attacker would."""
    content = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").unlink()
    checkpoint_folder.seal(folder, content["state"], content["record"], {})
    if changes:
        content = {**json.loads((folder / "trainer.json").read_text()), **changes}
        content.pop("checksum")
        content["checksum"] = checkpoint_folder._digest(content)
        (folder / "trainer.json").write_text(json.dumps(content))


def older_format(folder: Path) -> None:
    (folder / "trainer.json").write_text(json.dumps({"step": 4, "schedule": {"lambda_": 1.0}}))


def newer_format(folder: Path) -> None:
    reseal(folder, format=3)


def outside_the_folder(folder: Path) -> None:
    content = json.loads((folder / "trainer.json").read_text())
    reseal(folder, files={**content["files"], "../step_00000003/common.pt": [1, "0"]})


def another_checkpoints_shard(folder: Path) -> None:
    shutil.copyfile(folder.parent / "step_00000003/__0_0.distcp", folder / "__0_0.distcp")


class Harm:
    """Runs code when it is unpickled, as a malicious pickle would."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 3",)


def harmful_index(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Harm()))
    reseal(folder)


def harmful_common_part(folder: Path) -> None:
    torch.save({"optimizer_step": Harm()}, folder / "common.pt")
    reseal(folder)


def index_that_leaves_the_folder(folder: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    entry = next(iter(index.storage_data.values()))
    entry.relative_path = "../step_00000003/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    reseal(folder)


def _replace_entry(folder: Path, content: object) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    key, where = next((k, w) for k, w in index.storage_data.items() if k.fqn.endswith("_extra_state/shard_0_2"))
    with (folder / where.relative_path).open("ab") as shard:
        where.offset = shard.tell()
        torch.save(content, shard)
        where.length = shard.tell() - where.offset
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    reseal(folder)


def harmful_entry(folder: Path) -> None:
    _replace_entry(folder, Harm())


def bytes_for_unpickling(folder: Path) -> None:
    _replace_entry(folder, torch.frombuffer(bytearray(pickle.dumps(Harm())), dtype=torch.uint8))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard truncated": (truncate("__0_0.distcp"), "bytes instead of"),
    "other shard truncated": (truncate("__0_1.distcp"), "bytes instead of"),
    "shard flipped at the start": (flip("__0_0.distcp", 0.0), "does not match its checksum"),
    "shard flipped in the middle": (flip("__0_0.distcp"), "does not match its checksum"),
    "shard flipped at the end": (flip("__0_1.distcp", 1.0), "does not match its checksum"),
    "shard missing": (remove("__0_1.distcp"), "__0_1.distcp is missing"),
    "shard of another checkpoint": (another_checkpoints_shard, "does not match its checksum"),
    "shard empty": (lambda folder: (folder / "__0_0.distcp").write_bytes(b""), "0 bytes instead of"),
    "index missing": (remove(".metadata"), ".metadata is missing"),
    "index truncated": (truncate(".metadata"), "bytes instead of"),
    "index flipped": (flip(".metadata"), "does not match its checksum"),
    "index that runs code": (harmful_index, "not safe to load"),
    "index that leaves the folder": (index_that_leaves_the_folder, "outside of the folder"),
    "entry that runs code": (harmful_entry, "not safe to load"),
    "entry that its reader unpickles": (bytes_for_unpickling, "pickled bytes"),
    "common part missing": (remove("common.pt"), "common.pt is missing"),
    "common part flipped": (flip("common.pt"), "does not match its checksum"),
    "common part that runs code": (harmful_common_part, "not safe to load"),
    "format file missing": (remove("metadata.json"), "metadata.json is missing"),
    "seal missing": (remove("trainer.json"), "trainer.json is missing"),
    "seal truncated": (truncate("trainer.json"), "trainer.json cannot be read"),
    "seal flipped": (flip("trainer.json", 0.2), "trainer.json"),
    "seal empty": (lambda folder: (folder / "trainer.json").write_text(""), "trainer.json cannot be read"),
    "seal of no object": (lambda folder: (folder / "trainer.json").write_text("[]"), "format 'unknown'"),
    "seal that leaves the folder": (outside_the_folder, "outside of the folder"),
    "older format": (older_format, "checkpoint format 1"),
    "newer format": (newer_format, "checkpoint format 3"),
    "nothing left": (lambda folder: [path.unlink() for path in folder.iterdir()], "trainer.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken(
    trained: Path, run: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[kind]
    damage(newest(run))
    assert train(trained, run) == 0
    said = capfd.readouterr().err
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1, said
    assert "step_00000004" in warnings[0] and message in warnings[0] and "resuming from step_00000003" in warnings[0]
    assert (run / "checkpoints/step_00000004.damaged").exists()  # nothing is deleted
    assert read_metrics(run).keys() == read_metrics(trained / "run").keys()
    assert main(["convert", str(run), str(run / "hf"), "--to", "hf"]) == 0
    expected, got = load_file(trained / "hf/model.safetensors"), load_file(run / "hf/model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["shard flipped in the middle", "index that runs code", "seal missing"])
def test_export_names_the_damage(trained: Path, run: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = DAMAGES[kind]
    damage(newest(run))
    assert main(["convert", str(run), str(run / "hf"), "--to", "hf"]) == 2
    said = capsys.readouterr().err
    assert "step_00000004" in said
    if kind != "seal missing":
        assert message in said
    assert not (run / "hf").exists()
    assert main(["convert", str(run / "checkpoints/step_00000003"), str(run / "hf"), "--to", "hf"]) == 0


def test_none_whole_is_an_error_and_nothing_is_touched(
    trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (run / "checkpoints").glob("step_*"):
        flip("__0_0.distcp")(folder)
    before = sorted(run.rglob("*"))
    assert train(trained, run) == 2
    said = capsys.readouterr().err
    for step in (2, 3, 4):
        assert f"step_0000000{step}/__0_0.distcp does not match its checksum" in said
    assert "remove that folder" in said
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("content", [None, "step_00000009", "", "../elsewhere"])
def test_latest_may_be_missing_or_wrong(
    trained: Path, run: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = run / "checkpoints/latest"
    marker.unlink()
    if content is not None:
        marker.write_text(content)
    assert train(trained, run, "training.steps=5") == 0
    said = capsys.readouterr().err
    assert "resuming from step_00000004" in said
    assert ("latest names" in said) == (content is not None)
    assert marker.read_text() == "step_00000005"


def test_latest_may_be_set_back(trained: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/latest").write_text("step_00000002")
    assert train(trained, run) == 0
    assert "resuming from step_00000002" in capsys.readouterr().err
    assert (run / "checkpoints/latest").read_text() == "step_00000004"


def test_another_model_is_named(trained: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(tmp_path / "wider", num_hidden_layers=2, intermediate_size=96)
    overrides = [f"model.path={tmp_path}/wider"]
    assert train(trained, run, *overrides) == 2
    assert "model.path" in capsys.readouterr().err
    assert train(trained, run, *overrides, "checkpoint.allow_changed=[model.path]") == 2
    said = capsys.readouterr().err
    assert "does not fit the model" in said and "Traceback" not in said
    assert (newest(run) / "trainer.json").exists()


def test_a_hugging_face_index_cannot_leave_its_folder(trained: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(trained / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["train", str(trained / "config.yaml"), f"output={tmp_path}/x", f"model.path={tmp_path}/model"]) == 2
    assert "outside of the folder" in capsys.readouterr().err
