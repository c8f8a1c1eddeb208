"""`stabrun.watch` on models that are not stabrun's, against plain hooks and formulas."""

import io
import math
import pickle
import re
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from waiting import waits

import stabrun
from stabrun.record.jsonl import number, read_lines

WIDTH, VOCAB = 8, 11
NEEDS_CUDA = pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


@pytest.fixture
def deterministic(monkeypatch):
    """Sums on a GPU in one order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Block(nn.Module):
    """Pre-norm attention and MLP; the MLP is called by a path of its own, so that it can be recomputed."""

    def __init__(self, recompute=None):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.unused = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.recompute = recompute

    def mlp(self, x):
        return self.down(F.relu(self.up(x)))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        if self.recompute is None:
            return x + self.mlp(x)
        return x + checkpoint(self.mlp, x, use_reentrant=self.recompute)


class Model(nn.Module):
    """Two blocks, the second of which is called twice; tied embedding and head."""

    def __init__(self, recompute=None, twice=True):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(recompute) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.twice = twice

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in (*self.layers, *self.layers[1:][: self.twice]):
            x = layer(x)
        return self.head(x)


def a_model(**options):
    torch.manual_seed(0)
    return Model(**options)


def batches(count, sequences=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (sequences, 7), generator=generator) for _ in range(count)]


def loss_of(model, tokens):
    tokens = tokens.to(next(model.parameters()).device)
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def trained(model, watch=None, steps=6, clip=None, accumulate=1, optimizer=None, between=lambda: None):
    """The losses of a plain loop; `between` is called between the update and `watch.step`."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    losses, data = [], iter(batches(steps * accumulate))
    for _ in range(steps):
        losses.append(0.0)
        for _ in range(accumulate):
            loss = loss_of(model, next(data)) / accumulate
            loss.backward()
            losses[-1] += loss.item()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        between()
        if watch:
            watch.step(loss=losses[-1])
        optimizer.zero_grad()
    return losses


def rows_of(directory):
    return [line.value for line in read_lines(directory / "metrics.jsonl")]


def watched(directory, model=None, every=1, slow_every=1, sites=None, **options):
    """The rows of a run that is watched."""
    model = model or a_model()
    watch = stabrun.watch(model, directory, every, slow_every=slow_every, sites=sites, quiet=True)
    losses = trained(model, watch, **options)
    watch.close()
    return rows_of(directory), losses


def token_norms(x):
    return x.detach().double().norm(dim=-1).flatten()


class Plain:
    """What plain hooks see: for each linear layer or block the token norms of all its calls, and gradients."""

    def __init__(self, model):
        self.out, self.input, self.grad = {}, {}, {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding, Block)):
                module.register_forward_hook(self.hook(name))
                module.register_forward_pre_hook(self.own_input(name))

    def own_input(self, name):
        def hook(module, args):
            if not args[0].is_floating_point() or not args[0].requires_grad:
                return None
            x = args[0].view_as(args[0])
            x.register_hook(lambda g: self.grad.setdefault(name, []).append(g.double().norm()))
            return (x,)

        return hook

    def hook(self, name):
        def hook(module, args, output):
            self.out.setdefault(name, []).append(token_norms(output))
            if args[0].is_floating_point():
                self.input.setdefault(name, []).append(token_norms(args[0]))

        return hook

    def mean(self, kept, name):
        return float(torch.cat(kept[name]).mean())


