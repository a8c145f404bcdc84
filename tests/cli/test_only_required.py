"""A plain `pip install` of the package is enough for the whole way from pairs to answers."""

import subprocess
import sys
from pathlib import Path

from tests.support.processes import ROOT, _environment
from tests.support.tiny import tiny_run, write_jsonl


def test_from_pairs_to_answers_without_further_packages(tmp_path: Path) -> None:
    tiny_run(tmp_path, pairs=4, held_out=2, shape={"num_hidden_layers": 1}, training={"steps": 2})
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a", "answer": "1"}])
    exported, run = tmp_path / "exported", tmp_path / "run"
    commands: list[list[str | Path]] = [
        ["init", tmp_path / "model", tmp_path / "pairs.jsonl"],
        ["reference", tmp_path / "config.yaml", f"output={run}"],
        ["train", tmp_path / "config.yaml", f"output={run}", "training.eval_every=1", "training.hang_timeout=0.1"],
        ["status", run],
        ["report", run, "--out", tmp_path / "report.html"],
        ["convert", run, exported, "--to", "hf"],
        ["generate", exported, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "answers.jsonl",
         "--max-new-tokens", "4"],
        ["evaluate", tmp_path / "answers.jsonl"],
        ["doctor"],
    ]  # fmt: skip
    words = [word for command in commands for word in (*map(str, command), "--")]
    script = [sys.executable, str(ROOT / "tests/support/only_required.py"), *words]
    done = subprocess.run(
        script, env=_environment(), capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert (tmp_path / "answers.jsonl").is_file() and (tmp_path / "report.html").is_file()
