"""Answers to held-out prompts during training: exports the current weights for Hugging Face, generates and scores."""

import logging
import shutil
from typing import TYPE_CHECKING, Any

from megatron_spo.checkpoint.folder import step_name
from megatron_spo.checkpoint.save import SaveFailed, Saver
from megatron_spo.config.data_source import DataSource
from megatron_spo.config.schema import Config
from megatron_spo.convert.export import to_hf
from megatron_spo.data.arrow import to_numpy
from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.data.json_lines import parse_line, read_lines
from megatron_spo.data.pairs import open_source
from megatron_spo.evaluate.scores import score
from megatron_spo.model.optimizer import Trainable
from megatron_spo.prepare import Inputs
from megatron_spo.runtime.processes import Runtime, on_main
from megatron_spo.train.run_directory import RunDirectory
from megatron_spo.train.state import TrainState

LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron_spo.evaluate.sampling import Response

ROOM = 2
"""Limit of an answer's length, relative to the longest chosen answer of the prompts."""
LOGGED = ("exact_match", "malformed", "rep_4", "distinct_2", "length_ratio")


class HeldOutAnswers:
    """Answers the first `monitor.generate_prompts` prompts of each held-out set greedily; a failure ends no run."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        trainable: Trainable,
        record: dict[str, Any],
        *,
        directory: RunDirectory,
        runtime: Runtime,
    ) -> None:
        self._config, self._sources, self._directory, self._runtime = config, inputs, directory, runtime
        self._folder = directory.path / ".answers"
        self._saver = Saver(self._folder, trainable, record, keep=1, weights_only=True)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Answers with the current weights and logs scores and samples; all ranks must call it together.

        Returns the share of correct answers for each set that has correct answers, on all ranks.
        """
        try:
            on_main(lambda: shutil.rmtree(self._folder, ignore_errors=True), SaveFailed)
            self._saver.start(state, in_background=False)
            self._saver.finished(wait=True)
        except SaveFailed as error:
            self._warn(state.step, error)
            return {}
        return on_main(lambda: self._answer(state.step), SaveFailed)

    def _answer(self, step: int) -> dict[str, float]:
        try:
            to_hf(self._folder / step_name(step), self._folder / "hf")
            return self._answer_all(step)
        except Exception as error:  # a killed process, a full disk, or any error of transformers
            self._warn(step, error)
            return {}
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _warn(self, step: int, error: Exception) -> None:
        if self._runtime.is_main:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            LOG.warning(f"step {step}: no answers to held-out prompts ({reason}); training continues")

    def _answer_all(self, step: int) -> dict[str, float]:
        from megatron_spo.evaluate.sampling import Sampling
        from megatron_spo.evaluate.subprocess import answer_in_subprocess  # imports the models of transformers

        sets, prompts, monitor = self._sources.evals, [], self._config.monitor
        counts = {name: min(monitor.generate_prompts, len(dataset)) for name, dataset in sets.items()}
        longest = 0
        for name, dataset in sets.items():
            for i in range(counts[name]):
                example = dataset.get(i)
                prompts.append(example.chosen_ids[: example.prompt_length].tolist())
                longest = max(longest, int(dataset.chosen_tokens[i]))
        room = self._sources.shape.max_positions - max(map(len, prompts))
        sampling = Sampling(max_new_tokens=min(ROOM * longest, room))
        responses = iter(answer_in_subprocess(self._folder / "hf", prompts, sampling))
        right: dict[str, float] = {}
        for source, (name, dataset) in zip(self._config.data.eval, sets.items(), strict=True):
            rows = self._rows(source, dataset, counts[name])
            found = self._log(step, name, rows, [next(responses)[0] for _ in rows])
            right |= {name: found["exact_match"]} if "exact_match" in found else {}
        return right

    def _rows(self, source: DataSource, dataset: TokenizedSet, count: int) -> list[dict[str, Any]]:
        """Returns the first rows of the file, with prompt and chosen answer as decoded from their tokens."""
        raw, rows = open_source(source), []
        for i in range(count):
            at = dataset.line(i) - 1
            if raw.file is None:
                row = raw.rows[at]
            else:
                starts, ends = (to_numpy(raw.rows.slice(at, 1)[name]) for name in ("start", "end"))
                row = parse_line(next(read_lines(raw.file, starts, ends))) or {}
            example = dataset.get(i)
            prompt, chosen = example.chosen_ids[: example.prompt_length], example.chosen_ids[example.prompt_length :]
            rows.append({**row, "prompt": self._text(prompt), "reference": self._text(chosen)})
        return rows

    def _text(self, ids: Any) -> str:
        return str(self._sources.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def _log(self, step: int, name: str, rows: list[dict[str, Any]], answers: "list[Response]") -> dict[str, float]:
        """Logs the scores and samples; returns the mean scores."""
        scores = score(rows, [[one.text] for one in answers], [[one.finished] for one in answers])
        means = {key: value for key, value in scores.metrics().items() if key in LOGGED}
        named = {f"generation/{key}": value for key, value in means.items()}
        self._directory.log("generation", step, {"data": name, **named})
        samples = [
            {"step": step, "data": name, "prompt": row["prompt"], "answer": answer.text, "reference": row["reference"],
             "exact_match": found[0].exact_match, "malformed": found[0].malformed}
            for row, answer, found in zip(rows, answers, scores.answers, strict=True)
        ]  # fmt: skip
        self._directory.log_samples(f"samples/{name}", step, samples)
        return means