PATHS = {"qkv": "layers.{}.qkv", "out": "layers.{}.out", "up": "layers.{}.up", "down": "layers.{}.down"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_row_has_what_plain_hooks_see(tmp_path, accumulate, device):
    rows, losses = watched(tmp_path, a_model().to(device), steps=3, clip=0.1, accumulate=accumulate)
    model = a_model().to(device)
    trained(model, steps=2, clip=0.1, accumulate=accumulate)
    # The third step by hand; the optimizer's state does not matter before its update.
    plain = Plain(model)
    for batch in batches(3 * accumulate)[2 * accumulate :]:
        (loss_of(model, batch) / accumulate).backward()
    total = float(torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm())
    row = rows[2]
    assert row["train/loss"] == pytest.approx(losses[2])
    assert row["grad/norm"] == pytest.approx(total, rel=1e-5)
    for site, path in PATHS.items():
        for layer in range(2):
            name = path.format(layer)
            weight = model.get_submodule(name).weight.detach()
            assert row[f"norm/out/{site}"][layer] == pytest.approx(plain.mean(plain.out, name), rel=1e-5)
            assert row[f"norm/in/{site}"][layer] == pytest.approx(plain.mean(plain.input, name), rel=1e-5)
            assert row[f"norm/weight/{site}"][layer] == pytest.approx(float(weight.double().norm()), rel=1e-5)
            assert row[f"norm/grad/{site}"][layer] == pytest.approx(
                float(model.get_parameter(f"{name}.weight").grad.double().norm()), rel=1e-4
            )
            root = float(torch.stack(plain.grad[name]).norm())
            assert row[f"norm/in_grad/{site}"][layer] == pytest.approx(root, rel=1e-4)
    for site in ("embed", "head"):
        assert row[f"norm/out/{site}"] == pytest.approx(plain.mean(plain.out, site), rel=1e-5)
    for layer in range(2):
        assert row["residual/norm"][layer] == pytest.approx(plain.mean(plain.out, f"layers.{layer}"), rel=1e-5)
        own = torch.stack([p.grad.double().norm() for p in model.layers[layer].parameters() if p.grad is not None])
        assert row["grad/norm_by_layer"][layer] == pytest.approx(float(own.norm()), rel=1e-4)
    assert not [key for key in row if "unused" in key and not key.startswith(("norm/weight", "norm/grad", "norm/up"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("recompute", [None, False, True])
def test_watching_changes_no_bit(tmp_path, recompute, every, device, deterministic):
    plain, model = a_model(recompute=recompute).to(device), a_model(recompute=recompute).to(device)
    expected = trained(plain, clip=0.5)
    rows, losses = watched(tmp_path, model, every, 2, clip=0.5)
    assert losses == expected
    assert [row["train/loss"] for row in rows] == losses
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("recompute", [False, True], ids=["not reentrant", "reentrant"])
def test_recomputation_changes_no_statistic(tmp_path, recompute):
    kept, _ = watched(tmp_path / "kept")
    again, _ = watched(tmp_path / "again", a_model(recompute=recompute))
    for a, b in zip(kept, again, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


def test_each_step_has_a_row_and_those_that_log_have_statistics(tmp_path):
    rows, losses = watched(tmp_path, every=3, slow_every=6, steps=8)
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["train/loss"] for row in rows] == losses
    assert [row["step"] for row in rows if "norm/out/qkv" in row] == [0, 3, 6]
    assert [row["step"] for row in rows if "attn/max_logit" in row] == [0, 6]


def test_nothing_waits_for_the_device_between_rows(tmp_path, monkeypatch):
    """No tensor is turned into a number in a step that does not log, as on a device on which that would wait."""
    model = a_model()
    watch = stabrun.watch(model, tmp_path, every=4, quiet=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    reading = []
    for batch in batches(6):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        monkeypatch.setattr("stabrun.watching.watch.on_host", lambda tensor: False)
        with waits() as found:
            watch.step(loss=loss)
        reading.append(bool(found))
    watch.close()
    assert reading == [True, False, False, False, True, False]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda_no_step_waits(tmp_path, precision):
    """Neither a step that logs nor one that does not: PyTorch raises an error at each call that synchronizes."""
    model = a_model().cuda()
    watch = stabrun.watch(model, tmp_path, every=3, slow_every=3, quiet=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    for step, batch in enumerate(batch.cuda() for batch in batches(8)):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first makes what later steps use
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watch.step(loss=loss)
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    watch.close()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["step"] for row in rows if "attn/max_logit" in row] == [0, 3, 6]
    assert all(math.isfinite(row["train/loss"]) for row in rows)


def reference_attention(x, layer, mask=None):
    q, k, _ = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in layer.qkv(layer.norm(x)).double().chunk(3, -1))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
    p = logits.softmax(-1)
    return float(logits.max()), float(-(p * p.clamp_min(1e-300).log()).sum(-1).mean())


@pytest.mark.parametrize("device", DEVICES)
def test_attention_of_models_that_use_sdpa(tmp_path, device):
    rows, _ = watched(tmp_path, a_model(twice=False).to(device), steps=1)
    model = a_model(twice=False).to(device)
    with torch.no_grad():
        x = model.embed(batches(1)[0][:, :-1].to(device))
        for index, layer in enumerate(model.layers):
            largest, entropy = reference_attention(x, layer)
            assert rows[0]["attn/max_logit"][index] == pytest.approx(largest, rel=1e-5)
            assert rows[0]["attn/entropy"][index] == pytest.approx(entropy, rel=1e-5)
            x = layer(x)


class Attends(nn.Module):
    """One layer whose attention has the arguments that are given."""

    def __init__(self, heads, keys, **arguments):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 4 * heads), "k": nn.Linear(6, 4 * keys)})])
        self.layers[0].forward = self.attend
        self.arguments = arguments

    def attend(self, x):
        q, k = (self.layers[0][name](x).unflatten(-1, (-1, 4)).transpose(1, 2) for name in "qk")
        self.q, self.k = q.detach(), k.detach()
        return F.scaled_dot_product_attention(q, k, k, **self.arguments)

    def forward(self, x):
        return self.layers[0](x).sum()


