"""Cost of watching a model, beside other ways: time of a step and peak memory, as ratios to a loop without any.

GPT-2 small's shape (124M parameters) at sequence 128, AdamW, clipping. Each contender is a process of its own. In a
round, each takes ten steps (`--steps`), by turns of one (`--turn`); a ratio is that of one round. Reported are the
median of rounds and the quartiles. Memory is the peak of the process, or on a GPU that of its tensors.

    python scripts/bench_watch.py [--rounds 3] [--batch 8] [--contenders watch10 watch1 item wandb monitor]
    python scripts/bench_watch.py --device cuda --precision bf16 --batch 64 --steps 100 --turn 100 [--compile]

- `watch10`, `watch1`: `stabrun.watch` with `every=10` and `every=1`, its record on disk.
- `item`: a forward hook on each layer that calls `.item()` on the norm of its output.
- `wandb`: `wandb.watch(log="all", log_freq=10)` on an offline run.
- `monitor`: per-layer norms of weights, gradients, Adam's moments and outputs at each tenth step, one `.item()` each.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import quantiles
from typing import Any

CONTENDERS = ("watch10", "watch1", "item", "wandb", "monitor")


def model_of(layers: int) -> Any:
    """GPT-2 small of `layers` layers, without dropout."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, heads, vocabulary, context = 768, 12, 50257, 1024

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).chunk(3, -1))
            x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    class Gpt2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.h = nn.ModuleList(Block() for _ in range(layers))
            self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
            self.lm_head.weight = self.wte.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.wte(tokens[:, :-1]) + self.wpe(torch.arange(tokens.shape[1] - 1, device=tokens.device))
            for block in self.h:
                x = block(x)
            return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), tokens[:, 1:].flatten())

    torch.manual_seed(0)
    return Gpt2()


def loop(kind: str, words: argparse.Namespace, folder: str, stack: ExitStack) -> Callable[[int], None]:
    """One step of training, and what a contender does in it; `stack` ends it."""
    import torch
    from torch import nn

    model = model_of(words.layers).to(words.device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    after: Callable[[int, torch.Tensor, torch.Tensor], object] = lambda step, loss, norm: None  # noqa: E731
    linear = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    if kind.startswith("watch"):
        import stabrun

        watch = stack.enter_context(stabrun.watch(model, folder, int(kind.removeprefix("watch")), quiet=True))
        after = lambda step, loss, norm: watch.step(loss=loss, grad_norm=norm)  # noqa: E731
    elif kind == "wandb":
        import wandb

        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off"))
        run.watch(model, log="all", log_freq=10)
        after = lambda step, loss, norm: run.log({"loss": loss.item(), "norm": norm.item()})  # noqa: E731
    elif kind == "item":
        seen: dict[str, float] = {}
        for name, module in linear.items():
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.norm(dim=-1).mean().item()}))
    elif kind == "monitor":
        norms: dict[str, float] = {}
        now = [False]

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
                if now[0]:
                    norms[f"out/{name}"] = output.norm(dim=-1).mean().item()

            return hook

        for name, module in linear.items():
            module.register_forward_hook(keep(name))

        def monitor(step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
            if now[0]:
                for name, parameter in model.named_parameters():
                    norms[f"weight/{name}"] = parameter.norm().item()
                    norms[f"grad/{name}"] = parameter.grad.norm().item() if parameter.grad is not None else 0.0
                    for moment in ("exp_avg", "exp_avg_sq"):
                        norms[f"{moment}/{name}"] = optimizer.state[parameter][moment].norm().item()
            now[0] = (step + 1) % 10 == 0

        now[0], after = True, monitor

    forward = torch.compile(model) if words.compile else model
    data = torch.randint(50257, (16, words.batch, 129), generator=generator).to(words.device)

    def step(number: int) -> None:
        with torch.autocast(words.device, torch.bfloat16, enabled=words.precision == "bf16"):
            loss = forward(data[number % len(data)])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after(number, loss.detach(), norm)
        optimizer.zero_grad(set_to_none=True)

    return step


def serve(kind: str, words: argparse.Namespace) -> None:
    """Take as many steps as each line on stdin says; print the seconds and the peak memory in bytes."""
    import torch

    on_gpu = words.device == "cuda"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        step, number = loop(kind, words, folder, stack), 0
        for line in sys.stdin:
            began = time.perf_counter()
            for _ in range(int(line)):
                step(number)
                number += 1
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(seconds, torch.cuda.max_memory_allocated() if on_gpu else usage, flush=True)


def ask(process: "subprocess.Popen[str]", steps: int) -> None:
    assert process.stdin
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()


def answer(process: "subprocess.Popen[str]") -> tuple[float, float]:
    assert process.stdout
    seconds, memory = map(float, process.stdout.readline().split())
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--turn", type=int, default=1, help="steps that a contender takes before the next one")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.serve:
        serve(words.serve, words)
        return
    kinds = ["plain", *words.contenders]
    own = [sys.executable, *sys.argv]
    processes = {
        kind: subprocess.Popen([*own, "--serve", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for kind in kinds
    }
    for process in processes.values():  # warm up, and compile, all at once
        ask(process, words.steps)
    for process in processes.values():
        answer(process)
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    memory: dict[str, float] = {}
    for turn in range(words.rounds):
        taken = dict.fromkeys(kinds, 0.0)
        for number in range(words.steps // words.turn):
            for kind in kinds if number % 2 else reversed(kinds):
                ask(processes[kind], words.turn)
                seconds, memory[kind] = answer(processes[kind])
                taken[kind] += seconds / words.steps
        for kind in kinds:
            rounds[kind].append(taken[kind])
        steps = ", ".join(f"{kind} {1e3 * rounds[kind][-1]:.1f}" for kind in kinds)
        print(f"round {turn + 1}, ms per step: {steps}", file=sys.stderr, flush=True)
    plain = rounds["plain"]
    print(f"plain loop: {1e3 * quantiles(plain, n=4)[1]:.1f} ms per step, peak {memory['plain'] / 2**20:.0f} MiB")
    print("| contender | time, ratio (quartiles) | peak memory, ratio |")
    print("|---|---|---|")
    for kind in kinds[1:]:
        low, middle, high = quantiles([mine / base for mine, base in zip(rounds[kind], plain, strict=True)], n=4)
        print(f"| {kind} | {middle:.3f} ({low:.3f} … {high:.3f}) | {memory[kind] / memory['plain']:.3f} |")
    for process in processes.values():
        assert process.stdin
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
