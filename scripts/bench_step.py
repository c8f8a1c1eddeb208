"""Time of a training step: stabrun with and without observation, a plain loop, and any changes of the configuration.

Each contender is a separate process with one thread. In every round, each takes some steps in turn: ten, one period of
the expensive statistics, unless `--steps` says otherwise. Ratios are computed per round. Reported values are medians
with quartiles.

    python scripts/bench_step.py [--model nano micro] [--rounds 15]
    python scripts/bench_step.py --model micro --steps 2 --changes +variant=layer_scale +variant=qk_norm
    python scripts/bench_step.py --profile
    python scripts/bench_step.py --page > docs/benchmarks.md

The second compares each change, a comma-separated list of overrides, with the one in `--against`, by default none. The
third prints the time of each operator. The fourth does all of PAGE.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import quantiles
from typing import Any

PAIRS: tuple[tuple[str, str], ...] = (("on", "off"), ("on", "plain"), ("off", "plain"))
LONG = "data.seq_len=1024,train.batch_size=1"
PAGE = {
    "With and without observation, and a plain loop": [
        "--model nano --rounds 15",
        "--model mini --rounds 9",
        "--model micro --rounds 5",
    ],
    "Compiled": [
        "--model nano --rounds 15 --against plain --changes observe.every=0,train.compile=true train.compile=true",
        "--model mini --rounds 7 --against plain --changes observe.every=0,train.compile=true train.compile=true",
    ],
    "By operator": ["--model nano --steps 20 --profile"],
    "Variants, at micro": [
        "--model micro --steps 1 --rounds 7 --changes "
        + " ".join(f"+variant={name}" for name in (
            "qk_norm", "qk_fc_norm", "qkv_norm", "fc_norm", "small_sublayers", "layer_scale", "sigma_reparam",
            "soft_temp", "soft_cap", "soft_clip", "qk_norm_cap",
        )),
        f"--model micro --steps 1 --rounds 7 --against {LONG} --changes {LONG},+variant=soft_cap"
        f" {LONG},+variant=soft_clip",
    ],
}  # fmt: skip
"""Headings of docs/benchmarks.md → what is compared there."""
OWN = {"plain": "plain", "off": "observe.every=0", "on": ""}  # name → kind
PROFILED = {**OWN, "on, compiled": "train.compile=true"}
OPERATORS = 14  # with the most time


def plain_loop(model_name: str) -> Callable[[int], None]:
    """A small GPT training loop in the style of nanoGPT: SDPA, RoPE by rotate-half, fused AdamW, clipping."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    from stabrun.composition import compose
    from stabrun.data.shards import prepare

    config = compose([f"model={model_name}"])
    shape, seq_len, batch_size = config.model, config.data.seq_len, config.train.batch_size
    d, heads = shape.d_model, shape.n_head
    head = d // heads
    tokens = prepare(config.data, shape).train.shards[0]
    angle = torch.outer(torch.arange(seq_len), 10000 ** (-torch.arange(0, head, 2) / head))
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = (y.view(b, t, heads, head).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

        def forward(self, x):
            return self.fc2(F.relu(self.fc1(x)).square())

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.attn = nn.LayerNorm(d, bias=False), Attention()
            self.ln2, self.mlp = nn.LayerNorm(d, bias=False), Mlp()

        def forward(self, x):
            x = x + self.attn(self.ln1(x))
            return x + self.mlp(self.ln2(x))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(shape.vocab_size, d)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.n_layer))
            self.ln, self.head = nn.LayerNorm(d, bias=False), nn.Linear(d, shape.vocab_size, bias=False)

        def forward(self, x, y):
            h = self.embed(x)
            for block in self.blocks:
                h = block(h)
            logits = self.head(self.ln(h))
            return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))

    model = Gpt()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step(number: int) -> None:
        places = torch.randint(len(tokens) - seq_len, (batch_size,))
        x = torch.stack([torch.from_numpy(tokens[i : i + seq_len].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in places])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def our_loop(model_name: str, changes: list[str], folder: str) -> Callable[[int], None]:
    """The loop of stabrun: update, record on disk, verdict; with `changes` of the configuration."""
    from stabrun.composition import compose
    from stabrun.data.shards import prepare
    from stabrun.record.run_dir import RunDir, RunWriter
    from stabrun.training.run import Run
    from stabrun.training.trainer import Trainer

    words = [f"model={model_name}", "tracker=none", "train.steps=1000000", "train.val_every=0", f"run_dir={folder}"]
    config = compose([*words, "train.threads=1", *changes])
    Path(folder).mkdir(exist_ok=True)
    run = Run(Trainer(config, prepare(config.data, config.model)), RunWriter(RunDir(Path(folder))))
    run.open_console()
    late: list[dict[str, Any]] = []

    def step(number: int) -> None:
        row = run.launch(number)
        if late:
            run.read(late.pop())
        late.append(row)

    return step


@contextmanager
def loop(kind: str, model_name: str) -> Iterator[Callable[[int], None]]:
    """The step of a loop of one thread. `kind`: plain, or overrides."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        changes = [word for word in kind.split(",") if word]
        yield plain_loop(model_name) if kind == "plain" else our_loop(model_name, changes, folder)


def serve(kind: str, model_name: str, steps: int) -> None:
    """Take `steps` steps for each line on stdin, and print the seconds per step."""
    out, done = sys.stdout, 0
    with loop(kind, model_name) as step:
        for _ in sys.stdin:
            began = time.perf_counter()
            for _ in range(steps):
                step(done)
                done += 1
            print((time.perf_counter() - began) / steps, file=out, flush=True)


def operators(kind: str, model_name: str, steps: int) -> None:
    """Print the milliseconds per step of each operator itself, without those that it calls, as JSON."""
    from torch.profiler import ProfilerActivity, profile

    out = sys.stdout
    with loop(kind, model_name) as step:
        for number in range(2 * steps):
            step(number)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for number in range(2 * steps, 3 * steps):
                step(number)
    found = {"(compiled kernels)": 0.0, "(the rest)": 0.0}
    for event in profiler.key_averages():
        other, _, name = event.key.partition("aten::")
        name = name or ("(compiled kernels)" if "CompiledFxGraph" in other else "(the rest)")
        found[name] = found.get(name, 0.0) + event.self_cpu_time_total / 1e3 / steps
    print(json.dumps(found), file=out)


def profiles(model_name: str, steps: int) -> None:
    """Print a table of the operators of the contenders that take most time."""
    times = {}
    for name, kind in PROFILED.items():
        command = [sys.executable, __file__, "--model", model_name, "--steps", str(steps), f"--operators={kind}"]
        times[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    names = sorted(
        {name for found in times.values() for name in found}, key=lambda n: -max(f.get(n, 0) for f in times.values())
    )
    rest = {name: sum(found.get(n, 0) for n in names[OPERATORS:]) for name, found in times.items()}
    print(f"\n{model_name}, ms per step of each operator itself, under the profiler, {steps} steps:\n")
    print(f"| operator | {' | '.join(times)} |\n|---|{'---|' * len(times)}")
    for name in names[:OPERATORS]:
        print(f"| {name} | {' | '.join(f'{found.get(name, 0):.2f}' for found in times.values())} |")
    print(f"| {len(names) - OPERATORS} others | {' | '.join(f'{value:.2f}' for value in rest.values())} |", flush=True)


def measure(model_name: str, rounds: int, steps: int, contenders: dict[str, str]) -> list[dict[str, float]]:
    """Seconds per step of each contender (name → kind) in each round."""
    command = [sys.executable, __file__, "--model", model_name, "--steps", str(steps)]
    workers = {
        name: subprocess.Popen(
            [*command, f"--serve={kind}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for name, kind in contenders.items()
    }  # fmt: skip

    def take(name: str) -> float:
        worker = workers[name]
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    try:
        for name in contenders:
            take(name)  # warmup
        return [{name: take(name) for name in contenders} for _ in range(rounds)]
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.wait()


def compare(model_name: str, words: argparse.Namespace) -> None:
    """Print a table of the times of the contenders, and of the ratios of pairs of them."""
    contenders, pairs = OWN, PAIRS
    if words.changes:
        against = words.against or "default"
        contenders = {against: words.against, **{change: change for change in words.changes}}
        pairs = tuple((change, against) for change in words.changes)
    times = measure(model_name, words.rounds, words.steps, contenders)
    print(f"\n{model_name}, {words.rounds} rounds of {words.steps} steps each:\n")
    print("| | median | quartiles |\n|---|---|---|")
    for name in contenders:
        low, middle, high = quantiles([t[name] * 1e3 for t in times], n=4)
        print(f"| {name}, ms per step | {middle:.2f} | {low:.2f} to {high:.2f} |")
    if contenders is OWN:
        best = product_speed()
        flops = flops_per_step([f"model={model_name}"])
        for name in contenders:
            speed = flops / quantiles([t[name] for t in times], n=4)[1] / 1e9
            print(f"| {name}, share of the {best:.0f} GFLOP/s of large matrix products | {speed / best:.2f} | |")
    for one, other in pairs:
        low, middle, high = quantiles([t[one] / t[other] for t in times], n=4)
        print(f"| {one} / {other} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


def flops_per_step(words: list[str]) -> int:
    """FLOPs of the matrix products of a step, attention as if not causal (PaLM, arXiv 2204.02311, appendix B)."""
    from stabrun.composition import compose
    from stabrun.model.counts import flops_per_token

    config = compose(words)
    return flops_per_token(config.model, config.data.seq_len) * config.data.seq_len * config.train.batch_size


def product_speed() -> float:
    """GFLOP/s of fp32 products of 1024 × 1024 matrices on one thread: the best of fifty."""
    import torch

    torch.set_num_threads(1)
    a, seconds = torch.randn(1024, 1024), list[float]()
    for _ in range(50):
        began = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds) / 1e9


def page(parser: argparse.ArgumentParser) -> None:
    """Print docs/benchmarks.md."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line), "unknown CPU")
    print("# Speed of a training step\n")
    print("`make bench` writes this page. Each table is the output of the command above it.")
    print(f"On {cpu}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, torch {torch.__version__},")
    print(f"one thread per process; {product_speed():.0f} GFLOP/s in fp32 products of 1024 × 1024 matrices.\n")
    print(
        "*plain*: a training loop in the style of nanoGPT (SDPA, fused AdamW, clipping). *off*: `observe.every=0`.\n"
        "*on*: all statistics of each step, those of `observe.slow_every` every ten. Processes take turns; ratios are\n"
        "of the same round."
    )
    for heading, commands in PAGE.items():
        print(f"\n## {heading}")
        for command in commands:
            print(f"\n    python scripts/bench_step.py {command}", flush=True)
            run(parser.parse_args(command.split()))


def run(words: argparse.Namespace) -> None:
    for name in words.model:
        if words.profile:
            profiles(name, words.steps)
        else:
            compare(name, words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["nano", "micro"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of each round")
    parser.add_argument("--against", default="", help="overrides that the changes are compared with")
    parser.add_argument("--changes", nargs="+", default=[])
    parser.add_argument("--profile", action="store_true", help="print the time of each operator")
    parser.add_argument("--page", action="store_true", help="print docs/benchmarks.md")
    parser.add_argument("--operators", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.serve is not None:
        serve(words.serve, words.model[0], words.steps)
    elif words.operators is not None:
        operators(words.operators, words.model[0], words.steps)
    elif words.page:
        page(parser)
    else:
        run(words)
