"""A stand-in for the browser's runtime, the package it comes in, and folders made of it."""

import hashlib
import io
import json
import tarfile

from bytecap.runtimes.web.folder import MODEL, Site
from bytecap.runtimes.web.runtime import NAME, parse_package

# Continues every prompt with the number of bytes it was given; enough of the real interface for the page.
SCRIPT = b"""
export class Wllama {
  constructor(paths) { this.paths = paths; }
  async loadModel(blobs, options) {
    const place = this.paths["single-thread/wllama.wasm"];
    if (options.n_threads !== 1 || !place) throw new Error("not the single-thread build");
    const code = await (await fetch(place)).text();
    if (code !== "wasm of the stand-in") throw new Error("another wasm: " + code);
    this.size = blobs[0].size;
  }
  async createCompletion(prompt, { nPredict, sampling, onNewToken }) {
    (globalThis.prompts ??= []).push(prompt);
    if (prompt.includes("too long")) throw new Error("context is full");
    let text = "", stop = false;
    for (let i = 0; i < nPredict && !stop; i++) {
      text += ` ${this.size}:${sampling.temp}`;
      onNewToken(i, null, text, { abortSignal: () => { stop = true; } });
      await new Promise((r) => setTimeout(r, 1));
    }
    return text;
  }
}
"""


def package(name=NAME, version="2.9.9", **changes):
    """Bytes of an npm package; a member that is None is left out."""
    about = json.dumps({"name": name, "version": version}).encode()
    members = {
        "package/package.json": about, "package/esm/index.min.js": SCRIPT, "package/LICENCE": b"MIT License",
        "package/esm/single-thread/wllama.wasm": b"wasm of the stand-in", "package/../../evil": b"out",
    }  # fmt: skip
    members |= {f"package/{n.replace('__', '/')}": d for n, d in changes.items()}
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w:gz") as tar:
        for path, data in members.items():
            if data is not None:
                info = tarfile.TarInfo(path)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return into.getvalue()


def folder(directory, model, runtime=None, title="tiny", chat=None):
    """Write a folder of a model's bytes."""
    site = Site(title, 128, len(model) + 10_000_000, runtime or parse_package(package(), "stand-in"), chat)
    directory.mkdir()
    (directory / MODEL).write_bytes(model)
    for name, data in site.files(len(model), hashlib.sha256(model).hexdigest()).items():
        (directory / name).write_bytes(data)
    return directory
