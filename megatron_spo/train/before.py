"""What `train` can tell from a configuration and folders, before it imports torch or reads data."""

import json
import shlex
from pathlib import Path

from megatron_spo.config.load import dump_config
from megatron_spo.config.schema import Config
from megatron_spo.data.pairs import check_source
from megatron_spo.errors import UserError

REPORT = "report.html"


def check_paths(config: Config) -> None:
    """Checks what paths alone tell: that the data are there, and the reference cache, if `train` may not make it.

    Raises:
        UserError: something is missing.
    """
    for source in (*config.data.train, *config.data.eval, *config.spo.sft_data):
        check_source(source)
    cache = config.reference.cache
    if cache is not None and not config.reference.make and not any(Path(cache).glob("train-*/index.json")):
        raise UserError(
            f"there is no reference cache in {cache}, and reference.make is false; run: megatron-spo reference "
            "CONFIG.yaml, or set reference.make=true to compute it at the start of the training"
        )


def finished(config: Config) -> str | None:
    """Returns the message for a run with this configuration that has done all its steps, else None."""
    folder = Path(config.output)
    try:
        status = json.loads((folder / "status.json").read_text())
        latest = (folder / "checkpoints/latest").read_text().strip()
        same = (folder / "config.yaml").read_text() == dump_config(config)
        done = same and status["state"] == "done" and latest == f"step_{status['steps']:08d}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not done or not (folder / "checkpoints" / latest).is_dir():
        return None
    if config.logging.report and not (folder / REPORT).exists():
        return None
    return (
        f"{config.output}: already finished, all {status['steps']} steps are done; to train longer, raise "
        f"training.steps or training.epochs; to train anew, set another output\n{what_is_next(config)}"
    )


def what_is_next(config: Config) -> str:
    """Returns the paths and commands that a user needs after the last step, one per line."""
    run, target = shlex.quote(config.output), shlex.quote(f"{config.output.rstrip('/')}-")
    lines = [f"export: megatron-spo convert {run} {target}hf --to hf"]
    if config.lora.rank:
        lines.append(f"adapters: megatron-spo convert {run} {target}peft --to peft")
    if config.checkpoint.best:
        best = shlex.quote(f"{config.output}/checkpoints/best")
        lines.append(f"best by {config.checkpoint.best}: megatron-spo convert {best} {target}best --to hf")
    if config.logging.report:
        lines.insert(0, f"report: {Path(config.output) / REPORT}")
    return "\n".join(f"  {line}" for line in lines)
