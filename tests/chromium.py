"""Debian's Chromium without a window, driven over the DevTools protocol through a pipe: no port, no library."""

import base64
import fcntl
import json
import os
import subprocess


class Browser:
    """One page. `requests` and `errors` fill with what it asks of the world, and with what its console complains of."""

    def __init__(self, program, home, width=1280, height=900, dark=False):
        ends = *os.pipe(), *os.pipe()
        # Chromium reads from 3 and writes to 4: ends far above cannot be in the way.
        theirs_in, ours_out, ours_in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends)
        for end in ends:
            os.close(end)
        words = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={home}", "about:blank",
        ]  # fmt: skip
        moved = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *words], pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": str(home)},
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.out, self.answers = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self.number, self.session, self.loaded = 0, None, False
        self.requests, self.errors = [], []
        (target,) = (t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.shape(width, height, dark)

    def call(self, method, **words):
        """Send a command, and take in events until its answer comes."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": words}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            told = self.next()
            if told.get("id") == self.number:
                assert "error" not in told, (method, told["error"])
                return told["result"]

    def next(self):
        piece = bytearray()
        while not piece.endswith(b"\0"):
            byte = self.answers.read1(1) if not piece else self._rest()
            assert byte, "Chromium has ended"
            piece += byte
        told = json.loads(piece[:-1])
        self.heard(told.get("method"), told.get("params", {}))
        return told

    def _rest(self):
        """What is in the buffer up to the end of the message."""
        there = self.answers.peek()
        end = there.find(b"\0")
        return self.answers.read(end + 1 if end >= 0 else max(1, len(there)))

    def heard(self, event, facts):
        if event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        if event == "Runtime.exceptionThrown":
            self.errors.append(facts["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        if event == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in facts["args"]]))
        if event == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.errors.append(facts["entry"]["text"])
        self.loaded |= event == "Page.loadEventFired"

    def shape(self, width, height, dark):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, file):
        self.loaded = False
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self.loaded:
            self.next()

    def ask(self, script):
        """The value of a JavaScript expression; a promise is awaited."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def click(self, selector, place=0):
        """A real click of the mouse in the middle of an element."""
        where = f"document.querySelectorAll({json.dumps(selector)})[{place}]"
        self.ask(f"{where}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({where}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def choose(self, selector, value):
        """Another option of a list, as a user's choice tells the page."""
        self.ask(
            f"(box => {{ box.value = {json.dumps(value)}; "
            "box.dispatchEvent(new Event('change', {bubbles: true})); })"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    def picture(self, file):
        """The whole page, from top to bottom."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        try:
            self.session = None
            self.call("Browser.close")
        except (AssertionError, OSError):
            self.process.kill()
        self.process.wait(20)
        self.out.close()
        self.answers.close()
