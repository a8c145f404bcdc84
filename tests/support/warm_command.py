"""Runs `megatron-spo ARGUMENTS` in a process of the warm server, in place of `python -m megatron_spo ARGUMENTS`.

    python tests/support/warm_command.py ARGUMENTS

If the environment variable KILL has the path of a JSON file {"words": ..., "exists": ...} and the arguments contain the
words, the file is removed, and this process and the command are killed by SIGKILL, as soon as the other path exists if
there is one.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)

from tests.support.processes import WARM_SOCKET, WarmProcess  # noqa: E402

KILL = "SPO_TESTS_KILL"


def main(arguments: list[str]) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    assert WARM_SOCKET in environment
    process = WarmProcess(["-m", "megatron_spo", *arguments], environment, sys.stdout, sys.stderr)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda got, frame: process.send_signal(got))
    plan = Path(environment.get(KILL, "none"))
    if plan.is_file() and (known := json.loads(plan.read_text()))["words"] in " ".join(arguments):
        while known["exists"] and not Path(known["exists"]).exists():
            assert process.poll() is None, "the command ended before it was killed"
            time.sleep(0.01)
        process.kill()
        plan.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
