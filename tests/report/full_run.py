"""Writes a run directory with every part that a report can show."""

import json
import random
from pathlib import Path

EVIL = '<script>alert(1)</script> & "quotes" \u2028 \ud83d\ude00'
PARTS = {"data": 0.02, "forward_backward": 0.6, "communication": 0.2, "optimizer": 0.1, "other": 0.08}


def make_full_run(folder: Path, *, seed: int = 0, steps: int = 60, falls: bool = True, loss: str = "simpo") -> Path:
    """Writes a run with one alarm, samples and held-out pairs, whose metrics leave the safe region if it `falls`."""
    rng = random.Random(f"{seed} {loss}")
    (folder / "held_out").mkdir(parents=True)
    lines: list[dict] = []
    for step in range(1, steps + 1):
        done = step / steps
        shift = -12 * done**2 if falls else 0.6 * done
        numbers = {
            "loss": 0.7 - 0.4 * done + rng.gauss(0, 0.02), "rewards/accuracies": min(1.0, 0.5 + 0.4 * done),
            "spo/chosen_shift": shift + rng.gauss(0, 0.2), "spo/rejected_shift": shift - 6 * done,
            "spo/both_down": done if falls else 0.1, "spo/gap": -shift / 12, "spo/lambda": 1.0,
            "policy/entropy": 1.4 - 0.3 * done, "pairs": 32, "tokens": 4000,
        }  # fmt: skip
        seconds = {f"seconds/{part}": value * rng.uniform(0.9, 1.1) for part, value in PARTS.items()}
        lines.append({"kind": "train", "step": step, **numbers, "seconds": sum(seconds.values()), **seconds})
        if step % max(1, steps // 6) == 0:
            lines.append({"kind": "eval", "name": "held_out", "step": step, **numbers})
            match = 0.75 * (1 - done if falls else 1)
            scores = {
                "exact_match": match,
                "malformed": 1 - match,
                "rep_4": 0.1,
                "distinct_2": 0.5,
                "length_ratio": 1.1,
            }
            named = {f"generation/{name}": value for name, value in scores.items()}
            lines.append({"kind": "generation", "step": step, "data": "held_out", **named})
    if falls:
        alarm = {"alarm": "displacement", "metric": "spo/chosen_shift", "value": -3.1, "bound": -1.0}
        message = f"step {steps // 2}: the preferred answers lost 3.1 nats {EVIL}"
        lines.append({"kind": "alarm", "step": steps // 2, "data": "train", **alarm, "message": message})
    write(folder / "metrics.jsonl", lines)
    sample = {"data": "held_out", "prompt": f"12+30= {EVIL}", "reference": "so 42"}
    write(folder / "samples.jsonl", [
        {**sample, "step": 10, "answer": "so 42", "exact_match": True, "malformed": False},
        {**sample, "step": steps, "answer": f"4 4 4 {EVIL}", "exact_match": False, "malformed": True},
    ])  # fmt: skip
    moved = [(rng.gauss(-8 if falls else 1, 3), rng.gauss(-12, 4)) for _ in range(200)]
    pairs = [
        {"row": i, "chosen_shift": c, "rejected_shift": r, "chosen_tokens": 20, "rejected_tokens": 22}
        for i, (c, r) in enumerate(moved)
    ]
    prompt = [{"role": "user", "content": f"How many? {EVIL}"}]
    worst = [
        {**{key: pair[key] for key in ("row", "chosen_shift", "rejected_shift")}, "prompt": prompt,
         "chosen": "It is 42. " * 30, "rejected": EVIL}
        for pair in sorted(pairs, key=lambda pair: pair["chosen_shift"])[:20]
    ]  # fmt: skip
    found = {"step": steps, "pairs": pairs, "worst": worst}
    (folder / "held_out" / "held_out.json").write_text(json.dumps(found))
    (folder / "config.yaml").write_text(
        f"output: {folder}\nloss: {{name: {loss}, beta: 2.5}}\ntraining: {{seed: {seed}}}\nspo: {{schedule: none}}\n"
    )
    (folder / "status.json").write_text(json.dumps({"state": "done", "step": steps, "checkpoint": "step_60"}))
    provenance = {"versions": {"torch": "2.13.0"}, "data": {"train": "0123456789abcdef" * 2}, "weights": "fedcba98"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
