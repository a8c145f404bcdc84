"""Stable Preference Optimization (SPO, arXiv 2507.07723) on NVIDIA Megatron-Core.

Preference losses such as DPO compare two responses and can lower the probability of both. SPO adds SFT on the chosen
response as the lower level of a bilevel problem, which keeps that from happening. The names on this page are the public
API; everything else may change without notice.

**Train with this package**, as the commands of `megatron-spo` do:

```python
from megatron_spo import convert_checkpoint, evaluate_pairs, load_config, precompute_reference, run_training

if __name__ == "__main__":  # processes that write checkpoints import this file again
    config = load_config("my.yaml", ["loss.beta=0.2"])
    precompute_reference(config)
    run_training(config)
    convert_checkpoint("runs/mine", "my-model", "hf")
    print(evaluate_pairs("my-model", "held-out.jsonl").table())
```

Under torchrun every process runs `precompute_reference` and `run_training`; only one may convert and evaluate.

**Use the objective in another trainer**: `SpoObjective` and `preference_loss` take the log-probs of pairs as tensors
[pairs] and know nothing of configuration files, ranks or micro-batches.

```python
import torch
from megatron_spo import PairLogprobs, SpoObjective

spo = SpoObjective(loss="dpo", parameters={"beta": 0.1}, schedule="penalty", lambda_=1.0)
state = spo.initial_state()
pass_ = spo.plan(0, state).passes[0]
pairs = PairLogprobs(
    chosen=torch.tensor([-12.0, -7.5], requires_grad=True),  # log-probs summed over response tokens, nats
    rejected=torch.tensor([-14.0, -7.0], requires_grad=True),
    chosen_tokens=torch.tensor([9.0, 4.0]),
    rejected_tokens=torch.tensor([11.0, 4.0]),
    reference_chosen=torch.tensor([-12.5, -7.0]),
    reference_rejected=torch.tensor([-13.0, -8.0]),
)
loss, metrics = spo.micro_batch_loss(pairs, pass_, state, batch_pairs=2, batch_chosen_tokens=13)
loss.backward()
state = spo.next_state(state, {name: float(value) for name, value in metrics.items()})
```

`examples/plug_in` does this in a plain Megatron-Core training loop. The modules behind these names, such as
`megatron_spo.objective.losses` with a formula and its source for each loss, have pages of their own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_spo.config.load import load_config
    from megatron_spo.config.schema import Config
    from megatron_spo.convert.export import convert as convert_checkpoint
    from megatron_spo.errors import UserError
    from megatron_spo.evaluate.pairs import evaluate_pairs
    from megatron_spo.objective.losses import PairLogprobs
    from megatron_spo.objective.plug_in import SpoObjective, SpoState, preference_loss
    from megatron_spo.reference.fill import fill as precompute_reference
    from megatron_spo.runtime.cpu_bridge import install as install_cpu_bridge
    from megatron_spo.train.run import train as run_training

__version__ = "0.1.0"
__all__ = [
    "load_config",
    "Config",
    "precompute_reference",
    "run_training",
    "evaluate_pairs",
    "convert_checkpoint",
    "UserError",
    "SpoObjective",
    "SpoState",
    "PairLogprobs",
    "preference_loss",
    "install_cpu_bridge",
]

_SOURCES = {
    "load_config": ("config.load", "load_config"),
    "Config": ("config.schema", "Config"),
    "precompute_reference": ("reference.fill", "fill"),
    "run_training": ("train.run", "train"),
    "evaluate_pairs": ("evaluate.pairs", "evaluate_pairs"),
    "convert_checkpoint": ("convert.export", "convert"),
    "UserError": ("errors", "UserError"),
    "SpoObjective": ("objective.plug_in", "SpoObjective"),
    "SpoState": ("objective.plug_in", "SpoState"),
    "PairLogprobs": ("objective.losses", "PairLogprobs"),
    "preference_loss": ("objective.plug_in", "preference_loss"),
    "install_cpu_bridge": ("runtime.cpu_bridge", "install"),
}
"""Public name -> (module, its name there). Imported when first asked for: torch takes seconds to load."""

if not TYPE_CHECKING:  # a type checker reports names that are not there

    def __getattr__(name: str) -> Any:
        if name not in _SOURCES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _SOURCES[name]
        globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), attribute)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
