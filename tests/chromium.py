"""Headless Chromium driven through its DevTools protocol over a pair of pipes: real pointer, real keys, any width."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
# Chromium reads commands from descriptor 3 and writes to 4; both may be taken while they are moved there.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]
os.dup2(ends[0], 3); os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Home": 36, "End": 35}


class Chromium:
    """One browser with one page; `load` starts it over, `renew` replaces it, everything else happens in it."""

    def __init__(self, profile):
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()
        command = [sys.executable, "-c", _LAUNCH, str(theirs), str(answers), BROWSER, *_FLAGS,
                   f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        self._process = subprocess.Popen(  # noqa: S603
            command, pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        self._rest, self._numbers, self._session, self.events = b"", itertools.count(1), None, []
        self._context = None
        self.renew()

    def renew(self):
        """Replace the page by one that knows nothing of it: storage, caches and workers are its own."""
        self._session, before = None, self._context
        if before:
            self.send("Target.disposeBrowserContext", browserContextId=before)
        self._context = self.send("Target.createBrowserContext")["browserContextId"]
        page = self.send("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self):
        """End the browser."""
        self._session = None
        try:
            self.send("Browser.close")
            self._process.wait(20)
        finally:
            self._process.kill()
            os.close(self._to)
            os.close(self._from)

    def send(self, method, **parameters):
        """The answer to a command; events that come before it are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def _receive(self, seconds=60):
        until = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            assert data, f"no answer from Chromium within {seconds} s"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def load(self, path, width, *, height=900, dark=False, medium="screen"):
        """Open a file at a width, light or dark, and wait until it is there; returns what went wrong."""
        self.visit(path.as_uri(), width, height=height, dark=dark, medium=medium)
        return self.faults(path)

    def visit(self, url, width, *, height=900, dark=False, medium="screen"):
        """Open an address at a width, light or dark, and wait until it is there."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=medium, features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive())
        self.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(true))))")

    def faults(self, path):
        """Errors, warnings, and requests for anything but the page itself, since it was loaded."""
        found = []
        for e in self.events:
            name, more = e.get("method"), e.get("params", {})
            if name == "Runtime.exceptionThrown":
                found.append(more["exceptionDetails"]["exception"].get("description", "exception"))
            elif name == "Log.entryAdded" and more["entry"]["level"] in {"error", "warning"}:
                found.append(more["entry"]["text"])
            elif name == "Runtime.consoleAPICalled" and more["type"] in {"error", "warning", "assert"}:
                found.append(str(more["args"]))
            elif name == "Network.requestWillBeSent" and more["request"]["url"] != path.as_uri():
                found.append(f"requested {more['request']['url']}")
        return found

    def run(self, script):
        """Value of an expression, a promise's when it is kept."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def point(self, x, y):
        """Move the pointer to a place of the window."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x, y):
        """Press and release the left button at a place of the window."""
        self.point(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys):
        """Press and release keys one after the other."""
        for key in keys:
            same = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
            text = {"text": "\r"} if key == "Enter" else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **same, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **same)

    def write(self, text):
        """Type text where the focus is."""
        self.send("Input.insertText", text=text)

    def picture(self):
        """PNG of the whole page, however long."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, optimizeForSpeed=True)
        return base64.b64decode(found["data"])
