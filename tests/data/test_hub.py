"""The hub without a network, gated, private or misspelt: one message within seconds; a cached copy is used."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_spo.config.data_source import DataSource
from megatron_spo.data import hub
from megatron_spo.data.pairs import open_source
from megatron_spo.data.tokenize import load_tokenizer
from megatron_spo.errors import UserError
from megatron_spo.model.hf_files import locate_model
from tests.support.tiny import tiny_tokenizer

CODES = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound")}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does when it is asked about a repository."""

    def do_GET(self) -> None:
        name = next(name for name in CODES if name in self.path)
        code, error = CODES[name]
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # go_offline changes it
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield url
        server.shutdown()


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that accepts connections and never answers, as behind some firewalls."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield


def open_data(name: str) -> object:
    return open_source(DataSource(path=name))


@pytest.mark.parametrize(
    ("ask", "name", "parts"),
    [
        (locate_model, "some/gated", ["model.path = 'some/gated' is gated: accept its conditions on ", "HF_TOKEN"]),
        (load_tokenizer, "some/gated", ["model.tokenizer = 'some/gated' is gated"]),
        (open_data, "some/gated", ["data = 'some/gated' is gated", "/datasets/some/gated"]),
        (locate_model, "some/absent", ["nor a model on the hub", "check the name, or log in"]),
        (open_data, "some/absent", ["nor a dataset on the hub"]),
        (locate_model, "/no/such/folder", ["there is no such folder or file", "check the path"]),
    ],
)
def test_no_access(server: str, ask, name: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        ask(name)
    assert all(part in str(raised.value) for part in parts), str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ask", [locate_model, load_tokenizer, open_data])
def test_a_hub_that_does_not_answer(silence: None, monkeypatch: pytest.MonkeyPatch, ask) -> None:
    assert hub.ANSWER_SECONDS < 5
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached .*no answer in"):
        ask("some/model")
    assert time.monotonic() - start < 4


def test_no_network_and_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError) as raised:
        locate_model("some/model")
    assert "cannot be reached (ConnectError: " in str(raised.value)
    assert "run `hf download some/model` on a machine with a network" in str(raised.value)


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        locate_model("some/model")


def test_a_cached_copy_is_used_without_a_network(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    repository = own_cache / "models--some--model"
    tiny_tokenizer(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    assert locate_model("some/model") == repository / "snapshots/abc"
    assert load_tokenizer("some/model").vocab_size == 262
