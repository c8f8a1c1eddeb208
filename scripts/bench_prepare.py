"""Speed of `stabrun data prepare`, and whether kills change any byte of its output.

    python scripts/bench_prepare.py --mb 200 --workers 2 --kills 2

The corpus is the embedded text with its verses shuffled, repeated, as JSON lines of a few KB. `--text` adds other text
files. Kills use SIGKILL at evenly spaced parts. The resulting directory is compared, file by file, with those of
uninterrupted runs with the same number of workers and with one worker.
"""

import argparse
import filecmp
import json
import lzma
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stabrun.data.corpus import EMBEDDED
from stabrun.data.parts import CHUNK

VERSES = 20  # per document
SEPARATOR = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200, help="size of the corpus in MB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=32_000, help="size of the trained BPE")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file to mix in")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        build(corpus, arguments.mb, arguments.text, arguments.seed)
        parts = arguments.mb * 1e6 / CHUNK
        for number in range(arguments.kills):
            kill(
                command(corpus, folder / "killed", arguments),
                folder / "killed",
                int(parts * (number + 1) / (arguments.kills + 1)),
            )
        timed(f"{arguments.workers} workers, resumed", command(corpus, folder / "killed", arguments))
        timed(f"{arguments.workers} workers, uninterrupted", command(corpus, folder / "many", arguments))
        arguments.workers = 1
        timed("1 worker, uninterrupted", command(corpus, folder / "one", arguments))
        sys.exit(max(compared(folder / "one", folder / name) for name in ("killed", "many")))


def build(file: Path, mb: float, texts: list[Path], seed: int) -> None:
    """Write about `mb` MB of shuffled lines of the embedded text and of `texts`, as JSON lines."""
    lines = lzma.open(EMBEDDED, "rt", encoding="utf-8").read().splitlines()
    for extra in texts:
        lines += extra.read_text(encoding="utf-8").splitlines()
    shuffle, left = random.Random(seed), mb * 1e6
    with open(file, "w", encoding="utf-8") as out:
        while left > 0:
            shuffle.shuffle(lines)
            for start in range(0, len(lines), VERSES):
                text = "\n".join(lines[start : start + VERSES])
                left -= len(text.encode())
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if left <= 0:
                    break


def command(corpus: Path, cache: Path, arguments: argparse.Namespace) -> list[str]:
    words = ["data=local", f"data.path={corpus}", f"data.cache_dir={cache}", f"data.separator='{SEPARATOR}'"]
    words += ["data.tokenizer=bpe", f"model.vocab_size={arguments.vocab}", f"data.workers={arguments.workers}"]
    return [sys.executable, "-m", "stabrun", "data", "prepare", *words]


def kill(words: list[str], cache: Path, parts: int) -> None:
    """Run until this many parts are finished, then send SIGKILL."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while process.poll() is None and finished(cache) < max(parts, 1):
        time.sleep(0.05)
    if process.poll() is not None:
        sys.exit("finished before it could be killed: use a larger --mb or fewer --kills")
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed with {finished(cache)} parts finished", flush=True)


def finished(cache: Path) -> int:
    return len(list(cache.glob("*.part/[0-9]*.json")))


def timed(name: str, words: list[str]) -> None:
    began, spent = time.monotonic(), cpu_seconds()
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    said = re.findall(r"^(?:resuming|tokenized) .*$", out, re.MULTILINE)
    took = (
        f"{time.monotonic() - began:.1f} s and {cpu_seconds() - spent:.1f} s of CPU in total, on {os.cpu_count()} cores"
    )
    print(f"{name}: {'; '.join(said)} ({took})", flush=True)


def cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compared(first: Path, second: Path) -> int:
    """Print whether both caches contain the same files. Returns 1 if not."""
    (one,), (two,) = ([d for d in cache.iterdir() if d.is_dir()] for cache in (first, second))
    names = sorted({file.name for folder in (one, two) for file in folder.iterdir()})
    _, differing, missing = filecmp.cmpfiles(one, two, names, shallow=False)
    same = one.name == two.name and not differing and not missing
    print(f"{len(names)} files, {'byte-identical' if same else f'different: {differing + missing}'}")
    return 0 if same else 1


if __name__ == "__main__":
    main()
