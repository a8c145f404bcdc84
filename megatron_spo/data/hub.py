"""Reaches the Hugging Face hub. Without a network, or without access, there is one clear message within seconds."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_spo.errors import UserError

LOG = logging.getLogger(__name__)

ANSWER_SECONDS = 4.0
"""How long to wait for the hub's answer whether a repository exists. Its own timeouts and retries take minutes."""
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
"""Patterns of the files of a hub repository that a model folder needs."""
SMALL_FILES = tuple(pattern for pattern in MODEL_FILES if pattern != "*.safetensors")
"""The same without the weights."""


def download(repo: str, key: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Returns the local copy of a model on the hub; downloads what is not cached.

    Without a connection, a cached copy is used.

    Args:
        repo: hub id of the model.
        key: configuration key or option that names it, for messages.
        patterns: patterns of the files.

    Raises:
        UserError: there is no such model, it may not be read, or it is neither cached nor can the hub be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = no_connection(repo, key, "model")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=reason is not None))
    except (LocalEntryNotFoundError, OSError) as error:
        if reason is None:
            raise UserError(f"{key} = {repo!r}: the download failed ({_short(error)}); run the command again to "
                            "continue it") from error  # fmt: skip
        raise UserError(f"{key} = {repo!r} is not a folder, it is not in the cache of the hub, and {reason}; give a "
                        f"folder, or run `hf download {repo}` on a machine with a network and copy its cache (HF_HOME)"
                        ) from error  # fmt: skip
    if reason is not None:
        LOG.warning(f"{key} = {repo!r}: {reason}; using the cached copy in {folder}")
    return folder


def no_connection(repo: str, key: str, kind: Literal["model", "dataset"]) -> str | None:
    """Asks the hub whether a repository can be read; returns None if it can, or why the hub cannot be reached.

    Raises:
        UserError: there is no such repository, or it may not be read.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    outcome: list[BaseException | None] = []

    def ask() -> None:
        try:
            validate_repo_id(repo)
            HfApi(endpoint=constants.ENDPOINT).auth_check(repo, repo_type=kind)
            outcome.append(None)
        except BaseException as error:  # passed on to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=ask, name="hub", daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(ANSWER_SECONDS)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {ANSWER_SECONDS:.0f} s")
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if error is None:
        return None
    if isinstance(error, GatedRepoError):
        raise UserError(f"{key} = {repo!r} is gated: accept its conditions on {page}, and log in with `hf auth login` "
                        "or set HF_TOKEN") from error  # fmt: skip
    if isinstance(error, HFValidationError):
        raise UserError(f"{key} = {repo!r}: there is no such folder or file, and this cannot be the name of a {kind} "
                        "on the hub; check the path") from error  # fmt: skip
    if isinstance(error, RepositoryNotFoundError):
        raise UserError(f"{key} = {repo!r} is neither a local folder or file nor a {kind} on the hub ({page}); check "
                        "the name, or log in with `hf auth login` if it is private") from error  # fmt: skip
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if not isinstance(error, Exception):
        raise error
    return f"the hub ({constants.ENDPOINT}) cannot be reached ({_short(error)})"


def go_offline() -> None:
    """Lets the libraries of Hugging Face in this process use their caches only, without trying to connect."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _short(error: BaseException) -> str:
    text: Any = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *text])
