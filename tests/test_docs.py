"""README and docs: every command in them parses and runs, every link leads somewhere, the prose is plain English."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from megatron_spo import cli
from megatron_spo.config.schema import Config, keys_of, section_class
from megatron_spo.data.pairs import parse_row
from tests.support.tiny import arithmetic_pairs, tiny_judge, tiny_model, write_jsonl

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md", "docker/README.md", "tools/bench/README.md")
]
PAGES += sorted((ROOT / "docs").glob("*.md")) + sorted(ROOT.glob("examples/**/README.md"))
OURS = re.compile(r"^(?:torchrun .*-m megatron_spo|python -m megatron_spo|megatron-spo) (.*)$")


def commands(page: Path) -> Iterator[str]:
    """Lines of a page's bash blocks, continued ones joined, without comments."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse_and_links_lead_somewhere(page: Path) -> None:
    keys = {
        f"{section}.{key}" for section in Config.model_fields if (cls := section_class(section)) for key in keys_of(cls)
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(page):
        words = [word for word in shlex.split(command.partition(" '>' ")[0]) if not re.match(r"[A-Z_]+=", word)]
        if found := OURS.match(shlex.join(words)):
            given = shlex.split(found[1])
            try:
                options = cli._parse(given)
            except SystemExit as stop:  # --help
                assert stop.code == 0, command
                continue
            for override in getattr(options, "overrides", []):
                assert override.split("=")[0] in keys | {"output"}, command
        elif words and words[0] in ("python", "bash", "sbatch"):
            script = next(word for word in words[1:] if word.endswith((".py", ".sh")))
            assert (ROOT / script).is_file(), command
        elif words and words[0] == "make":
            assert set(words[1:]) <= targets, command
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if not link.startswith("http"):
            target = page.parent / link if link else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}#{anchor}"


def test_the_tests_that_the_table_of_reports_names_exist() -> None:
    table = (ROOT / "docs/troubleshooting.md").read_text().partition("| report | here | test |\n|---|---|---|\n")[2]
    rows = [line.split(" | ") for line in table.splitlines()]
    assert len(rows) == 26
    for *_, tests in rows:
        assert (named := re.findall(r"`([^`]+)`", tests)), tests
        for file, _, name in (one.partition("::") for one in named):
            path = ROOT / "tests" / file
            definition = f"def {name}(" if name else "def test_"
            assert path.is_file() and definition in path.read_text(), f"{file}::{name}"


def test_the_pairs_of_the_first_example_are_valid() -> None:
    seen = set()
    for name in ("pairs", "held-out"):
        for line in (ROOT / f"examples/own_pairs/{name}.jsonl").read_text().splitlines():
            pair = parse_row(json.loads(line), kind="preference")
            assert isinstance(pair.prompt, list)
            seen.add(pair.prompt[0]["content"])
    assert len(seen) == 69 + 11  # no prompt is in both files


WORDS = {
    "go on from|goes on from|going on from": "resume from, continue",
    "not built|unbuilt": "not supported",
    "beside": "with, next to, besides",
    "owed": "pending",
    "floors": "layers, limits",
    "dearest": "most expensive",
    "robbed": "lost",
    "same command goes on": "same command resumes",
    "is not built|not built": "is not supported",
}
"""The start of the list in CONTRIBUTING.md."""


def odd_words(files: Iterable[Path]) -> list[str]:
    """`file:line: found (write ...)` for each word of WORDS; what is in backticks or a block of code is not prose."""
    found = []
    for file in files:
        code = r"```.*?```|`[^`\n]*`|\]\([^)\n]*\)" if file.suffix == ".md" else r"`[^`\n]*`"
        text = re.sub(code, lambda match: "\n" * match[0].count("\n"), file.read_text(), flags=re.DOTALL)
        for odd, plain in WORDS.items():
            for match in re.finditer(rf"\b(?:{odd})\b".replace(" ", r"\s+"), text, re.IGNORECASE):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{file.relative_to(ROOT)}:{line}: {match[0]} (write {plain})")
    return found


def test_the_prose_is_plain_english() -> None:
    assert not odd_words([*PAGES, ROOT / "examples/LOG.md", *(ROOT / "megatron_spo").rglob("*.py")])


def test_odd_words_are_found_outside_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (page := tmp_path / "page.md").write_text("`beside` [it](floors.json)\n```bash\nfloors\n```\nit goes\non from A\n")
    (module := tmp_path / "module.py").write_text('"""No `owed` word."""\n# the Dearest row\n')
    assert odd_words([page, module]) == [
        "page.md:5: goes\non from (write resume from, continue)",
        "module.py:2: Dearest (write most expensive)",
    ]


def test_the_python_of_how_it_works_prints_what_its_comments_say() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how_it_works.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(block, {})
        assert printed.getvalue().splitlines() == re.findall(r"^print.*?  # (.*)$", block, re.MULTILINE)


