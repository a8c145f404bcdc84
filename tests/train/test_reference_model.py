"""reference.model: the log-probs, and v, are those of another model than the one that is trained."""

import json
from pathlib import Path

import pytest

from megatron_spo.cli import main
from megatron_spo.evaluate.pairs import evaluate_pairs
from tests.support.tiny import tiny_model, tiny_run


def test_the_reference_is_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tmp_path, pairs=8, shape={"num_hidden_layers": 1}, training={"steps": 1, "global_batch_size": 8})
    tiny_model(tmp_path / "other", num_hidden_layers=1, seed=5)
    other = f"reference.model={tmp_path / 'other'}"
    assert main(["train", str(config), other, "reference.cache=null", "loss.name=cpo"]) == 2
    assert "requires a cache of its log-probs; set reference.cache" in capsys.readouterr().err
    assert main(["reference", str(config), other]) == 0
    assert main(["train", str(config), other]) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    found = evaluate_pairs(tmp_path / "model", tmp_path / "pairs.jsonl", reference=tmp_path / "other")
    means = {name: one.value for name, one in found.estimates().items()}
    for name in ("spo/chosen_shift", "spo/rejected_shift", "logps/chosen"):
        assert line[name] == pytest.approx(means[name], abs=1e-3) and abs(means[name]) > 1e-2, name
    assert found.reference is not None
    v = -found.reference[:, 0].sum() / found.tokens[:, 0].sum()
    g = -found.logps[:, 0].sum() / found.tokens[:, 0].sum()
    assert line["spo/gap"] == pytest.approx(g - v, abs=1e-4)
    capsys.readouterr()
    assert main(["train", str(config), f"output={tmp_path / 'second'}"]) == 2  # the cache is not of the model itself
    assert "the reference's weights: the cache has" in capsys.readouterr().err
    assert main(["train", str(config), "reference.model=nowhere", f"output={tmp_path / 'third'}"]) == 2
    assert "reference.model = 'nowhere' is not a folder" in capsys.readouterr().err
