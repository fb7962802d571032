"""The exported page in headless Chromium: hashes, what is said of a spoiled download, offline use, greedy text."""

import functools
import hashlib
import http.server
import json
import threading
import time

import pytest

import bytecap
from bytecap.errors import UsageError
from bytecap.runtimes.web.folder import MODEL, WASM
from bytecap.runtimes.web.runtime import read_runtime
from chromium import BROWSER, Chromium
from conftest import SMALL
from web import folder

pytestmark = [pytest.mark.skipif(BROWSER is None, reason="no Chromium in PATH"), pytest.mark.browser]
BYTES = bytes(range(256)) * 400
CLOSE = 0.05  # nats between two tokens of which sums in another order may take either


class Files(http.server.SimpleHTTPRequestHandler):
    """A static server that can spoil one file."""

    def do_GET(self):
        name = self.path.lstrip("/")
        spoil = self.server.spoiled.get(name)
        if name == self.server.held:
            data = (self.server.directory / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.server.go_on.wait(300)
            self.wfile.write(data[len(data) // 2 :])
        elif spoil is None:
            super().do_GET()
        else:
            data = spoil((self.server.directory / name).read_bytes())
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Function: a running server of a directory, and its address."""
    running = []

    def start(directory):
        handler = functools.partial(Files, directory=str(directory))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.directory, server.spoiled, server.held, server.go_on = directory, {}, None, threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server, f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One browser for all tests: to start one takes longer than most of them."""
    found = Chromium(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def browser(chromium):
    chromium.renew()
    return chromium


def settled(browser, *words, seconds=300):
    """Wait until the page is in one of these states; returns which."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = browser.run("document.body?.dataset.state")
        if state in words:
            return state
        time.sleep(0.1)
    raise AssertionError((state, shown(browser, "state"), shown(browser, "trouble")))


def within(browser, expression, seconds=60):
    """Wait until something is true on the page."""
    until = time.monotonic() + seconds
    while not (found := browser.run(expression)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def shown(browser, name):
    return browser.run(f"document.getElementById('{name}').textContent")


def begin(browser):
    browser.run("document.getElementById('start').click()")
    return settled(browser, "ready", "failed")


def generated(browser, prompt, tokens, temperature=0):
    browser.run(
        f"""document.getElementById('prompt').value = {prompt!r}; document.getElementById('most').value = {tokens};
        document.getElementById('temperature').value = {temperature}; document.getElementById('go').click()"""
    )
    settled(browser, "ready")
    assert shown(browser, "trouble") == ""
    return shown(browser, "text")


class TestPage:
    @pytest.mark.parametrize(("width", "dark"), [(390, False), (1200, True)])
    def test_it_asks_counts_and_continues_a_text(self, browser, serve, tmp_path, width, dark):
        _, address = serve(folder(tmp_path / "site", BYTES))
        browser.visit(address, width, dark=dark)
        assert settled(browser, "idle", "failed") == "idle"
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert not any(u.endswith((".gguf", ".pack")) for u in asked)  # nothing large before it is asked for
        assert begin(browser) == "ready", shown(browser, "trouble")
        assert generated(browser, "So", 3) == "So" + 3 * f" {len(BYTES)}:0"
        assert generated(browser, "So", 2, 0.7) == "So" + 2 * f" {len(BYTES)}:0.7"
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 300) == dark
        urls = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
        assert all(u.startswith((address, "blob:", "data:")) for u in urls)

    def test_it_says_how_much_has_arrived_while_it_downloads(self, browser, serve, tmp_path):
        server, address = serve(folder(tmp_path / "site", BYTES))
        server.held = MODEL
        browser.visit(address, 390)
        settled(browser, "idle")
        made = json.loads(shown(browser, "made"))
        whole = sum(f["bytes"] for f in made["files"])
        arrived = whole - len(BYTES) // 2
        browser.run("document.getElementById('start').click()")
        try:
            said = f"{arrived:,} of {whole:,} bytes"
            assert within(browser, f"document.getElementById('state').textContent === {said!r}"), shown(
                browser, "state"
            )
            assert browser.run("document.getElementById('bar').checkVisibility()")
            assert browser.run("document.getElementById('bar').value") == pytest.approx(arrived / whole)
            assert browser.run("document.body.dataset.state") == "loading"
        finally:
            server.go_on.set()
        assert settled(browser, "ready", "failed") == "ready"

    def test_it_stops_when_told_to(self, browser, serve, tmp_path):
        _, address = serve(folder(tmp_path / "site", BYTES))
        browser.visit(address, 900)
        settled(browser, "idle")
        assert begin(browser) == "ready"
        browser.run("document.getElementById('most').value = 100000; document.getElementById('go').click()")
        settled(browser, "running")
        browser.run("document.getElementById('stop').click()")
        settled(browser, "ready")
        assert int(shown(browser, "speed").partition(" ")[0]) < 100_000

    @pytest.mark.parametrize(
        ("name", "spoil", "said"),
        [
            (MODEL, lambda d: d[:-10], f"model.gguf is cut short: {len(BYTES) - 10:,} of {len(BYTES):,} bytes arrived"),
            (MODEL, lambda d: d + b"x", "model.gguf is longer than the 102,400 bytes"),
            (MODEL, lambda d: b"\x01" + d[1:], "model.gguf was changed on the way: its SHA-256 is"),
            (WASM, lambda d: d[:-1] + b"\x07", "wllama.wasm.pack was changed on the way"),
            (MODEL, lambda _: b"", "the server answered 404"),
        ],
    )
    def test_a_spoiled_download_is_said_and_can_be_tried_again(self, browser, serve, tmp_path, name, spoil, said):
        server, address = serve(folder(tmp_path / "site", BYTES))
        server.spoiled[name] = spoil
        browser.visit(address, 390)
        settled(browser, "idle")
        assert begin(browser) == "failed"
        assert said in shown(browser, "trouble")
        assert not browser.run("getComputedStyle(document.getElementById('trouble')).display === 'none'")
        server.spoiled.clear()
        assert begin(browser) == "ready"

    def test_it_works_without_a_server_afterwards_and_drops_what_is_spoiled(self, browser, serve, tmp_path):
        server, address = serve(folder(tmp_path / "site", BYTES))
        browser.visit(address, 390)
        settled(browser, "idle")
        assert begin(browser) == "ready"
        assert browser.run("document.body.dataset.kept") == "true"
        server.shutdown()
        server.server_close()
        browser.visit(address, 390)  # starts by itself
        assert settled(browser, "ready", "failed") == "ready"
        assert generated(browser, "So", 1) == f"So {len(BYTES)}:0"
        browser.run(f"""(async () => {{ for (const n of await caches.keys()) await (await caches.open(n)).put(
            {MODEL!r}, new Response("damaged")); return true; }})()""")
        browser.visit(address, 390)
        assert settled(browser, "ready", "failed") == "failed"
        assert "no connection" in shown(browser, "trouble")


CHAT = {"before": "<s><b>u</b>", "asked": "</script><a>", "answered": "<z>", "control": ["<a>", "<s>"]}
MARKUP = "<img src=x onerror=document.title='run'>&lt;\n two"


class TestConversation:
    """The page writes what the chat template would, and shows every text as text."""

    @pytest.fixture
    def page(self, browser, serve, tmp_path):
        _, address = serve(folder(tmp_path / "site", BYTES, chat=CHAT, title="</script><b>tiny"))
        browser.visit(address, 390)
        settled(browser, "idle")
        assert begin(browser) == "ready", shown(browser, "trouble")
        return browser

    def send(self, page, text, tokens=2):
        page.run(f"""document.getElementById('prompt').value = {text!r};
            document.getElementById('most').value = {tokens}; document.getElementById('go').click()""")
        settled(page, "ready")
        return shown(page, "trouble")

    def test_it_joins_messages_and_shows_them_as_text(self, page):
        answer = (f" {len(BYTES)}:0" * 2).strip()
        assert self.send(page, f"  {MARKUP} ") == ""
        assert self.send(page, "More") == ""
        one = "<s><b>u</b>" + MARKUP + "</script><a>"
        assert page.run("prompts") == [one, one + answer + "<z>More</script><a>"]
        said = page.run("[...document.querySelectorAll('#talk li')].map((e) => [e.className, e.textContent])")
        assert said == [["user", MARKUP], ["model", answer], ["user", "More"], ["model", answer]]
        assert page.run("document.querySelectorAll('main img, main b').length") == 0
        assert "run" not in page.run("document.title")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")

    def test_control_words_and_nothing_are_refused(self, page):
        assert self.send(page, "Say <a> to me") == "A message may not hold <a>: it is a control word of this model."
        assert self.send(page, "   ") == "There is no message yet."
        assert page.run("globalThis.prompts ?? 0") == 0

    def test_a_full_context_is_said_and_the_message_stays(self, page):
        assert "begin a new conversation" in self.send(page, "too long")
        assert page.run("document.getElementById('prompt').value") == "too long"
        assert page.run("document.querySelectorAll('#talk li').length") == 0

    def test_it_begins_anew_and_continues_texts(self, page):
        self.send(page, "One")
        page.run("document.getElementById('anew').click()")
        assert page.run("document.querySelectorAll('#talk li').length") == 0
        self.send(page, "Two")
        assert page.run("prompts")[1] == "<s><b>u</b>Two</script><a>"
        page.run("document.getElementById('chat').click()")
        assert not page.run("document.getElementById('talk').checkVisibility()")
        assert generated(page, "So", 1) == f"So {len(BYTES)}:0"
        assert page.run("prompts")[2] == "So"


def test_greedy_text_is_that_of_llama_cpp(browser, serve, model_directory, texts, tmp_path):
    """The real runtime; where sums in another order may decide, the texts may part."""
    llama = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    try:
        runtime = read_runtime(None)
    except UsageError as exc:
        pytest.skip(str(exc))
    path = tmp_path / "tiny.gguf"
    bytecap.fit(
        model_directory("rotary"), 30_000, format="gguf", calibration=texts["calib"], evaluation=texts["val"],
        output=path, **SMALL,
    )  # fmt: skip
    site = folder(tmp_path / "site", path.read_bytes(), runtime)
    _, address = serve(site)
    browser.visit(address, 390)
    settled(browser, "idle")
    assert begin(browser) == "ready", shown(browser, "trouble")
    prompt = "The database"
    found = generated(browser, prompt, 16).replace("\ufffd", "")  # llama_cpp leaves out what is no UTF-8
    assert hashlib.sha256((site / MODEL).read_bytes()).hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    model = llama.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    answer = model(prompt, max_tokens=16, temperature=0.0, logprobs=2)["choices"][0]
    assert len(answer["text"]) > 4
    if found == prompt + answer["text"].replace("\ufffd", ""):
        return
    told, upto = answer["logprobs"], prompt
    for token, scores in zip(told["tokens"], told["top_logprobs"], strict=True):
        upto += token.replace("\ufffd", "")
        if not found.startswith(upto):
            best, second = sorted(scores.values(), reverse=True)[:2]
            assert best - second < CLOSE, (found, answer["text"])
            return
    raise AssertionError((found, answer["text"]))
