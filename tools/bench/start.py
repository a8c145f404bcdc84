"""`python tools/bench/start.py`: seconds from typing a command until it does what was asked, in new processes."""

import json
import os
import subprocess
import sys
import time

import measure
from measure import Result


def main() -> None:
    options = measure.parser(__doc__).parse_args()
    results = [
        _timed("start/--help", 1 if options.quick else 3, "--help"),
        _timed("start/train --help", 1 if options.quick else 3, "train", "--help"),
        _timed("start/doctor", 1, "doctor"),
    ]
    with measure.workplace() as folder:
        measure.write_model(folder / "model", hidden=64)
        measure.write_pairs(folder / "pairs.jsonl", 64, prompt=20, response=20)
        config = measure.write_config(folder, training={"steps": 1, "global_batch_size": 8}, reference={"cache": None})
        config.write_text(json.dumps({**json.loads(config.read_text()), "loss": {"name": "simpo"}}))
        results.append(_timed("start/train to the end of step 1", 1, "train", str(config), f"output={folder}/run"))
    measure.report(results, options.json)


def _timed(name: str, repeats: int, *arguments: str) -> Result:
    """The least of some runs: processor seconds, beside the seconds of the clock."""
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "megatron_spo", *arguments], stdout=subprocess.DEVNULL)
        _, code, usage = os.wait4(process.pid, 0)
        assert code == 0, arguments
        taken.append((usage.ru_utime + usage.ru_stime, time.perf_counter() - begin))
    cpu, clock = min(taken)
    return Result(name, cpu, "s", f"of the processor; {clock:.2f} s by the clock")


if __name__ == "__main__":
    main()
