"""The shape of the code: who imports whom, sizes, and that every key is read."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_spo.config.data_source import DataSource
from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.schema import Config, keys_of, section_class

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_spo"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_KEYS = 400, 60, 8, 91
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, FUNCTION]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, FUNCTION):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def keys() -> Iterator[tuple[str, str]]:
    """(section, attribute) of every key; the plain ones and a data source's have their own "sections"."""
    for name in Config.model_fields:
        section = section_class(name)
        if section is None:
            yield "config", name
        else:
            yield from ((name, attribute) for attribute in keys_of(section).values())
    yield from (("source", attribute) for attribute in keys_of(DataSource).values())


def test_import_arrows() -> None:
    """In a process of its own: import-linter reconfigures logging."""
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_megatron_core_only() -> None:
    for path in SOURCES:
        assert not re.search(r"megatron\.(training|legacy)\b", path.read_text()), path


def test_only_runtime_reads_the_environment() -> None:
    for path in SOURCES:
        if path.parent.name != "runtime":
            assert not re.search(r"os\.(environ|getenv)", path.read_text()), path


def test_sizes() -> None:
    too_big = [str(path) for path in SOURCES if len(path.read_text().splitlines()) > MAX_FILE_LINES]
    for name, node in functions():
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES or count > MAX_PARAMETERS:
            too_big.append(f"{name}: {lines} lines, {count} parameters")
    assert not too_big, "\n".join(too_big)


def test_every_key_is_read() -> None:
    read = {key for spec in LOSS_SPECS.values() for key in spec.parameters}  # through LossConfig.parameters
    for path in SOURCES:
        if path.name not in ("schema.py", "document.py"):
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    unread = [f"{section}.{attribute}" for section, attribute in keys() if attribute not in read]
    assert not unread, unread


def test_number_of_keys() -> None:
    assert len(list(keys())) <= MAX_KEYS


def test_every_folder_is_a_package() -> None:
    assert all((path.parent / "__init__.py").exists() for path in SOURCES)
