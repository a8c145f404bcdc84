"""Runs lm-evaluation-harness on a Hugging Face model folder (extra `eval`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_spo.errors import UserError
from megatron_spo.evaluate.answers import aligned
from megatron_spo.evaluate.pretrained import load_model, load_tokenizer


def run_tasks(model: Path, tasks: Sequence[str], batch_size: int) -> dict[str, Any]:
    """Returns the harness's results of tasks, given as registered names or YAML files.

    Raises:
        UserError: If the harness is not installed or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"evaluate --tasks needs lm-evaluation-harness ({error}); pip install -e '.[eval]'") from error
    files = [task for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise UserError(f"task file {missing[0]} does not exist")
    manager = TaskManager(include_defaults=len(files) < len(tasks))  # indexing all built-in tasks takes seconds
    for task in tasks:
        if task not in files and task not in manager.all_tasks:
            raise UserError(f"lm-evaluation-harness has no task {task!r}; `lm_eval ls tasks` lists them")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=load_model(model), tokenizer=load_tokenizer(model), batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        log_samples=False,
    )
    assert found is not None  # it is None only on ranks other than 0
    return {key: found[key] for key in ("results", "versions", "n-shot", "n-samples", "configs", "config")}


def table(found: dict[str, Any]) -> str:
    """Returns a table for the terminal, one metric per line with its standard error."""
    lines = [["task", "metric", "value"]]
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, comma, filtered = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{name}_stderr,{filtered}")
                spread = f" +- {error:.4f}" if isinstance(error, int | float) else ""
                lines.append([task, name if filtered == "none" else f"{name} ({filtered})", f"{value:.4f}{spread}"])
    return aligned(lines)
