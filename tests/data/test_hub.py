"""The hub without a network, gated, private or misspelt: one message within seconds; a cached copy is used."""

import base64
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from megatron_spo import cli
from megatron_spo.config.data_source import DataSource
from megatron_spo.data import hub
from megatron_spo.data.pairs import open_source
from megatron_spo.data.tokenize import load_tokenizer
from megatron_spo.errors import UserError
from megatron_spo.model.hf_files import locate_model
from tests.support.tiny import tiny_model, tiny_tokenizer

CODES = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound")}


UPLOADED: dict[str, bytes] = {}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does when it is asked about a repository."""

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2" and self.headers.get("Authorization") == "Bearer hf_good":
            return self._answer({"name": "me", "type": "user"})
        name = next((name for name in CODES if name in self.path), "absent")
        code, error = CODES[name]
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        """Accepts uploads: the calls of create_repo and upload_folder."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            assert b"private" in body
            answer = {"url": f"{constants.ENDPOINT}/me/model"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    UPLOADED[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{constants.ENDPOINT}/me/model/commit/1", "commitOid": "1"}
        self._answer(answer)

    def _answer(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

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


def test_push(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    tiny_model(tmp_path / "model", num_hidden_layers=1)
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "megatron"), "--to", "megatron"]) == 0
    target = tmp_path / "hf"
    command = ["convert", str(tmp_path / "megatron"), str(target), "--to", "hf", "--push", "me/model"]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert "uploaded to http://" in capsys.readouterr().out
    assert UPLOADED == {file.name: file.read_bytes() for file in target.iterdir()} != {}


@pytest.mark.parametrize(
    ("name", "to", "part"),
    [
        ("me/model", "hf", "does not answer or accept the login"),
        ("model", "hf", "must be the name of a repository, such as me/my-model"),
        ("me/model", "nemo", "is not a format of the hub"),
    ],
)
def test_push_is_checked_before_the_work(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, to: str, part: str
) -> None:
    assert cli.main(["convert", "/no/source", str(tmp_path / "out"), "--to", to, "--push", name]) == 2
    assert part in capsys.readouterr().err