BOOLEAN = torch.rand(3, 1, 5, 5, generator=torch.Generator().manual_seed(2)) > 0.3
CASES = {
    "plain": (2, 2, {}),
    "causal": (2, 2, {"is_causal": True}),
    "scale": (2, 2, {"scale": 2.0}),
    "grouped": (4, 2, {"enable_gqa": True, "is_causal": True}),
    "boolean": (2, 2, {"attn_mask": BOOLEAN | torch.eye(5).bool()}),
    "added": (2, 2, {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(3))}),
    "padding": (2, 2, {"attn_mask": torch.ones(3, 1, 1, 5).bool() & (torch.arange(5) < 4)}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_with_every_argument(tmp_path, case):
    heads, keys, arguments = CASES[case]
    torch.manual_seed(0)
    model = Attends(heads, keys, **arguments)
    watch = stabrun.watch(model, tmp_path, 1, quiet=True)
    loss = model(torch.randn(3, 5, 6))
    loss.backward()
    watch.step(loss=loss)
    watch.close()
    q, k = model.q.double(), model.k.double().repeat_interleave(heads // keys, 1)
    logits = q @ k.transpose(-1, -2) * arguments.get("scale", 0.5)
    mask = arguments.get("attn_mask", torch.ones(5, 5).bool())
    if arguments.get("is_causal"):
        mask = torch.ones(5, 5).tril().bool()
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    p = logits.softmax(-1)
    (row,) = rows_of(tmp_path)
    assert row["attn/max_logit"] == [pytest.approx(float(logits.max()), rel=1e-5)]
    assert row["attn/entropy"] == [pytest.approx(float(torch.special.entr(p).sum(-1).mean()), rel=1e-5)]


def test_detach_restores_model_optimizers_and_torch(tmp_path):
    from torch.optim import optimizer as optimizers

    def state(model):
        hooks = [
            (name, key, len(value))
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if "hook" in key and value
        ]
        functions = F.scaled_dot_product_attention, nn.utils.clip_grad_norm_, nn.utils.clip_grad.clip_grad_norm_
        globally = len(optimizers._global_optimizer_pre_hooks), len(optimizers._global_optimizer_post_hooks)
        return hooks, [id(function) for function in functions], globally, set(vars(model))

    model = a_model()
    before = state(model)
    watch = stabrun.watch(model, tmp_path, 1, slow_every=1, quiet=True)
    assert state(model) != before
    trained(model, watch, steps=2)
    watch.detach()
    assert state(model) == before
    watch.close()
    assert state(model) == before


def test_two_watches_at_once(tmp_path):
    models = a_model(), a_model()
    watches = [stabrun.watch(model, tmp_path / str(n), 1, slow_every=1, quiet=True) for n, model in enumerate(models)]
    for model, watch in zip(models, watches, strict=True):
        trained(model, watch, steps=3)
    watches[0].close()
    trained(models[1], watches[1], steps=1)
    watches[1].close()
    rows = [rows_of(tmp_path / str(n)) for n in range(2)]
    assert rows[0] == rows[1][:3]
    assert "attn/max_logit" in rows[1][3]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_by_inductor_on_cuda(tmp_path):
    rows = {}
    for name, compiled in (("eager", lambda model: model), ("inductor", torch.compile)):
        model = a_model(twice=False).cuda()
        watch = stabrun.watch(model, tmp_path / name, 2, slow_every=4, quiet=True)
        # Not Adam, which makes updates of the learning rate's size from the rounding errors of a bias of keys.
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        trained(compiled(model), watch, steps=6, optimizer=optimizer)
        watch.close()
        rows[name] = rows_of(tmp_path / name)
    for a, b in zip(rows["eager"], rows["inductor"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), (a["step"], key)


def test_compiled(tmp_path):
    eager, losses = watched(tmp_path / "eager", a_model(twice=False), 2, 4, steps=6)
    model = a_model(twice=False)
    watch = stabrun.watch(model, tmp_path / "compiled", 2, slow_every=4, quiet=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    assert trained(torch.compile(model, backend="aot_eager"), watch, steps=6, optimizer=optimizer) == losses
    watch.close()
    for a, b in zip(eager, rows_of(tmp_path / "compiled"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-5), key


def test_a_model_that_was_compiled_before_is_told(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    compiled, x = torch.compile(model, backend="aot_eager"), torch.ones(2, 3)
    compiled(x).sum().backward()
    watch = stabrun.watch(model, tmp_path, 1, quiet=True)
    for _ in range(2):
        compiled(x).sum().backward()
        watch.step(loss=1.0)
    assert capsys.readouterr().err.count("no layer was called in step 0") == 1
    torch.compiler.reset()
    compiled(x).sum().backward()
    watch.step(loss=1.0)
    watch.close()
    assert capsys.readouterr().err == ""
    assert "norm/out/0" in rows_of(tmp_path)[-1]


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_and_half(tmp_path, device):
    for name, dtype in (("autocast", torch.bfloat16), ("half", torch.bfloat16)):
        model = a_model().to(device)
        watch = stabrun.watch(model, tmp_path / name, 1, quiet=True)
        if name == "half":
            model.bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for batch in batches(2):
            with torch.autocast(device, dtype, enabled=name == "autocast"):
                loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            watch.step(loss=loss)
            optimizer.zero_grad()
        watch.close()
        plain = Plain(model := (a_model() if name == "autocast" else a_model().bfloat16()).to(device))
        with torch.autocast(device, dtype, enabled=name == "autocast"):
            loss_of(model, batches(1)[0])
        row = rows_of(tmp_path / name)[0]
        assert row["norm/out/up"][1] == pytest.approx(plain.mean(plain.out, "layers.1.up"), rel=1e-5)
        weight = model.layers[1].up.weight.detach().double()
        assert row["norm/weight/up"][1] == pytest.approx(float(weight.norm()), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False])
def test_fp16_scaling(tmp_path, fused, device):
    """Norms do not contain the loss scale; a step that the scaler skips is told, and is no divergence."""
    model, plain = a_model().to(device), a_model().to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=10**6)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    watch = stabrun.watch(model, tmp_path, 1, slow_every=1, quiet=True)
    scales = []
    for batch in batches(1) * 30:
        with torch.autocast(device, torch.float16):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        watch.step(loss=loss, scaler=scaler)
        optimizer.zero_grad()
    watch.close()
    rows = rows_of(tmp_path)
    skipped = [row["scale/skipped"] for row in rows]
    first = skipped.index(0)
    assert 5 < first < 30
    assert set(skipped[:first]) == {1}
    assert set(skipped[first:]) == {0}
    with torch.autocast(device, torch.float16):
        loss = loss_of(plain, batches(1)[0])
    loss.backward()
    expected = float(plain.layers[1].up.weight.grad.double().norm())
    assert rows[first]["norm/grad/up"][1] == pytest.approx(expected, rel=1e-2)
    assert stabrun.load_run(tmp_path).summary["verdict"] != "diverged"


def test_frozen_weights_and_layers_without_gradient(tmp_path):
    model = a_model()
    model.layers[0].requires_grad_(False)
    model.embed.weight.requires_grad_(False)
    rows, _ = watched(tmp_path, model, steps=2)
    assert rows[1]["norm/grad/up"][0] == 0
    assert rows[1]["norm/grad/up"][1] > 0
    assert rows[1]["norm/update/up"][0] == 0
    assert rows[1]["norm/in_grad/up"][0] is None
    assert rows[1]["norm/out/up"][0] > 0


def test_evaluation_and_other_models_are_not_measured(tmp_path):
    model, other = a_model(), a_model()

    def evaluate():
        with torch.no_grad():
            loss_of(model, torch.zeros(2, 5, dtype=torch.long))
        loss_of(other, torch.zeros(2, 5, dtype=torch.long))

    rows, _ = watched(tmp_path / "with", model, between=evaluate)
    without, _ = watched(tmp_path / "without")
    assert rows == without


SITES = {
    "all": (None, {"embed", "qkv", "out", "up", "down", "unused", "head"}),
    "glob": ("layers.*.up", {"up"}),
    "names": (["qkv", "head"], {"qkv", "head"}),
    "regex": (__import__("re").compile(r"\.(up|down)$"), {"up", "down"}),
    "added": ({"normed": "*.norm"}, {"embed", "qkv", "out", "up", "down", "unused", "head", "normed"}),
}


@pytest.mark.parametrize("case", SITES)
def test_sites_are_chosen_by_glob_or_regex(tmp_path, case):
    chosen, expected = SITES[case]
    watch = stabrun.watch(a_model(), tmp_path, sites=chosen, quiet=True)
    assert set(watch.sites.sites) == expected
    watch.close()


def test_a_pattern_without_a_module_is_refused(tmp_path):
    with pytest.raises(stabrun.UserError, match=r"sites='\*\.gate' matches no module; the model has embed, qkv"):
        stabrun.watch(a_model(), tmp_path, sites={"router": "*.gate"})
    with pytest.raises(stabrun.UserError, match="no linear layer"):
        stabrun.watch(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), tmp_path)


def test_the_table_of_sites_is_printed_once(tmp_path, capsys):
    model = a_model()
    watch = stabrun.watch(model, tmp_path)
    trained(model, watch, steps=2)
    watch.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["site", "layers", "type", "weights", "modules"]
    assert lines[2].split() == ["qkv", "2", "Linear", "24×8", "layers.*.qkv"]
    assert len(lines) == 8


def test_a_record_is_continued_or_refused(tmp_path):
    whole, _ = watched(tmp_path / "whole", steps=6)
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    data, directory = batches(6), tmp_path / "parts"

    def go_on(steps, first):
        watch = stabrun.watch(model, directory, 1, slow_every=1, first_step=first, steps=6, quiet=True)
        for batch in data[first : first + steps]:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            watch.step(loss=loss)
            optimizer.zero_grad()
        return watch

    go_on(2, 0).close("interrupted")
    state = deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    go_on(2, 2).close("interrupted")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    with pytest.raises(stabrun.UserError, match=r"record up to step 3. Pass first_step=4 to go on"):
        stabrun.watch(model, directory, quiet=True)
    go_on(4, 2).close()
    assert rows_of(directory) == whole
    run = stabrun.load_run(directory)
    assert [event["step"] for event in run.events if event["event"] == "start"] == [0, 2, 2]
    watch = stabrun.watch(model, directory, overwrite=True, quiet=True)
    assert not (directory / "metrics.jsonl").exists()
    watch.close()


def test_one_process_at_a_time(tmp_path):
    watch = stabrun.watch(a_model(), tmp_path, quiet=True)
    with pytest.raises(stabrun.UserError, match="another process"):
        stabrun.watch(a_model(), tmp_path, quiet=True)
    watch.close()
    with pytest.raises(stabrun.UserError, match="after close"):
        watch.step(loss=1.0)


def test_a_record_is_free_after_close_although_a_worker_lives(tmp_path):
    """The workers of a data loader are forked while the record is held."""
    watch = stabrun.watch(a_model(), tmp_path, quiet=True)
    loader = torch.utils.data.DataLoader(
        range(4), num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    assert len([*loader]) == 4
    watch.close()
    assert not stabrun.load_run(tmp_path).files.is_locked()
    stabrun.watch(a_model(), tmp_path, quiet=True).close()


def test_a_record_is_free_although_its_end_could_not_be_written(tmp_path, capsys):
    watch = stabrun.watch(a_model(), tmp_path, quiet=True)
    watch.step(loss=1.0, lr=0.1)
    (tmp_path / "summary.json").mkdir()
    assert watch.close()["steps"] == 1
    assert "The end of the record" in capsys.readouterr().err
    assert not stabrun.load_run(tmp_path).files.is_locked()


def diverging(watch, steps=200):
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        noise = 0.01 * float(torch.randn((), generator=generator))
        loss = 3.0 + 3.0 * math.exp(-step / 20) + noise + (0.05 * (step - 120) if step > 120 else 0.0)
        watch.step(loss=loss, lr=0.1)
        if step == 80:
            watch.saved(__file__)
        if watch.stopped:
            return step
    return None


def test_policies(tmp_path, capsys):
    told = []
    watch = stabrun.watch(a_model(), tmp_path, 1, quiet=True, on_verdict="stop", on_spike=told.append)
    stopped = diverging(watch)
    assert 120 < (stopped or 0) < 190
    message = capsys.readouterr().err
    assert "stabrun: diverged (runaway) at step 12" in message
    assert f"newest checkpoint before it {__file__} (step 81)" in message
    assert watch.verdict.verdict == "diverged"
    watch.close()


def test_a_function_is_told_every_change_of_the_verdict(tmp_path):
    told = []
    watch = stabrun.watch(a_model(), tmp_path, 1, quiet=True, on_verdict=told.append)
    assert diverging(watch) is None
    watch.close()
    assert [verdict.verdict for verdict in told][-1] == "diverged"
    assert not watch.stopped


def test_a_loss_that_is_not_finite_is_diverged_at_once(tmp_path):
    watch = stabrun.watch(a_model(), tmp_path, 1, quiet=True)
    for step in range(30):
        verdict = watch.step(loss=2.0 if step < 29 else math.nan)
    assert (verdict.verdict, verdict.reason, verdict.first_bad_step) == ("diverged", "nonfinite_loss", 29)
    watch.close()
    assert number(rows_of(tmp_path)[29]["train/loss"]) != number(rows_of(tmp_path)[29]["train/loss"])


def test_stabruns_own_model_has_the_values_of_its_trainer(tmp_path):
    from helpers import a_trainer, tiny

    config = tiny("observe.slow_every=1")
    trainer, twin = a_trainer(config), a_trainer(tiny("observe.every=0"))
    watch = stabrun.watch(twin.model, tmp_path, 1, slow_every=1, quiet=True)
    expected = []
    for step in range(3):
        expected.append(trainer.step(step).read())
        row = twin.step(step).read()
        watch.step(loss=row["train/loss"], grad_norm=row["grad/norm"])
    watch.close()
    for a, b in zip(expected, rows_of(tmp_path), strict=True):
        for key in a:
            if key.startswith(("norm/out", "norm/in/", "residual")):
                assert b[key] == pytest.approx(a[key] if "head" not in key else a[key][0], rel=1e-5), key


class WithLoss(nn.Module):
    """A model that returns its loss; a NaN can be planted in a weight."""

    def __init__(self):
        super().__init__()
        self.model = a_model()

    def forward(self, tokens):
        return {"loss": loss_of(self.model, tokens)}


def bad_step(model, watch, guarded=False):
    """A loop in which a bias is NaN in step 4. Returns the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    if guarded:
        watch.guard(optimizer)
    bias = model.model.layers[1].up.bias
    for step, batch in enumerate(batches(8)):
        bias.data[0] = math.nan if step == 4 else 0.0
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        watch.step(loss=loss)
        optimizer.zero_grad()
    bias.data[0] = 0.0
    return optimizer


@pytest.mark.parametrize("every", [1, 3])
def test_a_fault_is_located_before_the_update(tmp_path, capsys, every):
    model = WithLoss()
    watch = stabrun.watch(model, tmp_path, every, quiet=True, on_nonfinite="locate")
    bad_step(model, watch)
    watch.close()
    events = [event for event in stabrun.load_run(tmp_path).events if event["event"] == "nonfinite"]
    assert events[0]["step"] == 4
    assert "model.layers.1.up (Linear)" in events[0]["fault"]
    assert "step 4: " in capsys.readouterr().err


def test_a_guard_keeps_the_run_healthy(tmp_path):
    model = WithLoss()
    watch = stabrun.watch(model, tmp_path, 1, quiet=True, on_nonfinite="locate")
    optimizer = bad_step(model, watch, guarded=True)
    watch.close()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    rows = rows_of(tmp_path)
    assert [row.get("scale/skipped") for row in rows] == [None] * 4 + [1.0] + [None] * 3
    events = [(event["event"], event["step"]) for event in stabrun.load_run(tmp_path).events]
    assert ("skipped", 4) in events
    assert ("nonfinite", 4) in events
    assert type(optimizer).step is torch.optim.AdamW.step
    assert "step" not in vars(optimizer)


def test_locate_on_a_batch(tmp_path):
    model = WithLoss()
    watch = stabrun.watch(model, tmp_path, 1, quiet=True)
    with pytest.raises(stabrun.UserError, match="give it a batch"):
        watch.locate()
    assert watch.locate(batches(1)[0]) is None
    model.model.layers[0].down.weight.data[2, 3] = math.nan
    fault = watch.locate({"tokens": batches(1)[0]})
    assert fault.module == "model.layers.0.down"
    watch.close()


WRONG = {  # what is wrong → the arguments, and what the message says
    "no step": ({"every": 0}, "every=0: must be a whole number, at least 1"),
    "text": ({"every": "10"}, "every='10': must be a whole number"),
    "no whole number": ({"steps": 1e4}, "steps=10000.0: must be a whole number"),
    "true": ({"slow_every": True}, "slow_every=True: must be a whole number, at least 0"),
    "before the first": ({"first_step": -1}, "first_step=-1: must be a whole number, at least 0"),
    "policy": ({"on_verdict": "Stop"}, 'on_verdict=\'Stop\': must be "stop", "warn", a function or None'),
    "word": ({"on_nonfinite": "stop"}, "on_nonfinite='stop': must be \"locate\" or None"),
    "tracker": ({"tracker": "tensorboard"}, 'must be "wandb" or "none"'),
    "flag": ({"overwrite": "no"}, "overwrite='no': must be True or False"),
    "loss_of": ({"loss_of": 3}, "loss_of=3: must be a function or None"),
    "settings": ({"settings": {"weights": torch.ones(2)}}, "settings: weights is a Tensor: must be a text, a number"),
    "no settings": ({"settings": "mine"}, "settings='mine': must be a dictionary"),
    "no site": ({"sites": []}, r"sites=\[\]: must be a glob"),
    "no pattern": ({"sites": {"mlp": 3}}, "sites=3: must be a glob"),
    "no directory": ({"out": ""}, "out='': must be the path of a directory"),
    "file": ({"out": __file__}, "out=.*: not a directory"),
    "below a file": ({"out": f"{__file__}/run"}, "out=.*: not a directory"),
    "not writable": ({"out": "/proc/self"}, "watch: out=/proc/self: "),
    "no model": ({"model": [1]}, "the model is of type list"),
    "no parameters": ({"model": nn.ReLU()}, r"the model \(ReLU\) has no parameters"),
    "lazy": ({"model": nn.Sequential(nn.LazyLinear(3))}, "0.weight has no shape yet"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_refused(tmp_path, wrong):
    options, text = WRONG[wrong]
    with pytest.raises(stabrun.UserError, match=text):
        stabrun.watch(**{"model": a_model(), "out": tmp_path, "quiet": True} | options)
    assert not [*tmp_path.iterdir()]


def test_a_wrong_value_of_a_step_is_refused(tmp_path):
    watch = stabrun.watch(a_model(), tmp_path, quiet=True)
    for values, text in (
        ({"loss": None}, "loss=None: must be a number or a tensor of one element"),
        ({"loss": torch.ones(4, 7)}, r"loss is a tensor of shape \[4, 7\]: must be one number"),
        ({"loss": 1.0, "val_loss": "2"}, "val_loss='2': must be a number"),
        ({"loss": 1.0, "step": "3"}, "step='3': must be a whole number, at least 0, the step after the last"),
        ({"loss": 1.0, "tokens": 0.5}, "tokens=0.5: must be a whole number"),
    ):
        with pytest.raises(stabrun.UserError, match=text):
            watch.step(**values)
    watch.step(loss=torch.ones(1, 1), lr=np.float32(0.5), val_loss=np.float32(2))
    watch.close()
    (row,) = rows_of(tmp_path)
    assert (row["train/loss"], row["train/lr"], row["val/loss"]) == (1.0, 0.5, 2.0)


def test_a_step_without_an_update_is_told_once(tmp_path, capsys):
    model = a_model()
    watch = stabrun.watch(model, tmp_path, quiet=True)
    trained(model, watch, steps=2)
    assert not capsys.readouterr().err
    watch.step(loss=1.0, lr=0.1)  # of an optimizer that is not of torch
    assert not capsys.readouterr().err
    watch.step(loss=1.0)
    watch.step(loss=1.0)
    assert capsys.readouterr().err.count("step 3: no optimizer has updated the model before this step") == 1
    watch.close()


def test_sites_are_named_by_several_patterns(tmp_path):
    watch = stabrun.watch(a_model(), tmp_path, sites={"mlp": ["*.up", re.compile("down$")]}, quiet=True)
    assert watch.sites.sites["mlp"][0].modules.keys() == {"layers.0.up", "layers.0.down"}
    watch.close()


def test_the_record_is_sent_to_wandb(tmp_path):
    from wandb_files import assert_holds

    watch = stabrun.watch(a_model(), tmp_path, 2, slow_every=4, quiet=True, tracker="wandb")
    trained(watch.model, watch, steps=5)
    watch.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert_holds(folder, rows_of(tmp_path), norms_every=2)


def test_a_model_that_is_moved_is_refused(tmp_path):
    model = a_model()
    watch = stabrun.watch(model, tmp_path, quiet=True)
    model.to("meta")
    with pytest.raises(stabrun.UserError, match="moved from cpu to meta"):
        model(batches(1)[0].to("meta"))
    watch.close()


def test_locate_on_a_batch_keeps_the_last_one_of_training(tmp_path):
    model = a_model()
    watch = stabrun.watch(model, tmp_path, quiet=True, on_nonfinite="locate")
    (batch,) = batches(1)
    loss_of(model, batch)
    fault = watch.locate(torch.full_like(batch, VOCAB))
    assert fault.token == VOCAB
    assert watch.locate() is None
    watch.close()


def test_copies_of_a_watched_model_are_not_observed(tmp_path):
    """Copied, averaged, pickled and saved as a whole, while arguments of its last pass are kept that cannot be."""
    for copied in (deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded):
        model, name = a_model(), str(len([*tmp_path.iterdir()]))
        watch = stabrun.watch(model, tmp_path / name, 1, slow_every=1, quiet=True, on_nonfinite="locate")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for batch in batches(2):
            loss_of(model, batch).backward()
            copy = copied(model)
            loss_of(copy, batch[:, :5]).backward()  # would change the means
            optimizer.step()
            watch.step(loss=1.0)
            optimizer.zero_grad()
        watch.close()
        assert not any(module._forward_hooks for module in model.modules())
        assert copy.state_dict().keys() == a_model().state_dict().keys()
    found = [rows_of(tmp_path / name) for name in sorted(path.name for path in tmp_path.iterdir())]
    alone, _ = watched(tmp_path / "alone", steps=2)
    for rows in found:
        for row, expected in zip(rows, alone, strict=True):
            assert row | {"train/loss": 0} == expected | {"train/loss": 0}


def test_a_saved_model_is_loaded_without_stabrun(tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    watch = stabrun.watch(model, tmp_path / "run", 1, quiet=True, on_nonfinite="locate")
    torch.save(model, tmp_path / "model.pt")
    watch.close()
    script = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "model(torch.ones(1, 8)).sum().backward();"
        "assert not [name for name in sys.modules if name.startswith('stabrun')]"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], check=True, timeout=120)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_the_patch_of_other_code_stays():
    from types import SimpleNamespace

    from stabrun.watching.tap import Tap

    module = SimpleNamespace(function=lambda x: x + 1)
    tap, heard = Tap("function", module), []
    original = module.function
    tap.add(lambda result, x: heard.append(result))
    inner = module.function
    module.function = other = lambda x: 10 * inner(x)
    assert module.function(1) == 20
    tap.remove(tap.listeners[0])
    assert module.function is other
    assert module.function(2) == 30
    tap.add(lambda result, x: heard.append(result))
    assert module.function(3) == 40
    tap.remove(tap.listeners[0])
    assert module.function is other
    assert heard == [2, 40]
    assert original(1) == 2