def test_a_page_starts_with_an_example_and_a_long_one_has_contents() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        assert -1 < text.find("\n```") < (text + "\n|").find("\n|"), page.name
        assert len(text.splitlines()) <= 50 or text.find("**Contents:**") < text.index("\n## "), page.name


RUNNABLE = ("train", "loss", "monitoring", "evaluate", "performance", "convert", "studies", "troubleshooting")
RUN = ["README.md", *(f"docs/{name}.md" for name in RUNNABLE)]
FROM_NOTHING = ("README.md", "docs/train.md")
"""Pages that make the run and the model which the others find."""
CODES = {
    "megatron-spo evaluate --model my-model --tasks arc_easy my_task.yaml --out benchmarks.json": None,
    "megatron-spo rehearse examples/llama3_70b/config.yaml --gpus 32": None,
    "megatron-spo plan examples/llama3_70b/config.yaml --gpus 32 --gpu h100 --prompt-tokens 150 --response-tokens 250 "
    "--pairs 40000": None,
    "megatron-spo scaling study examples/studies/sizes_data.yaml --scale tiny --workers 2": None,
    "megatron-spo scaling report examples/studies/sizes_data.yaml --scale tiny": None,
    "megatron-spo scaling study examples/studies/displacement.yaml --list": None,
    "megatron-spo scaling study examples/studies/displacement.yaml --workers 2": None,
    "megatron-spo scaling report examples/studies/displacement.yaml": None,
    "megatron-spo scaling fit runs/my-study/table.csv --law chinchilla --column loss=eval/loss --out fit.json": 2,
    "megatron-spo scaling fit runs/my-study/table.csv --law chinchilla --by method --out fit.json --plot fit.pdf": 2,
}
"""What is not run, as it fetches data from the hub or takes minutes (None), and what is refused for four points."""
STAND_INS = {"Qwen/Qwen2.5-0.5B-Instruct": "model", "examples/own_pairs/": ""}
"""What is not on the desk, and what is there in its place."""
CONFIG = """
output: runs/mine
model: {path: model}
data: {train: pairs.jsonl, eval: held-out.jsonl, max_length: 64}
reference: {cache: runs/reference}
loss: {name: simpo}
training: {global_batch_size: 4, steps: 4, threads: 1, eval_every: 2}
precision: {dtype: fp32}
checkpoint: {every: 2, best: rewards/accuracies}
logging: {progress: false}
"""
N_OF_POINTS, D_OF_POINTS = (1e7, 3e7, 1e8, 3e8, 1e9), (1e8, 1e9, 1e10, 1e11)


def ours(*arguments: str | Path) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' commands name: a configuration, pairs, prompts, runs, models."""
    desk = tmp_path_factory.mktemp("desk")
    tiny_model(desk / "model", num_hidden_layers=2)
    write_jsonl(desk / "pairs.jsonl", arithmetic_pairs(16))
    tiny_judge(desk / "my-judge", max_position_embeddings=2048)
    for name in ("held-out", "prompts"):
        write_jsonl(desk / f"{name}.jsonl", arithmetic_pairs(6, seed=1))
    (desk / "my.yaml").write_text(CONFIG)
    study = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/studies.md").read_text(), re.DOTALL)
    assert study
    (desk / "my-study.yaml").write_text(study[1].replace("training.steps: 100", "training.steps: 2"))
    points = [(n, d, 1.8 + 480 / n**0.35 + 2000 / d**0.37) for n in N_OF_POINTS for d in D_OF_POINTS]
    lines = ["N,D,loss", *(f"{n},{d},{loss}" for n, d, loss in points)]
    (desk / "points.csv").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        ours("reference", "my.yaml")
        ours("train", "my.yaml")
        ours("train", "my.yaml", "output=runs/lora", "lora.rank=2")
        ours("convert", "model", "nemo2-checkpoint", "--to", "nemo")
        ours("convert", "runs/mine", "my-model", "--to", "hf")
        ours("generate", "model", "--prompts", "prompts.jsonl", "--out", "before.jsonl")
        shutil.copytree("model", "sft-model")
        for name in ("a-seed1", "a-seed2", "b"):
            shutil.copytree("runs/mine", f"runs/{name}")
    return desk


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process in place of eight."""
    here = shutil.copytree(desk, tmp_path / "desk")
    monkeypatch.chdir(here)
    lines = list(commands(ROOT / page))
    if page in FROM_NOTHING:
        shutil.rmtree("runs")
    if any(" my-model --to hf" in line for line in lines):
        shutil.rmtree("my-model")
    for command in lines:
        words, code = shlex.split(command), CODES.get(command, 0)
        for absent, present in STAND_INS.items():
            command = command.replace(absent, present)
        if (found := OURS.match(command)) and code is not None:
            arguments, _, file = found[1].partition(" '>' ")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert cli.main(shlex.split(arguments)) == code, command
            if file:
                Path(file).write_text(printed.getvalue())
        elif words[0] == "python":
            done = subprocess.run([sys.executable, ROOT / words[1], *words[2:]], capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
