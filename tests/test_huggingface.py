"""Models of transformers under its Trainer: the sites and values of a watched run against plain hooks, bit for bit the
same training, and what the callback takes over from the Trainer."""

import json
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch

from stabrun.record.jsonl import read_checked

pytestmark = [
    pytest.mark.trainers,
    pytest.mark.skipif(
        not (find_spec("transformers") and find_spec("accelerate")), reason="stabrun[huggingface] is not installed"
    ),
]

if find_spec("transformers") and find_spec("accelerate"):
    import transformers as hf
    from hf_models import logged, trainer

    from stabrun.watching.huggingface import WatchCallback

EVERY, SLOW = 10, 20

ATTENTION = {name: f"model.layers.*.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
FEEDFORWARD = {name: f"model.layers.*.mlp.{name}" for name in ("up_proj", "down_proj")}
GATED = {"gate_proj": "model.layers.*.mlp.gate_proj"} | FEEDFORWARD
ENDS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
ENCODER_DECODER = {
    "shared": "shared",
    "encoder.embed_tokens": "encoder.embed_tokens",
    "decoder.embed_tokens": "decoder.embed_tokens",
    **{f"{part}.SelfAttention.{x}": f"{part}.block.*.layer.0.SelfAttention.{x}" for part in ("encoder", "decoder")
       for x in "qkvo"},
    **{f"EncDecAttention.{x}": f"decoder.block.*.layer.1.EncDecAttention.{x}" for x in "qkvo"},
    **{f"{part}.relative_attention_bias": f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias"
       for part in ("encoder", "decoder")},
    "lm_head": "lm_head",
}  # fmt: skip
PARTS = {"encoder": 1, "decoder": 2}  # stack → number of the sub-layer that feeds forward

SITES = {  # model → site → path of its module, with * for the layer
    "gpt2": {
        "wte": "transformer.wte",
        "wpe": "transformer.wpe",
        "c_attn": "transformer.h.*.attn.c_attn",
        "attn.c_proj": "transformer.h.*.attn.c_proj",
        "c_fc": "transformer.h.*.mlp.c_fc",
        "mlp.c_proj": "transformer.h.*.mlp.c_proj",
        "lm_head": "lm_head",
    },
    "llama": ATTENTION | GATED | ENDS,
    "olmo2": ATTENTION | GATED | ENDS,
    "gemma2": ATTENTION | GATED | ENDS,
    "nemotron": ATTENTION | FEEDFORWARD | ENDS,
    "mixtral": ATTENTION | {"experts": "model.layers.*.mlp.experts"} | ENDS,
    "t5": ENCODER_DECODER
    | {
        f"{part}.{x}": f"{part}.block.*.layer.{n}.DenseReluDense.{x}" for part, n in PARTS.items() for x in ("wi", "wo")
    },
    "switch": ENCODER_DECODER
    | {f"{part}.mlp.{x}": f"{part}.block.0.layer.{n}.mlp.{x}" for part, n in PARTS.items() for x in ("wi", "wo")}
    | {f"{part}.classifier": f"{part}.block.1.layer.{n}.mlp.router.classifier" for part, n in PARTS.items()}
    | {
        f"{part}.experts.{x}": f"{part}.block.1.layer.{n}.mlp.experts.expert_[0123].{x}"
        for part, n in PARTS.items()
        for x in ("wi", "wo")
    },
    "vit": {f"{x}_proj": f"vit.layers.*.attention.{x}_proj" for x in "qkvo"}
    | {name: f"vit.layers.*.mlp.{name}" for name in ("fc1", "fc2")}
    | {"classifier": "classifier"},
}


def paths(pattern):
    """The modules of a site, a list for each layer: several if experts share one."""
    layers = [pattern.replace("*", str(layer)) for layer in range(2)] if "*" in pattern else [pattern]
    return [[path.replace("[0123]", n) for n in ("0123" if "[" in path else "0")] for path in layers]


class Plain:
    """Sums of the vector norms of modules, by plain hooks, and the norms of weights and of unclipped gradients."""

    def __init__(self, model, names):
        self.model, self.steps, self.sums, self.grads = model, [], {}, {}
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda _, args, y, name=name: self.saw(name, args, y))
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: self.grads.update({name: float(p.grad.double().norm())})
            )

    def saw(self, name, args, output):
        for kind, x in (("out", output), ("in", args[0])):
            norms = x.detach().double().norm(dim=-1)
            total, count = self.sums.get((kind, name), (0.0, 0))
            self.sums[kind, name] = total + float(norms.sum()), count + norms.numel()

    def next(self):
        weights = {name: float(p.detach().double().norm()) for name, p in self.model.named_parameters()}
        self.steps.append((self.sums, self.grads, weights))
        self.sums, self.grads = {}, {}

    def callback(self):
        plain = self

        class Next(hf.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                plain.next()

        return Next()

    def row(self, step, sites):
        """What the record should hold: key → value by layer."""
        sums, grads, weights = self.steps[step]
        found = {}
        for site, pattern in sites.items():
            layers = paths(pattern)
            for kind in ("out", "in"):
                both = [[sums.get((kind, path), (0.0, 0)) for path in layer] for layer in layers]
                means = [sum(t for t, _ in own) / n if (n := sum(c for _, c in own)) else None for own in both]
                if any(mean is not None for mean in means):
                    found[f"norm/{kind}/{site}"] = means
            for kind, norms in (("grad", grads), ("weight", weights)):
                found[f"norm/{kind}/{site}"] = [
                    sum(norm**2 for name, norm in norms.items() if self.is_of(name, layer)) ** 0.5 for layer in layers
                ]
        return found

    def is_of(self, parameter, layer):
        """Whether a parameter is a matrix of one of the modules of a layer, or tied to it."""
        tied = {id(p) for path in layer for p in self.model.get_submodule(path).parameters(recurse=False)}
        matrix = self.model.get_parameter(parameter)
        return id(matrix) in tied and matrix.dim() > 1


def record(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").open()]


def same_run(first, second):
    """Whether two trainings had the same losses and the same weights at the end, bit for bit."""
    states = [made.model.state_dict() for made in (first, second)]
    return logged(first, "loss") == logged(second, "loss") and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def replaying(names, every, kept):
    """A Trainer that takes each step to be compared once more, eagerly, on a copy of the model with plain hooks."""

    class Replaying(hf.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step % every == 0:
                with torch.random.fork_rng():
                    plain = kept[self.state.global_step] = Plain(deepcopy(self.model).train(), names)
                    inputs = self._prepare_inputs(inputs)
                    loss = self.compute_loss(plain.model, inputs, num_items_in_batch=num_items_in_batch)
                    torch.autograd.backward(loss)  # not loss.backward(), where the callback learns of the run's losses
                plain.next()
            return super().training_step(model, inputs, num_items_in_batch)

    return Replaying


def compare(name, directory, steps, every=EVERY, slow_every=SLOW, **options):
    """A watched run against plain hooks and against one without any.

    In eager, plain hooks are those of the unwatched run; a compiled run has its steps repeated, because it drifts away
    from an eager one by rounding.
    """
    sites, replayed = SITES[name], {}
    names = {path for pattern in sites.values() for layer in paths(pattern) for path in layer}
    bare = trainer(name, directory, steps=steps, **options)
    if not options:
        plain = Plain(bare.model, names)
        bare.add_callback(plain.callback())
    bare.train()
    watch = WatchCallback(directory / "run", every, slow_every=slow_every, quiet=True)
    cls = replaying(names, every, replayed) if options else hf.Trainer
    watched = trainer(name, directory, [watch], steps=steps, cls=cls, **options)
    watched.train()

    assert same_run(bare, watched)
    facts = json.loads((directory / "run" / "watch.json").read_text())
    expected = {site: [", ".join(layer) for layer in paths(pattern)] for site, pattern in sites.items()}
    assert {site: [path for path in layers if path] for site, layers in facts["sites"].items()} == expected
    rows = record(directory / "run")
    assert [row["step"] for row in rows] == list(range(steps))
    assert [row["train/loss"] for row in rows] == logged(watched, "loss")
    assert [row["grad/norm"] for row in rows] == pytest.approx(logged(watched, "grad_norm"), rel=1e-6)
    assert [row["train/lr"] for row in rows] == logged(watched, "learning_rate")
    for step, row in enumerate(rows):
        assert (step % every == 0) == any(key.startswith("norm/out/") for key in row)
        assert (step % slow_every == 0) == any(key.startswith("norm/update/") for key in row)
        if step % every:
            continue
        for key, values in (replayed[step].row(0, sites) if options else plain.row(step, sites)).items():
            if key.startswith("norm/in/") and key not in row:
                assert isinstance(watched.model.get_submodule(paths(sites[key[8:]])[0][0]), torch.nn.Embedding)
                continue
            found = row[key] if isinstance(row[key], list) else [row[key]]
            found = [x for x, path in zip(found, facts["sites"][key.split("/", 2)[2]], strict=True) if path]
            for x, value in zip(found, values, strict=True):
                if value is None:
                    assert x is None, (key, step)
                else:
                    assert x == pytest.approx(value, rel=1e-5, abs=1e-7), (key, step)
    summary = read_checked(directory / "run" / "summary.json")
    assert (summary["status"], summary["steps"]) == ("complete", steps)


@pytest.mark.parametrize("name", SITES)
def test_a_model_under_the_trainer(tmp_path, name):
    compare(name, tmp_path, 50)


AOT = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def test_a_compiled_model(tmp_path):
    compare("vit", tmp_path, 12, 6, 6, **AOT)


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_each_model_compiled(tmp_path, name):
    torch.compiler.reset()
    compare(name, tmp_path, 50, **AOT)
