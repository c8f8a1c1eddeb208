"""torch.compile: which graphs it makes, that nothing runs uncompiled, and that the numbers are those without it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import VARIANTS, a_trainer, tiny
from torch._dynamo import config as dynamo
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from stabrun.config import AttentionConfig, UserError
from stabrun.model import attention
from stabrun.model.attention import AttentionCore
from stabrun.model.switches import FLEX
from stabrun.record.run_dir import RunDir
from stabrun.training import trainer as module
from stabrun.training.compilation import OFF, compile_parts, compiles, graphs
from stabrun.training.objective import Objective
from stabrun.training.run import train

compile_by_torch = torch.compile
STEPS = (0, 1)  # with expensive statistics, and without


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def by(monkeypatch):
    """Make trainers compile by a backend that is quicker than Inductor."""
    return lambda backend: monkeypatch.setattr(module, "compile_parts", partial(compile_parts, backend=backend))


def rows(trainer):
    return [trainer.step(step).read() for step in STEPS]


def close(compiled, plain, rel=2e-5):
    assert compiled.keys() == plain.keys()
    for key, value in plain.items():
        assert compiled[key] == pytest.approx(value, rel=rel, abs=1e-6), key


def test_five_arms_in_one_process_compile_in_their_first_cell_only(by):
    """A block has three graphs: with all statistics, with the quick ones, and for validation."""
    by("aot_eager")
    for count, variant in enumerate(("baseline", "qk_norm", "qk_norm_cap", "layer_scale", "sigma_reparam"), 1):
        for lr in (1e-3, 1e-2, 1e-1):
            trainer = a_trainer(tiny(f"+variant={variant}", "train.compile=true", "model.n_layer=3", f"optim.lr={lr}"))
            found = rows(trainer)
            trainer.validate()
            found += [trainer.step(2).read()]
            # All arms share three: output layer with loss in the three kinds.
            assert graphs() == 3 * count + 3, (variant, lr)
        plain = a_trainer(tiny(f"+variant={variant}", "model.n_layer=3", f"optim.lr={lr}"))
        expected = [plain.step(step).read() for step in range(3)]
        close(found[0], expected[0])
        assert found[2]["train/loss"] == pytest.approx(expected[2]["train/loss"], rel=1e-4)
    assert not counters["graph_break"]


# The backward graph of these, and of all by the slow test.
QUICK = [
    (variant, "aot_eager" if variant in ("qkv_norm", "soft_clip", "gemma2") else "eager")
    for variant in (*VARIANTS, "qk_clip")
]
FULL = [pytest.param(variant, "aot_eager", marks=pytest.mark.slow) for variant, how in QUICK if how == "eager"]


@pytest.mark.parametrize(("variant", "backend"), [*QUICK, *FULL])
def test_the_numbers_are_those_without_compilation(by, variant, backend):
    by(backend)
    words = f"+variant={variant}", "model.n_layer=1", "optim.z_loss=1e-3"
    compiled, plain = rows(a_trainer(tiny(*words, "train.compile=true"))), rows(a_trainer(tiny(*words)))
    assert graphs() == 4
    assert not counters["graph_break"]
    for pair in zip(compiled, plain, strict=True):
        close(*pair, rel=2e-4)


def test_what_cannot_be_compiled_is_an_error(by):
    by("eager")
    trainer = a_trainer(tiny("train.compile=true"))
    trainer.model.blocks[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(Unsupported):
        trainer.step(0)


@pytest.mark.slow
def test_more_graphs_than_torch_allows_by_default(by):
    by("eager")
    for layers in range(1, 12):
        rows(a_trainer(tiny("train.compile=true", f"model.d_model={8 * layers}", "model.n_layer=1", "model.n_head=1")))
    assert graphs() == 5 * 11


def test_dropout_draws_the_same_numbers_by_inductor():
    words = "model.dropout=0.5", "model.n_layer=1", "observe.every=0"
    compiled, plain = rows(a_trainer(tiny(*words, "train.compile=true"))), rows(a_trainer(tiny(*words)))
    other = a_trainer(tiny(*words, "seed=1"))
    assert [row["train/loss"] for row in compiled] == pytest.approx([row["train/loss"] for row in plain], rel=1e-5)
    other.model.load_state_dict(a_trainer(tiny(*words)).model.state_dict())
    assert other.step(0).read()["train/loss"] != pytest.approx(plain[0]["train/loss"], rel=1e-3)


@pytest.mark.parametrize("name", OFF)
def test_compilation_that_is_turned_off(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not compiles(tiny().train, cuda)
    with pytest.raises(UserError, match=name):
        compiles(tiny("train.compile=true").train, cpu)
    monkeypatch.delenv(name)
    assert [compiles(tiny().train, device) for device in (cpu, cuda)] == [False, True]


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_parts_of_the_sequence_share_a_graph(backend):
    trainer = a_trainer(tiny("model.n_layer=1", "observe.every=0"))
    objective = Objective(trainer.model, 0.0, parts=4)
    compile_parts(objective, backend)
    tokens = trainer.batch(0)
    objective.accumulate(tokens, 1, lambda loss: loss)
    assert graphs() == 2


def test_the_record_says_what_was_compiled(by, tmp_path):
    by("eager")
    directory = tmp_path / "run"
    train(tiny("train.compile=true", "+variant=soft_cap", "train.val_every=10", f"run_dir={directory}"))
    run = RunDir(directory)
    facts = run.environment()
    assert (facts["compiled"], facts["attention"]) == (True, ["explicit"])
    made = {event["step"]: event["graphs"] for event in run.events() if event["event"] == "compiled"}
    # The block, and output layer with loss; then without slow statistics; then for validation.
    assert made == {0: 2, 1: 2, 9: 2}
    torch._dynamo.reset()
    train(tiny(f"run_dir={tmp_path / 'plain'}"))
    plain = RunDir(tmp_path / "plain")
    assert (plain.environment()["compiled"], plain.environment()["attention"]) == (False, ["sdpa"])
    assert not [event for event in plain.events() if event["event"] == "compiled"]


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from helpers import a_trainer, tiny
from torch._dynamo.utils import counters
a_trainer(tiny("train.compile=true", "model.n_layer=1", "observe.every=0")).step(0).read()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_workers_share_the_code_that_inductor_made(tmp_path):
    def counts():
        program = WORKER.format(tests=str(Path(__file__).parent))
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()[-2:]]

    hits, misses = counts()
    assert hits == 0
    assert misses > 0
    assert counts() == [misses, 0]


@pytest.fixture
def flex(monkeypatch):
    """Use flex_attention on the CPU without a kernel, because torch has none for its backward pass there."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(AttentionCore, "path", lambda core, device: FLEX)
    monkeypatch.setattr(torch, "compile", partial(compile_by_torch, backend="aot_eager"))
    attention.compiled_flex_attention.cache_clear()
    yield
    attention.compiled_flex_attention.cache_clear()


@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_has_the_numbers_of_the_explicit_path(by, request, compiled):
    by("aot_eager")
    words = "+variant=qk_norm_cap", "model.n_layer=2", "model.attn.soft_temp=2", "train.micro_batch_size=2"
    expected = rows(a_trainer(tiny(*words)))
    request.getfixturevalue("flex")
    trainer = a_trainer(tiny(*words, f"train.compile={str(compiled).lower()}", "train.recompute=blocks"))
    assert trainer.attention == [FLEX]
    for pair in zip(rows(trainer), expected, strict=True):
        close(*pair)
    assert graphs() == (4 if compiled else 1)


def test_uncompiled_runs_of_many_arms_with_flex_attention(flex):
    limits = dynamo.recompile_limit, dynamo.accumulated_recompile_limit
    dynamo.recompile_limit = 8
    q = torch.randn(1, 2, 32, 16, requires_grad=True)
    try:
        for cap in range(1, 11):
            core = AttentionCore(AttentionConfig(soft_cap=cap), 16)
            core.mask_for(32, q.device)
            core(q, q, q).sum().backward()
    finally:
        dynamo.recompile_limit, dynamo.accumulated_recompile_limit = limits
    assert graphs() == 10
