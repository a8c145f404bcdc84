"""A separate SFT set, several losses and a running minimum, compared with a plain loop and across layouts."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.oracles.lower_level_loop import DUAL_LR, EPSILON, lower_level_trajectory
from tests.support.grids import grid, layout_settings, selected
from tests.support.processes import NOT_COMPARED, Job, largest_difference, read_metrics, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_run, write_jsonl

STEPS, BATCH, SFT_ROWS, SFT_BATCH = 5, 6, 12, 5  # batches of 5, 5, 2, 5, 5 SFT rows
DUAL = ["spo.schedule=dual", f"spo.epsilon={EPSILON}", f"spo.dual_lr={DUAL_LR}"]
MIX = ["loss.name=[dpo, simpo]", "loss.weights=[1, 0.5]", "loss.beta=[0.2, 2]", "loss.gamma_beta_ratio=0.3"]
TOKEN, RELATIVE = ["spo.lambda_unit=token", "spo.lambda=2"], ["spo.lambda_unit=relative", "spo.lambda=1.5"]
SEPARATE = ["spo.sft_data={folder}/sft.jsonl", f"spo.sft_batch_size={SFT_BATCH}"]
CHOSEN = ["spo.sft_data={folder}/chosen.jsonl"]

ONE, BOTH = [("dpo", 1.0, 0.1)], [("dpo", 1.0, 0.2), ("simpo", 0.5, 2.0)]
ORACLE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "token": ([*TOKEN, *SEPARATE], {"losses": ONE, "lam": 2.0, "unit": "token"}),
    "relative": ([*RELATIVE, *SEPARATE], {"losses": ONE, "lam": 1.5, "unit": "relative"}),
    "dual": ([*DUAL, *TOKEN, *SEPARATE], {"losses": ONE, "lam": 2.0, "unit": "token"}),
    "mix": ([*MIX, *RELATIVE, *SEPARATE], {"losses": BOTH, "lam": 1.5, "unit": "relative"}),
    "mix-chosen": ([*MIX, *RELATIVE], {"losses": BOTH, "lam": 1.5, "unit": "relative"}),
    "running-min": ([*DUAL, *TOKEN, "spo.v=running_min"], {"losses": ONE, "lam": 2.0, "unit": "token"}),
}
SCHEDULES = {
    "sft": ["spo.schedule=sft"],
    "penalty": RELATIVE,
    "batch": ["spo.constraint=batch", *TOKEN],
    "pair": ["spo.constraint=pair", *RELATIVE],
    "dual": [*DUAL, *RELATIVE],
    "alternating": ["spo.schedule=alternating"],
    "lookahead": ["spo.schedule=lookahead", "spo.lookahead_lr=0.05", "spo.lambda=0.5"],
    "barrier": ["spo.schedule=barrier", "spo.barrier_rate=40"],
}
LAYOUTS = {
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "dp2": (2, []),
    "dp2-pp2": (4, ["parallel.pipeline=2"]),
}
IN_LAYOUTS = {
    **{name: [*SCHEDULES[name], *SEPARATE] for name in ("batch", "alternating", "lookahead", "barrier")},
    "dual-shuffled": [*ORACLE["dual"][0], "data.shuffle=true", "spo.v=running_min"],
    "mix-pair": [*MIX, *SCHEDULES["pair"], *SEPARATE],
}
CELLS = {
    (layout, name): [*layout_settings(*LAYOUTS[layout]), *settings]
    for layout in LAYOUTS
    for name, settings in IN_LAYOUTS.items()
}
EXTRA = {"tokens", "sft_rows", "sft_epoch", *NOT_COMPARED}
"""Metrics that a separate set adds, or that differ because it is packed differently."""


def sft_rows() -> list[dict]:
    return [
        {"prompt": f"Add {row['prompt'][:-1]}:", "completion": f"the sum is {row['chosen']}"}
        for row in arithmetic_pairs(SFT_ROWS, seed=7)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("lower-level")
    pairs = arithmetic_pairs(STEPS * BATCH)
    write_jsonl(folder / "sft.jsonl", sft_rows())
    write_jsonl(folder / "chosen.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    config = tiny_run(
        folder,
        pairs=pairs,
        data={"row_length": 100, "shuffle": False},
        optimizer={"clip_grad": 0},
        training={"global_batch_size": BATCH, "steps": STEPS},
    )

    def job(command: str, output: str, settings: list[str]) -> Job:
        return command, str(config), [f"output={folder}/{output}", *(s.format(folder=folder) for s in settings)]

    one = [job("reference", "unset", settings) for settings in (SEPARATE, CHOSEN)]
    one += [job("train", f"oracle/{name}", settings) for name, (settings, _) in ORACLE.items()]
    one += [job("train", f"with/{name}", [*settings, *CHOSEN]) for name, settings in SCHEDULES.items()]
    one += [job("train", f"without/{name}", settings) for name, settings in SCHEDULES.items()]
    one += [job("train", f"one/{name}", settings) for name, settings in IN_LAYOUTS.items()]
    run_jobs(one, 1)
    jobs: dict[int, list[Job]] = {2: [], 4: []}
    for layout, name in sorted(selected(request, "layout", "name")):
        processes, overrides = LAYOUTS[layout]
        jobs[processes].append(job("train", f"{layout}/{name}", [*IN_LAYOUTS[name], *overrides]))
    for processes, wanted in jobs.items():
        run_jobs(wanted, processes)
    return folder


@pytest.mark.parametrize("name", ORACLE)
def test_steps_equal_a_plain_loop(runs: Path, name: str) -> None:
    settings, case = ORACLE[name]
    tokenizer = AutoTokenizer.from_pretrained(runs / "model")

    def ids(text: str) -> list[int]:
        return tokenizer(text).input_ids

    pairs = [(ids(r["prompt"]), [*ids(r["chosen"]), 1], [*ids(r["rejected"]), 1]) for r in arithmetic_pairs(30)]
    rows = [(ids(r["prompt"]), [*ids(r["completion"]), 1]) for r in sft_rows()]
    epoch = [rows[:5], rows[5:10], rows[10:]]
    expected = lower_level_trajectory(
        runs / "model",
        [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)],
        [*epoch, *epoch[:2]] if SEPARATE[0] in settings else None,
        schedule="dual" if DUAL[0] in settings else "penalty",
        running_min=name == "running-min",
        **case,
    )
    ours = read_metrics(runs / "oracle" / name)
    for step, line in enumerate(expected, 1):
        for metric, value in line.items():
            assert ours["train", "", step][metric] == pytest.approx(value, rel=1e-4, abs=1e-4), f"{metric} at {step}"
    if SEPARATE[0] in settings:
        assert [ours["train", "", step]["sft_rows"] for step in range(1, 6)] == [5, 5, 2, 5, 5]
    if name == "running-min":
        assert ours["train", "", 1]["spo/gap"] == 0
        assert max(ours["train", "", step]["spo/gap"] for step in range(1, 6)) > 0.01


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_chosen_responses_as_separate_set_change_nothing(runs: Path, name: str) -> None:
    ours, theirs = read_metrics(runs / "with" / name), read_metrics(runs / "without" / name)
    assert ours.keys() == theirs.keys()
    for key, line in theirs.items():
        for metric in line.keys() - EXTRA:
            assert ours[key][metric] == pytest.approx(line[metric], rel=1e-4, abs=1e-4), f"{metric} at {key}"
    more_tokens = [ours[key]["tokens"] > theirs[key]["tokens"] for key in theirs if key[0] == "train"]
    assert more_tokens and all(more_tokens)


@grid("layout,name", CELLS)
def test_layouts_agree(runs: Path, layout: str, name: str) -> None:
    difference, where = largest_difference(runs / layout / name, runs / "one" / name)
    assert difference < 1e-4, where
