"""Artifacts sent to a hub and read from it: huggingface_hub itself, against a server that speaks the hub's protocol."""

import base64
import hashlib
import json
import os
import sys
import threading
import traceback
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import bytecap
from bytecap.errors import CheckpointError, OutputError
from bytecap.format import container
from bytecap.format.decoder import side_files
from bytecap.model.checkpoint import load_checkpoint, resolve
from bytecap.pipeline.artifact import Artifact
from bytecap.pipeline.publishing import directory_of
from bytecap.runtimes import hub
from forks import child
from stored import contents_of


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory; every commit replaces files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value, code=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def sha(self, repo):
        return hashlib.sha1(json.dumps(sorted(map(str, self.server.repos[repo].items()))).encode()).hexdigest()  # noqa: S324

    def do_POST(self):
        path, body = urllib.parse.urlparse(self.path).path, self.body()
        where = f"http://127.0.0.1:{self.server.server_port}"
        self.server.asked.append((path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            return self.answer({"url": f"{where}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        for line in body.splitlines():
            found = json.loads(line)
            if found["key"] == "file":
                self.server.repos[repo][found["value"]["path"]] = base64.b64decode(found["value"]["content"])
        sha = self.sha(repo)
        return self.answer({"success": True, "commitUrl": f"{where}/{repo}/commit/{sha}", "commitOid": sha})

    def do_GET(self):
        self.server.gets += 1
        parts = urllib.parse.urlparse(self.path).path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if parts[0] == "api" and len(parts) > 4 and parts[4] == "tree":
            return self.answer([{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}  # noqa: S324
                                for n, d in files.items()])  # fmt: skip
        if parts[0] == "api":
            return self.answer({"id": repo, "sha": self.sha(repo), "siblings": [{"rfilename": n} for n in files]})
        name = "/".join(parts[4:])
        if name not in files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        tag = hashlib.sha1(files[name]).hexdigest()  # noqa: S324
        return self.answer(files[name], ETag=f'"{tag}"', X_Repo_Commit=self.sha(repo))

    do_HEAD = do_GET  # noqa: N815 (the name that http.server looks up)


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    found.repos, found.asked, found.gets = {}, [], 0
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def artifact(model_directory, tmp_path):
    contents = contents_of(load_checkpoint(model_directory()))
    data = container.serialize(contents)
    (tmp_path / "model.bcap").write_bytes(data)
    return Artifact(contents, data, {"model": str(model_directory()), "kl_nats": 0.5, "kl_stderr": 0.25})


PUSH = """
import sys
from bytecap.format import container
from bytecap.pipeline.artifact import Artifact
data = open(sys.argv[1], "rb").read()
artifact = Artifact(container.parse(data), data, {"kl_nats": 0.5, "kl_stderr": 0.25})
print("sent", artifact.push_to_hub("org/tiny", token=sys.argv[2]))
"""
READ = """
import sys, torch, bytecap
from bytecap.pipeline.score import open_model
import bytecap.runtimes.transformers, transformers
ours = open_model("org/tiny")
theirs = transformers.AutoModelForCausalLM.from_pretrained("org/tiny", dtype=torch.float32)
wanted = bytecap.load_model(sys.argv[1]).state_dict()
for module in (ours.module, theirs):
    found = module.state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted), "not the values of the file"
print("equal", ours.name)
"""


ASIDE = {"accelerate", "bytecap", "huggingface_hub", "transformers"}  # they read the environment at import


@pytest.fixture
def outside(tmp_path):
    """Function: (exit code, lines) of a script whose hub is a local server, or huggingface_hub's own offline mode.

    It runs in a fork where only what reads the environment is imported again: torch alone takes longer than that.
    """
    if not hasattr(os, "fork"):
        pytest.skip("no forks here")

    def call(script, *arguments, port, home, offline=False):
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

        def work():
            os.environ.update(environment)
            for name in [n for n in sys.modules if n.partition(".")[0] in ASIDE]:
                del sys.modules[name]
            sys.argv = ["-c", *map(str, arguments)]
            try:
                exec(compile(script, "script", "exec"), {"__name__": "__main__"})  # noqa: S102 (our own text)
            except Exception as exc:
                traceback.print_exc()
                raise SystemExit(1) from exc

        code = child(work, tmp_path / "printed")
        return code, (tmp_path / "printed").read_text("utf-8").splitlines()

    return call


@pytest.mark.slow
@pytest.mark.usefixtures("artifact")
def test_sent_and_read_back(server, tmp_path, outside):
    import bytecap.runtimes.transformers  # noqa: F401 (for all forks)

    code, said = outside(PUSH, tmp_path / "model.bcap", "hf_right", port=server.server_port, home=tmp_path / "a")
    assert (code, said[-1][:21]) == (0, "sent http://127.0.0.1"), said
    files = server.repos["org/tiny"]
    assert {hub.FILE, hub.CARD, hub.SHARDS, "config.json", "tokenizer.json"} <= files.keys()
    assert "0.5000 ± 0.2500" in files[hub.CARD].decode()
    assert container.parse(files[hub.FILE]).files == ()
    read = outside(READ, tmp_path / "model.bcap", port=server.server_port, home=tmp_path / "b")
    assert (read[0], read[1][-1]) == (0, "equal org/tiny"), read
    asked = server.gets
    again = outside(READ, tmp_path / "model.bcap", port=server.server_port, home=tmp_path / "b", offline=True)
    assert (again[0], again[1][-1]) == (0, "equal org/tiny"), again
    assert server.gets == asked > 0
    code, said = outside(READ, tmp_path / "model.bcap", port=server.server_port, home=tmp_path / "c", offline=True)
    assert code == 1
    assert "no hub model of that name" in said[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("artifact")
def test_a_wrong_token_is_one_line(server, tmp_path, outside):
    code, said = outside(PUSH, tmp_path / "model.bcap", "hf_wrong", port=server.server_port, home=tmp_path / "a")
    assert code == 1
    assert said[-1].startswith("bytecap.errors.OutputError: cannot send model.bcap to 'org/tiny' (")
    assert "log in with `hf auth login`" in said[-1]
    assert not server.repos


@pytest.mark.slow
def test_without_network_nothing_is_sent(artifact):
    with pytest.raises(OutputError, match=r"cannot send model\.bcap to 'org/tiny' \(.*: check the name and the net"):
        artifact.push_to_hub("org/tiny", token="x")  # noqa: S106
    with pytest.raises(OutputError, match="a/b/c"):
        artifact.push_to_hub("a/b/c")
    with pytest.raises(bytecap.UsageError, match="nothing to send"):
        Artifact(artifact.contents, b"").push_to_hub("org/tiny")


def test_without_network_nothing_is_read():
    with pytest.raises(CheckpointError, match=r"no hub model of that name .*check the name and the network"):
        resolve("org/none-of-that-name")


def test_files_of_a_plain_artifact(artifact, tmp_path):
    files = directory_of(artifact.contents, artifact.report)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    contents, beside = hub.read(tmp_path)
    wanted = side_files(artifact.contents)
    assert beside.keys() == wanted.keys()
    assert {n: d for n, d in beside.items() if n != "config.json"} == {
        n: d for n, d in wanted.items() if n != "config.json"
    }
    assert json.loads(beside["config.json"]) == json.loads(wanted["config.json"])
    assert [u.data for u in contents.units] == [u.data for u in artifact.contents.units]


def test_without_a_config_there_is_no_directory(artifact):
    from dataclasses import replace

    with pytest.raises(bytecap.ArtifactError, match="no-config"):
        replace(artifact, contents=replace(artifact.contents, files=())).push_to_hub("org/tiny")
