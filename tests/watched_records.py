"""Made-up records of watched runs, with the site names of models in wide use, and a known site at fault."""

import json
import math
from dataclasses import dataclass, field

from stabrun.record.jsonl import dumps
from stabrun.record.run_dir import RunDir
from stabrun.record.watched import Watched
from stabrun.verdict.judge import Judge

LAYERS = 4
KINDS = "norm/out", "norm/in", "norm/weight", "norm/grad"
SLOW = "norm/update", "norm/in_grad", "norm/adam_m", "norm/adam_v", "adam/surprise"


@dataclass(frozen=True)
class Model:
    """Names in the order of the forward pass; `feeds`: a site → keys that grow with its output; `stacks`: their sites.

    A site at fault and what it feeds are named by hand for each model, and not by the package's own table.
    """

    before: tuple[str, ...]
    stacks: dict[str, tuple[str, ...]]
    after: tuple[str, ...]
    feeds: dict[str, tuple[str, ...]] = field(default_factory=dict)


MODELS = {
    "GPT2LMHeadModel": Model(
        ("wte", "wpe"), {"": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")}, ("lm_head",),
        {
            "c_attn": ("norm/in/attn.c_proj", "attn/max_logit"), "attn.c_proj": ("residual/norm",),
            "c_fc": ("norm/in/mlp.c_proj",), "mlp.c_proj": ("residual/norm",),
        },
    ),
    "LlamaForCausalLM": Model(
        ("embed_tokens",), {"": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
        ("lm_head",),
        {
            "q_proj": ("attn/max_logit",), "k_proj": ("attn/max_logit",), "v_proj": ("norm/in/o_proj",),
            "o_proj": ("residual/norm",), "gate_proj": ("norm/in/down_proj",), "up_proj": ("norm/in/down_proj",),
            "down_proj": ("residual/norm",),
        },
    ),
    "T5ForConditionalGeneration": Model(
        ("shared",),
        {
            "encoder": tuple(f"encoder.{name}" for name in ("SelfAttention.q", "SelfAttention.o", "wi", "wo")),
            "decoder": (
                "decoder.SelfAttention.q", "decoder.SelfAttention.o", "EncDecAttention.q", "EncDecAttention.o",
                "decoder.wi", "decoder.wo",
            ),
        },
        ("lm_head",),
        {
            "encoder.SelfAttention.q": ("norm/in/encoder.SelfAttention.o",),
            "EncDecAttention.q": ("norm/in/EncDecAttention.o",), "encoder.wi": ("norm/in/encoder.wo",),
            "decoder.wi": ("norm/in/decoder.wo",), "encoder.wo": ("residual/norm/encoder",),
            "EncDecAttention.o": ("residual/norm/decoder",), "decoder.wo": ("residual/norm/decoder",),
        },
    ),
    "ViTForImageClassification": Model(
        ("projection",),
        {"": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")},
        ("classifier",),
        {
            "query": ("attn/max_logit",), "value": ("norm/in/attention.output.dense",),
            "attention.output.dense": ("residual/norm",), "intermediate.dense": ("norm/in/output.dense",),
            "output.dense": ("residual/norm",),
        },
    ),
}  # fmt: skip


def rows(name, steps=240, fault=None, layer=2, start=100, first=0, every=1, slow_every=5, absent=()):
    """The rows of a run, which diverges if a site is at `fault`: its output grows in `layer`, with what it feeds.

    `first` and `every` number the steps; the sites in `absent` are not called in each third row in layer 0, or, if they
    have no layers, not at all then.
    """
    model = MODELS[name]
    for index in range(steps):
        wave = math.sin(12.9898 * index) * math.cos(3.1 * index)
        rise = min(max(0, index - start), 40) if fault else 0
        loss = 6 * math.exp(-4 * index / steps) + 1.5 + 0.02 * wave + 0.08 * max(0, rise - 10)
        row = {"step": first + every * index, "train/loss": loss, "train/lr": 1e-3, "grad/norm": 1 + 0.1 * wave}
        kinds = KINDS if index % slow_every else (*KINDS, *SLOW)
        row |= statistics(model, kinds, index, rise, fault, layer)
        for site in absent if index % 3 == 0 else ():
            for key in [key for key in row if key.endswith(f"/{site}")]:
                if isinstance(row[key], list):
                    row[key][0] = None
                else:
                    del row[key]
        yield row


def statistics(model, kinds, index, rise, fault, layer):
    """The keys of one row, in the order of the forward pass within each kind."""
    fed, found = model.feeds.get(fault, ()), {}
    quiet = [math.exp(index / 400 + 0.02 * math.sin(78.233 * index + k)) for k in range(LAYERS)]
    loud = [value * math.exp(0.15 * rise * (k == layer)) for k, value in enumerate(quiet)]
    sites = [site for stack in model.stacks.values() for site in stack]
    for kind in kinds:
        found |= {f"{kind}/{site}": quiet[0] for site in model.before if kind != "norm/in"}
        for site in sites:
            key = f"{kind}/{site}"
            grows = key in fed or (kind == "norm/out" and site == fault)
            found[key] = list(loud if grows else quiet)
        found |= {f"{kind}/{site}": quiet[0] for site in model.after}
    attention = ("attn/max_logit", "attn/entropy") if len(kinds) > len(KINDS) else ()
    for key in ("residual/norm", "grad/norm_by_layer", *attention):
        for stack in model.stacks:
            whole = f"{key}/{stack}" if stack else key
            found[whole] = list(loud if whole in fed else quiet)
    return found


def a_watched_run(directory, name="GPT2LMHeadModel", status="complete", planned=None, settings=(), **options):
    """A watched run on disk, as `stabrun.watch` leaves it. Returns its files."""
    model, files = MODELS[name], RunDir(directory)
    files.path.mkdir(parents=True, exist_ok=True)
    sites = {site: [site] for site in model.before + model.after}
    for stack, names in model.stacks.items():
        sites |= {site: [f"{stack or 'h'}.{k}.{site}" for k in range(LAYERS)] for site in names}
    stacks = {stack: [f"{stack or 'h'}.{k}" for k in range(LAYERS)] for stack in model.stacks}
    files.write_watched(
        Watched(
            model=name, planned=planned, slow_every=5, sites=sites, stacks=stacks,
            single=list(model.before + model.after), settings={"lr": 1e-3, "seed": 0, **dict(settings)},
        )
    )  # fmt: skip
    recorded, judge = list(rows(name, **options)), Judge.of_record(files)
    files.metrics.write_text("".join(dumps(row) + "\n" for row in recorded))
    for row in recorded:
        judge.add(row)
    events = [{"event": "start", "time": 1.0, "step": recorded[0]["step"]}]
    if status:
        verdict = judge.conclude()
        events.append({"event": status, "time": 9.0, "step": verdict.horizon + 1})
        files.write_summary(json.loads(dumps({"status": status, **vars(verdict), "steps": verdict.horizon + 1})))
    files.events_file.write_text("".join(dumps(event) + "\n" for event in events))
    return files
