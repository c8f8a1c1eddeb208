"""The memory of a training step: predicted in closed form, and measured as the resident size of a process on the CPU.

Each case is a process of its own. It trains a tiny model of the same kind first, so that libraries and their buffers
are loaded, and then two steps of the case. Measured is the growth of the resident size to its peak, with an allocator
that returns freed memory at once: ordinary runs keep some, which is faster. Prints the table of docs/gpu.md.

    python scripts/measure_memory.py [--only nano mini]
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}  # freed tensors are returned at once
TINY = ["model.n_layer=1", "model.d_model=96", "train.batch_size=2", "train.micro_batch_size=1"]
# Large models in small batches of two micro-batches, for the sake of time. The vocabulary of the bytes is the model's.
LARGE = ["data.tokenizer=bytes", "train.precision=fp32", "train.batch_size=2", "train.micro_batch_size=1"]
UPDATE = ["model=micro", "data.tokenizer=bytes", "train.batch_size=1"]  # the optimizer's step has the peak
CASES = {
    "nano": ["model=nano", "train.batch_size=64"],
    "mini": ["model=mini"],
    "mini, qk_norm_cap": ["model=mini", "+variant=qk_norm_cap"],
    "mini, rmsnorm": ["model=mini", "model.norm.kind=rmsnorm"],
    "mini, dropout": ["model=mini", "model.dropout=0.1"],
    "mini, recomputed": ["model=mini", "train.recompute=blocks"],
    "micro": ["model=micro", "data.tokenizer=bytes"],
    "micro, z-loss": ["model=micro", "data.tokenizer=bytes", "optim.z_loss=1e-4"],
    "micro, 512 tokens, soft_cap": ["model=micro", "data.tokenizer=bytes", "data.seq_len=512", "+variant=soft_cap"],
    "mini, qk_clip": ["model=mini", "optim.qk_clip=100"],
    "micro, one sequence": UPDATE,
    "micro, one sequence, muon": [*UPDATE, "optim.kind=muon"],
    "micro, one sequence, muon, skip": [*UPDATE, "optim.kind=muon", "train.recovery=skip"],
    "micro, one sequence, stable_adamw": [*UPDATE, "optim.kind=stable_adamw"],
    "small": ["model=small", *LARGE],
    "small, recomputed": ["model=small", *LARGE, "train.recompute=blocks"],
    "medium": ["model=medium", *LARGE],
}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(words: list[str]) -> None:
    """Print predicted and measured bytes of a case."""
    import ctypes
    import gc

    from stabrun.composition import compose
    from stabrun.data.shards import prepare
    from stabrun.model.memory import memory
    from stabrun.training import precision
    from stabrun.training.trainer import Trainer

    precision.keep_freed_memory = lambda: None

    def train(words: list[str]) -> None:
        config = compose([*words, "train.threads=1"])
        trainer = Trainer(config, prepare(config.data, config.model))
        for step in (0, 1):
            trainer.step(step).read()

    train([*words, *TINY])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    train(words)
    print(memory(compose(words), "cpu")["peak_bytes"], resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of cases that contain one of these")
    parser.add_argument("--case", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        measure(options.case)
        return
    print("| model | predicted, MiB | measured, MiB | predicted / measured |\n|---|---|---|---|")
    for name, words in CASES.items():
        if options.only is None or any(part in name for part in options.only):
            command = [sys.executable, __file__, "--case", *words]
            done = subprocess.run(command, env=os.environ | RETURNED, capture_output=True, text=True, check=True)
            predicted, measured = map(int, done.stdout.split()[-2:])
            print(
                f"| {name} | {predicted / 2**20:,.1f} | {measured / 2**20:,.1f} | {predicted / measured:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
