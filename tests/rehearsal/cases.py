"""Rehearses the step of the cases of test_step.py, one after another in this process.

cases.py OUT '{"name": [config, model or null, GPUs, rank, layers or null, [overrides]], ...}'
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> None:
    from megatron_spo.planner.options import Options
    from megatron_spo.planner.plan import planned_run
    from megatron_spo.rehearsal.step import rehearse_step
    from megatron_spo.rehearsal.table import as_text, planned_memory
    from megatron_spo.rehearsal.waits import unexplained

    out, cases = sys.argv[1:]
    found: dict[str, Any] = {}
    for name, (config, model, gpus, rank, layers, overrides) in json.loads(cases).items():
        options = Options(config, overrides, gpus, "h100", {}, model, 100, 200, 2000, None, 0, None)
        job, notes = planned_run(options)
        if layers is not None:
            job = replace(job, shape=replace(job.shape, layers=layers))
        report = rehearse_step(job, rank)
        planned = planned_memory(job, report)
        found[name] = {
            "stage": report.stage,
            "rows": len(report.rows),
            "layers": job.shape.layers,
            "planned": vars(planned),
            "static": report.static,
            "weights": report.weights,
            "gradients": report.gradients,
            "optimizer": report.optimizer,
            "peak": report.peak,
            "calls": {f"{one.kind} {one.group}": calls for one, calls in report.calls.items()},
            "sent": {f"{one.kind} {one.group}": size for one, size in report.sent.items()},
            "waits": {f"{what} in {where}": calls for (what, where), calls in report.waits.items()},
            "unexplained": unexplained(report.waits, len(report.rows)),
            "text": as_text(job, report, notes),
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
