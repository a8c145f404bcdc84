"""Reaches the Hugging Face hub. Without a network, or without access, there is one clear message within seconds."""

import logging
import threading
from collections.abc import Callable, Sequence
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

    def ask() -> None:
        validate_repo_id(repo)
        HfApi(endpoint=constants.ENDPOINT).auth_check(repo, repo_type=kind)

    error = _answer(ask)
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


def _answer(ask: Callable[[], object]) -> BaseException | None:
    """Calls `ask` and returns its exception, or None; a TimeoutError if it takes more than ANSWER_SECONDS."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            ask()
            outcome.append(None)
        except BaseException as error:  # passed on to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(ANSWER_SECONDS)
    return outcome[0] if outcome else TimeoutError(f"no answer in {ANSWER_SECONDS:.0f} s")


def check_login(repo: str) -> None:
    """Checks that this user can upload to the hub, before hours of work.

    Raises:
        UserError: the name is not `owner/name`, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi, constants

    if repo.count("/") != 1:
        raise UserError(f"--push {repo}: must be the name of a repository, such as me/my-model")
    error = _answer(HfApi(endpoint=constants.ENDPOINT).whoami)
    if error is not None:
        login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        raise UserError(f"--push {repo}: the hub ({constants.ENDPOINT}) does not answer or accept the login "
                        f"({_short(error)}); {login}") from error  # fmt: skip


def push(repo: str, folder: Path) -> str:
    """Uploads a folder to a repository, which is created as a private one if it does not exist; returns its address.

    Raises:
        UserError: the upload failed.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by megatron-spo convert")
    except Exception as error:  # of the network, the hub and its storage; they have no common class
        raise UserError(f"--push {repo}: the upload failed ({_short(error)}); the model is in {folder}. Run `hf upload "
                        f"{repo} {folder}` to try again") from error  # fmt: skip
    return str(address)


def go_offline() -> None:
    """Lets the libraries of Hugging Face in this process use their caches only, without trying to connect."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def _short(error: BaseException) -> str:
    text: Any = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *text])
