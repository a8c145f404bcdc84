"""`megatron-spo slurm submit`: checks a configuration and submits a SLURM job that runs all its steps."""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spo.commands.configuration import CommandParser, add_configuration
from megatron_spo.commands.plan import positive_integer
from megatron_spo.errors import UserError
from megatron_spo.planner.gpus import GPUS
from megatron_spo.runtime import env

if TYPE_CHECKING:
    from megatron_spo.config.schema import Config

SCRIPT = "slurm/job.sh"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True,
                                    parser_class=CommandParser)  # fmt: skip
    text = "submit a job: reference pass, training, export and, with SPO_PROMPTS, answers; slurm/README.md has details"
    submit = actions.add_parser("submit", help=text, description=text, allow_abbrev=False, conflict_handler="resolve",
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_configuration(submit)
    submit.add_argument("--nodes", type=positive_integer, required=True, help="number of nodes")
    submit.add_argument("--gpus-per-node", type=positive_integer, default=8, metavar="N", help="[%(default)s]")
    submit.add_argument("--gpu", default="h100", choices=GPUS, help="type of the GPUs, for the checks [%(default)s]")
    submit.add_argument("--out", type=Path, help="folder for all output, shared by all nodes [output of the "
                        "configuration]")  # fmt: skip
    submit.add_argument("--time", help="time limit, as for sbatch; the job continues after it [that of the partition]")
    submit.add_argument("--mail", metavar="ADDRESS", help="send mail at the end and on failure")
    submit.add_argument("--sbatch", action="append", default=[], metavar="OPTIONS", help="further options of sbatch, "
                        "such as --sbatch='--partition=gpu --account=me'")  # fmt: skip
    submit.add_argument("--check", action="store_true", help="only check; submit nothing")
    submit.add_argument("--print", action="store_true", help="print the command instead of running it")


def run(options: argparse.Namespace) -> None:
    """Checks, and submits or prints.

    Raises:
        UserError: a check fails, or sbatch rejects the job.
    """
    from megatron_spo.commands.train import check
    from megatron_spo.config.load import load_config

    overrides, gpus = list(options.overrides), options.nodes * options.gpus_per_node
    config = load_config(options.config, overrides, world_size=gpus, elsewhere=True)
    out = (options.out or Path(config.output)).absolute()
    if not options.print:
        check(options.config, [*overrides, f"output={out}/run"], gpus, options.gpu)
    variables = _variables(options, config, out)
    command = ["sbatch", *_sbatch_options(options, variables), str(Path(variables["SPO_HOME"]) / SCRIPT)]
    if options.print:
        print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command]))
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not installed on this machine; run the command on a login node of the cluster, or "
                        "use --print to see what it would run")  # fmt: skip
    if options.check:
        command.insert(1, "--test-only")
    done = subprocess.run(["env", *(f"{name}={value}" for name, value in variables.items()), *command],
                          capture_output=True, text=True)  # fmt: skip
    said = (done.stdout + done.stderr).strip().removeprefix("sbatch: ")
    if done.returncode:
        raise UserError(f"SLURM did not accept the job: {said}")
    print(f"ok     SLURM          {said}" if options.check else f"{said}; logs in {variables['SPO_OUT']}/logs")


def _variables(options: argparse.Namespace, config: "Config", out: Path) -> dict[str, str]:
    """Returns the variables of the job. Those that are set already are kept, except configuration and output."""
    from megatron_spo.scaling.slurm import scripts_home

    cache = config.reference.cache
    defaults = {"SPO_LAYOUT": ""}  # the layout is that of the configuration
    defaults |= {"SPO_STEPS": "train export evaluate"} if cache is None else {"SPO_CACHE": str(Path(cache).absolute())}
    if "SPO_CONTAINER" not in env.job_variables():
        defaults["SPO_PYTHON"] = sys.executable
    own = {"SPO_HOME": str(scripts_home()), "SPO_CONFIG": str(Path(options.config).absolute()), "SPO_OUT": str(out)}
    if options.overrides:
        own["SPO_OVERRIDES"] = shlex.join(options.overrides)
    return {name: value for name, value in defaults.items() if name not in env.job_variables()} | own


def _sbatch_options(options: argparse.Namespace, variables: dict[str, str]) -> list[str]:
    chosen = [f"--nodes={options.nodes}", f"--ntasks-per-node={options.gpus_per_node}"]
    if env.job_variables().get("SPO_DEVICE") != "cpu":
        chosen.append(f"--gpus-per-node={options.gpus_per_node}")
    if options.time:
        chosen.append(f"--time={options.time}")
    if options.mail:
        chosen += ["--mail-type=END,FAIL", f"--mail-user={options.mail}"]
    return [*chosen, *(word for words in options.sbatch for word in shlex.split(words))]
