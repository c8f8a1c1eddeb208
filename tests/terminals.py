"""A process on a pseudo-terminal of 80 × 24, and what it shows."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress


def on_terminal(words, cwd, react):
    """Run `stabrun WORDS` on a terminal to its end. `react(shown, process)` is called whenever it has shown more.

    Returns the exit status and the bytes that it has shown.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "stabrun", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 120
    try:
        while True:
            assert time.monotonic() < deadline, shown[-2000:]
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
            react(shown, process)
        return process.wait(timeout=60), shown
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)


def plain(shown):
    """The text without escape sequences, and a check that the terminal is as before: one view, the cursor visible."""
    text = shown.decode()
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is visible again"
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").replace("\r", "\n")
