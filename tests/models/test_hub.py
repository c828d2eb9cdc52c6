"""download, against a local server that speaks as the hub does."""

import hashlib
import http.server
import json
import threading

import pytest

from rlalign.models import download

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "modeling_own.py": b"raise SystemExit",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """One model, one that is gated, one whose server breaks."""

    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        self.server.asked.append(self.path)
        status, content, headers = self.found()
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def found(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/team/good") and "missing" not in path:
            siblings = [{"rfilename": name} for name in FILES]
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in FILES.items()]
            info = entries if "/tree/" in path else {"id": "team/good", "sha": COMMIT, "siblings": siblings}
            return 200, json.dumps(info).encode(), {"Content-Type": "application/json"}
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/team/good/resolve/") and name in FILES:
            tag = hashlib.sha1(FILES[name]).hexdigest()
            return 200, FILES[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        if "gated" in path:
            return 403, b"{}", {"X-Error-Code": "GatedRepo"}
        if "broken" in path:
            return 400, b"{}", {}
        code = "RevisionNotFound" if "missing" in path else "RepoNotFound"
        return 404, b"{}", {"X-Error-Code": code}

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_weights_and_configuration_come_and_neither_code_nor_pickles(hub, tmp_path):
    folder = download("team/good", tmp_path / "model", endpoint=address(hub))
    there = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert there == {name: FILES[name] for name in ("config.json", "tokenizer.json", "model.safetensors")}
    assert not any(name in path for path in hub.asked for name in ("pytorch_model.bin", "modeling_own.py"))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("team/none", None, "there is no model team/none, or it is private: check the name, or `hf auth login`"),
        ("team/good", "missing", "there is no model team/good at revision missing"),
        ("team/gated", None, "team/gated asks for permission: accept its terms on its page"),
        ("team/broken", None, "team/broken could not be downloaded into .*model: "),
    ],
)
def test_what_cannot_be_had_is_said(hub, tmp_path, name, revision, message):
    with pytest.raises(OSError, match=message):
        download(name, tmp_path / "model", revision=revision, endpoint=address(hub))


def test_no_network(hub, tmp_path):
    hub.server_close()
    with pytest.raises(OSError, match="team/good could not be downloaded into"):
        download("team/good", tmp_path / "model", endpoint="http://127.0.0.1:9")
