"""The public names: light to import, documented, and the same for a type checker as at run time."""

import ast
import inspect
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pdoc
import pytest
import torch

import megatron_spo

PACKAGE = Path(megatron_spo.__file__).parent


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import megatron_spo; ours = set(sys.modules) - before\n"
        "from megatron_spo import Config, UserError, load_config\n"
        "print(sorted(name for name in ours if name.startswith('megatron')))\n"
        "print({'torch', 'megatron', 'transformers', 'numpy', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["['megatron_spo']", "set()"], done.stderr


def test_every_name_resolves_and_is_documented() -> None:
    assert sorted(megatron_spo.__all__) == sorted(megatron_spo._SOURCES)
    for name in megatron_spo.__all__:
        public = getattr(megatron_spo, name)
        text = inspect.getdoc(public)
        assert text and name in dir(megatron_spo), name
        if inspect.isfunction(public):
            assert "Raises:" in text and inspect.signature(public).return_annotation is not inspect.Parameter.empty
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        megatron_spo.trian  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        exec("from megatron_spo import trian")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    seen = {
        alias.asname or alias.name: (str(node.module).removeprefix("megatron_spo."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == megatron_spo._SOURCES
    assert (PACKAGE / "py.typed").exists() and '"py.typed"' in (PACKAGE.parent / "setup.py").read_text()


def test_no_name_is_that_of_a_module() -> None:
    """Importing megatron_spo.train would put the module in the place of a function of that name."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert not modules & set(megatron_spo.__all__)


def test_the_example_of_the_page_runs() -> None:
    """DPO + relative penalty at beta 0.1 and lambda 1: h is 1.5 and -1.5, and the mean of the chosen sums -9.75."""
    example = re.findall(r"```python\n(.*?)```", megatron_spo.__doc__ or "", re.DOTALL)[1]
    found: dict[str, Any] = {}
    exec(example, found)
    by_hand = sum(math.log1p(math.exp(-0.1 * h)) for h in (1.5, -1.5)) / 2
    assert found["metrics"]["loss/preference"] == pytest.approx(by_hand)
    assert found["loss"].item() == pytest.approx(by_hand + 0.1 * 9.75)
    assert found["state"].schedule.gap == pytest.approx(0.0, abs=1e-6)  # (19.5 - 19.5) / 13
    assert torch.isfinite(found["pairs"].chosen.grad).all()


def test_the_page_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in megatron_spo.__all__:
        monkeypatch.delitem(vars(megatron_spo), name, raising=False)  # as if nobody had asked for them
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # how pdoc reports a name that it does not find
        pdoc.pdoc("megatron_spo", output_directory=tmp_path)
    page = (tmp_path / "megatron_spo.html").read_text()
    places = [page.index(f'<section id="{name}">') for name in megatron_spo.__all__]
    assert places == sorted(places)
    for part in ("lower level of a bilevel problem", "Use the objective in another trainer", "nats per chosen token"):
        assert part in page
