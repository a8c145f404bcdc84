"""Scores of one run by the task of this folder; arguments and columns are those of ../score.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # a script's own path is its folder

from examples.studies import score  # noqa: E402
from examples.studies.code import task  # noqa: E402

if __name__ == "__main__":
    score.main(task)
