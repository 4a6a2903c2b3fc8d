"""A headless Chromium, driven by its DevTools protocol over a pipe: JSON with a zero byte behind each message.

`Page` opens one file in one window, and keeps what the browser told of it meanwhile: messages of the console, and what
it asked for. Where no browser is installed `find()` is None; VQSCALE_BROWSER names one that is not on the PATH.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions "
    "--disable-background-networking --disable-component-update --host-resolver-rules=MAP*~NOTFOUND "
    "--remote-debugging-pipe"
).replace("MAP*~", "MAP\\ *\\ ~")  # of bash, which gives the pipe its numbers, 3 and 4
PATIENCE_S = 120


def find() -> str | None:
    named = os.environ.get("VQSCALE_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    def __init__(self, program: str, home: Path):
        out, self._in = os.pipe()
        self._out, into = os.pipe()
        start = f'exec "$0" {OPTIONS} --user-data-dir="$1" about:blank 3<&{out} 4>&{into}'
        with (home / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", start, program, str(home / "profile")],
                pass_fds=(out, into),
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(home)},
            )
        os.close(out)
        os.close(into)
        self._log, self._rest, self._number = home / "browser.log", b"", 0
        self.events: list[dict] = []

    def ask(self, method: str, session: str | None = None, **words):
        """The answer to a call; what the browser tells meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": words} | ({"sessionId": session} if session else {})
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait(self, method: str, session: str):
        """Until the browser has told this of the session."""
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict:
        until = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0, until - time.monotonic()))
            part = os.read(self._out, 1 << 16) if ready else b""
            assert part, f"the browser says no more:\n{self._log.read_text(errors='replace')[-2000:]}"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def close(self):
        os.close(self._in)
        os.close(self._out)
        self._process.terminate()
        self._process.wait(PATIENCE_S)


class Page:
    """A window with one file. `scripts`: whether the page may run its own."""

    def __init__(self, browser: Browser, path: Path, width: int, scheme: str = "light", scripts: bool = True):
        self._browser = browser
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self._target = {"targetId": target}
        self._session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for room in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{room}.enable")
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._ask("Page.navigate", url=path.resolve().as_uri())
        browser.wait("Page.loadEventFired", self._session)

    def _ask(self, method: str, **words):
        return self._browser.ask(method, self._session, **words)

    def value(self, script: str):
        """What a script says, as JSON."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, x: float, y: float):
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def told(self, *methods: str) -> list[dict]:
        """What the browser has told of this page by these names."""
        events = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event["params"] for event in events if event["method"] in methods]

    def close(self):
        self._browser.ask("Target.closeTarget", **self._target)
