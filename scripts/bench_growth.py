"""How step time and memory grow with layers, width, sequence, vocabulary and batch, beside the closed forms.

The base is mini with a batch of 4 sequences and heads of width 32; each table varies one key. Time: the median step of
a process of one thread. Memory: the growth of the resident size of another process to its peak, as in
`measure_memory.py`. An exponent is the slope of the logarithms over the last three values. Those of theory are of the
FLOPs per step (`stabrun.model.counts`) and of the bytes predicted (`stabrun.model.memory`) at the same values: a time
whose exponent is above that of the FLOPs grows by more than its matrix products.

    python scripts/bench_growth.py
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

import numpy as np
from bench_step import flops_per_step
from measure_memory import RETURNED, measure

BASE = ["model=mini", "data.tokenizer=bytes", "train.batch_size=4", "tracker=none", "train.threads=1"]
AXES = {
    "model.n_layer": (2, 4, 8, 16),
    "model.d_model": (64, 128, 256, 512),
    "data.seq_len": (128, 256, 512, 1024),
    "model.vocab_size": (512, 2048, 8192, 32768),
    "train.batch_size": (4, 8, 16, 32),
}
HEAD = 32  # width of a head
LAST = 3  # values of an exponent
LEAST_SECONDS, LEAST_STEPS = 2.0, 5
TEXT = f"""\
`{" ".join(BASE)}` with one key varied, heads of width {HEAD}. The exponent is the slope of the logarithms over the last
{LAST} values. That of a time should be that of the FLOPs, if matrix products take most of the step."""


def point(key: str, value: int) -> list[str]:
    """The overrides of a value of an axis."""
    heads = [f"model.n_head={value // HEAD}"] if key == "model.d_model" else []
    return [*BASE, f"{key}={value}", *heads]


def seconds_per_step(words: list[str]) -> float:
    """Median of the steps of at least LEAST_SECONDS, after three others."""
    from stabrun.composition import compose
    from stabrun.data.shards import prepare
    from stabrun.training.trainer import Trainer

    config = compose(words)
    trainer, seconds = Trainer(config, prepare(config.data, config.model)), list[float]()
    while len(seconds) < LEAST_STEPS + 3 or sum(seconds[3:]) < LEAST_SECONDS:
        began = time.perf_counter()
        trainer.step(len(seconds)).read()
        seconds.append(time.perf_counter() - began)
    return median(seconds[3:])


def in_process(what: str, words: list[str], **environment: str) -> float:
    """What a process of its own prints."""
    command = [sys.executable, __file__, what, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return float(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()[-1])


def theory(words: list[str]) -> tuple[float, float]:
    """FLOPs of a step, and predicted bytes."""
    from stabrun.composition import compose
    from stabrun.model.memory import memory

    return flops_per_step(words), memory(compose(words), "cpu")["peak_bytes"]


def exponent(values: tuple[int, ...], results: list[float]) -> float:
    """Slope of log result against log value over the last values."""
    return float(np.polyfit(np.log(values[-LAST:]), np.log(results[-LAST:]), 1)[0])


def table(key: str, values: tuple[int, ...]) -> None:
    points = [point(key, value) for value in values]
    seconds = [in_process("time", words) for words in points]
    size = [in_process("memory", words, **RETURNED) for words in points]
    flops, predicted = zip(*map(theory, points), strict=True)
    print(f"\n| `{key}` | {' | '.join(map(str, values))} | exponent |\n|---|{'---|' * (len(values) + 1)}")
    rows = {
        "ms per step": [1e3 * value for value in seconds], "GFLOP per step": [value / 1e9 for value in flops],
        "MB": [value / 1e6 for value in size], "MB predicted": [value / 1e6 for value in predicted],
    }  # fmt: skip
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.3g}' for value in row)} | {exponent(values, row):.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.what == "time":
        print(seconds_per_step(asked.words))
    elif asked.what == "memory":
        measure(asked.words)
    else:
        print(f"\n## Growth\n\n    python scripts/bench_growth.py\n\n{TEXT}", flush=True)
        for key, values in AXES.items():
            table(key, values)
