"""The schema of everything in `conf/`: types, bounds and the mark of each key.

A key is marked **result** (it changes the numbers), **resource** (where and how fast) or **view** (what is
shown). `run_id` hashes the result keys alone, so the same experiment is the same run on any machine.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import stabrun

RESULT, RESOURCE, VIEW = "result", "resource", "view"


def conf_dir() -> Path:
    """The folder of configuration files: inside the package in a wheel, beside it in a checkout."""
    package = Path(stabrun.__file__).parent
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())


class UserError(Exception):
    """Something typed or configured wrongly; its text is one or two sentences for the user, exit status 2."""


def key(default: Any, mark: str, doc: str, **bounds: Any) -> Any:
    """A config field. `bounds`: `above`, `at_least`, `at_most`, `below` (numbers) or `allowed` (a tuple)."""
    return field(default=default, metadata={"mark": mark, "doc": doc, "bounds": bounds})


def many(mark: str, doc: str) -> Any:
    """A config field that is a list, empty by default."""
    return field(default_factory=list, metadata={"mark": mark, "doc": doc, "bounds": {}})


def group(cls: type) -> Any:
    return field(default_factory=cls)


@dataclass
class NormConfig:
    kind: str = key(
        "layernorm",
        RESULT,
        "kind of every norm in the model; layernorm1p stores its gain minus one",
        allowed=("layernorm", "rmsnorm", "layernorm1p", "none"),
    )
    eps: float = key(1e-5, RESULT, "added to the variance", above=0)
    affine: bool = key(True, RESULT, "whether norms learn a gain (and a bias where model.bias is set)")


@dataclass
class AttentionConfig:
    pre_norm: bool = key(True, RESULT, "norm before QKV")
    out_norm: bool = key(False, RESULT, "norm of Proj's output, before the residual add")
    post_norm: bool = key(False, RESULT, "norm after the residual add")
    qk_norm: str = key(
        "none", RESULT, "norm of Q and of K: of each head, or full width", allowed=("none", "head", "full")
    )
    v_norm: str = key("none", RESULT, "norm of V: of each head, or full width", allowed=("none", "head", "full"))
    norm_after_position: bool = key(False, RESULT, "whether Q/K norms follow the position encoding")
    soft_temp: float = key(1.0, RESULT, "β in softmax(β·logit)", above=0)
    soft_cap: float | None = key(None, RESULT, "c in c·tanh(logit/c); null for none", above=0)
    clip_low: float = key(0.0, RESULT, "γ in clip((ζ−γ)·softmax+γ, 0, 1)", at_most=0)
    clip_high: float = key(1.0, RESULT, "ζ in clip((ζ−γ)·softmax+γ, 0, 1)", at_least=1)


@dataclass
class MlpConfig:
    pre_norm: bool = key(True, RESULT, "norm before FC1")
    out_norm: bool = key(False, RESULT, "norm of FC2's output, before the residual add")
    post_norm: bool = key(False, RESULT, "norm after the residual add")
    width: int | None = key(None, RESULT, "hidden width; null for 4 × d_model", at_least=1)
    activation: str = key(
        "relu2",
        RESULT,
        "relu2 is the squared ReLU; swiglu and geglu are gated: FC1 has twice the width",
        allowed=("gelu", "gelu_tanh", "relu2", "swiglu", "geglu"),
    )


@dataclass
class PositionConfig:
    kind: str = key("rope", RESULT, "position encoding", allowed=("rope", "learned", "none"))
    rope_fraction: float = key(1.0, RESULT, "share of each head that RoPE rotates", above=0, at_most=1)
    rope_base: float = key(10000.0, RESULT, "base of RoPE's wavelengths", above=1)


@dataclass
class ModelConfig:
    n_layer: int = key(4, RESULT, "blocks", at_least=1)
    n_head: int = key(2, RESULT, "attention heads", at_least=1)
    d_model: int = key(64, RESULT, "width of the residual stream", at_least=1)
    vocab_size: int = key(256, RESULT, "rows of the embedding", at_least=2)
    norm: NormConfig = group(NormConfig)
    attn: AttentionConfig = group(AttentionConfig)
    mlp: MlpConfig = group(MlpConfig)
    position: PositionConfig = group(PositionConfig)
    layer_scale: float | None = key(None, RESULT, "start value of a learned scale on each branch; null for none")
    sigma_reparam: str = key(
        "none",
        RESULT,
        "W ← (γ/σ(W))·W in the blocks' linear layers, γ starting at 1 or at σ(W₀)",
        allowed=("none", "one", "sigma"),
    )
    bias: bool = key(False, RESULT, "biases of the linear layers of the blocks and of the norms")
    tied: bool = key(False, RESULT, "whether the head shares the embedding's weights")
    dropout: float = key(0.0, RESULT, "on embeddings, attention weights and branches", at_least=0, below=1)
    init: str = key(
        "fan_in",
        RESULT,
        "standard deviation of the first weights, scheme by scheme in stabrun/model/init.py",
        allowed=("fan_in", "trunc_fan_in", "gpt2", "xavier", "kaiming", "small", "zero_out", "zero"),
    )
    embedding: str = key(
        "plain",
        RESULT,
        "what becomes of a token's vector: nothing, × √d_model, or a norm",
        allowed=("plain", "scaled", "norm"),
    )
    residual: bool = key(True, RESULT, "whether a branch is added to what it came from, or takes its place")


@dataclass
class DataConfig:
    name: str = key("embedded", RESULT, "where the text comes from", allowed=("embedded", "local", "hub"))
    path: str | None = key(None, RESULT, "a file or folder (data=local), or a dataset of the hub (data=hub)")
    config: str | None = key(None, RESULT, "configuration of the hub's dataset; null for its own choice")
    split: str = key("train", RESULT, "split of the hub's dataset; all of it is cut into training and validation here")
    revision: str | None = key(None, RESULT, "commit, tag or branch of the hub's dataset; null for its newest")
    text_key: str = key("text", RESULT, "field of a JSON line, or column of a table, that holds the text")
    max_documents: int | None = key(None, RESULT, "documents taken; null for all", at_least=1)
    separator: str | None = key(None, RESULT, "text put after each document; null for none")
    seq_len: int = key(64, RESULT, "tokens of context", at_least=2)
    tokenizer: str = key(
        "bytes", RESULT, "bytes; bpe, trained on the training text; the path of a tokenizer.json; or a name on the hub"
    )
    tokenizer_revision: str | None = key(None, RESULT, "revision of the hub's tokenizer; null for its newest")
    bpe_size: int | None = key(None, RESULT, "vocabulary of the trained BPE; null for model.vocab_size", at_least=257)
    val_fraction: float = key(
        0.05, RESULT, "share of the text held out: one block in round(1/share)", at_least=0.001, at_most=0.5
    )
    workers: int = key(1, RESOURCE, "processes that tokenize", at_least=1, at_most=256)
    cache_dir: str = key("", RESOURCE, "where token shards are kept; empty for the user's cache folder")


@dataclass
class OptimConfig:
    lr: float = key(1e-2, RESULT, "peak learning rate", above=0)
    beta1: float = key(0.9, RESULT, "decay of Adam's first moment", at_least=0, below=1)
    beta2: float = key(0.95, RESULT, "decay of Adam's second moment", at_least=0, below=1)
    eps: float = key(1e-8, RESULT, "Adam's ε", above=0)
    weight_decay: float = key(0.1, RESULT, "λ, of matrices only", at_least=0)
    decay: str = key(
        "decoupled",
        RESULT,
        "decoupled: AdamW; l2: λ·w is added to the gradient, after clipping, and passes through Adam",
        allowed=("decoupled", "l2"),
    )
    decay_independent: bool = key(
        False, RESULT, "decoupled decay follows the schedule, but not the peak rate; weight_decay is 1e-4 or so then"
    )
    clip: float | None = key(1.0, RESULT, "limit of the gradient; null for none", above=0)
    clip_by: str = key("norm", RESULT, "what is limited: the global norm, or each value", allowed=("norm", "value"))
    z_loss: float = key(0.0, RESULT, "weight of (log Z)² in what is minimised; 1e-4 in PaLM", at_least=0)


@dataclass
class ScheduleConfig:
    kind: str = key(
        "cosine",
        RESULT,
        "shape after the warm-up; wsd is warm-up, stable, decay",
        allowed=("constant", "cosine", "linear", "inverse_sqrt", "wsd"),
    )
    warmup_steps: int = key(75, RESULT, "steps of linear warm-up", at_least=0)
    warmup_share: float | None = key(
        None, RESULT, "the warm-up as a share of train.steps; null for warmup_steps", at_least=0, at_most=1
    )
    decay_share: float = key(0.2, RESULT, "share of train.steps in which wsd falls, at the end", above=0, at_most=1)
    min_lr: float = key(0.0, RESULT, "what the shape falls to", at_least=0)


@dataclass
class TrainConfig:
    steps: int = key(500, RESULT, "updates", at_least=1)
    batch_size: int = key(16, RESULT, "sequences a step", at_least=1)
    micro_batch_size: int | None = key(None, RESOURCE, "sequences a forward pass; null for the whole batch", at_least=1)
    device: str = key("auto", RESOURCE, "where to train", allowed=("auto", "cpu", "cuda", "mps"))
    precision: str = key(
        "fp32",
        RESULT,
        "of matrix products: weights, moments and norms are fp32 in each; fp16 scales the loss",
        allowed=("fp32", "tf32", "bf16", "fp16"),
    )
    loss_scale: float = key(65536.0, RESULT, "fp16: the first scale of the loss", above=0, at_most=2.0**32)
    loss_scale_growth: int = key(2000, RESULT, "fp16: steps without overflow after which the scale doubles", at_least=1)
    stop_early: bool = key(False, RESULT, "whether a run ends once its divergence is certain; a search sets it")
    compile: bool | None = key(None, RESOURCE, "torch.compile; null for on with CUDA alone")
    threads: int | None = key(None, RESOURCE, "CPU threads; null for torch's choice", at_least=1, at_most=1024)
    deterministic: bool = key(False, RESOURCE, "bit-identical on CUDA too, at a cost in speed")
    checkpoint_every: int = key(200, RESOURCE, "steps between checkpoints; 0 for none", at_least=0)
    val_every: int = key(100, VIEW, "steps between validations; 0 for the last step alone", at_least=0)
    val_sequences: int = key(64, VIEW, "validation sequences, the same ones each time", at_least=1)


@dataclass
class ObserveConfig:
    every: int = key(1, VIEW, "steps between statistics; 0 turns observation off", at_least=0)
    slow_every: int = key(10, VIEW, "steps between the dear ones (attention, updates, moments); 0 for none", at_least=0)


@dataclass
class TrackerConfig:
    name: str = key("wandb", VIEW, "where records are shown as well", allowed=("wandb", "none"))
    project: str = key("stabrun", VIEW, "W&B project")
    entity: str | None = key(None, VIEW, "W&B entity; null for the account's own")
    group: str | None = key(None, VIEW, "W&B group; null for the variant, or the study's folder")
    run_name: str | None = key(None, VIEW, "W&B name of the run; null for variant, learning rate and seed")
    tags: list[str] = many(VIEW, "W&B tags")
    norms_every: int = key(10, VIEW, "steps between the per-layer values sent to W&B", at_least=1)


@dataclass
class StudyConfig:
    name: str = key("study", VIEW, "the study's name, which begins its folder's")
    strategy: str = key("grid", VIEW, "every learning rate, or a search for the frontier", allowed=("grid", "frontier"))
    variants: list[str] = many(VIEW, "names of variants; A+B for two together")
    lrs: list[float] = many(VIEW, "learning rates of a grid")
    lr_range: list[float] = many(VIEW, "lowest and highest learning rate of a search")
    seeds: int = key(3, VIEW, "seeds a learning rate, from `seed` on", at_least=1, at_most=10_000)
    width: float = key(0.25, VIEW, "a search ends where lr50 is known to ± so many octaves", above=0)
    max_runs: int = key(40, VIEW, "runs of a search, for each variant, at most", at_least=1)
    workers: int = key(1, RESOURCE, "processes that train", at_least=1, at_most=1024)


@dataclass
class Config:
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    optim: OptimConfig = group(OptimConfig)
    schedule: ScheduleConfig = group(ScheduleConfig)
    train: TrainConfig = group(TrainConfig)
    observe: ObserveConfig = group(ObserveConfig)
    tracker: TrackerConfig = group(TrackerConfig)
    study: StudyConfig = group(StudyConfig)
    seed: int = key(0, RESULT, "of the initial weights and of the order of the data", at_least=0, at_most=2**31 - 1)
    variant: str = key("baseline", VIEW, "the variant's name; chosen by +variant=NAME")
    check: str = key(
        "none", VIEW, "chosen by +check=init: `stabrun model` looks at one pass too", allowed=("none", "init")
    )
    run_dir: str | None = key(None, RESOURCE, "where the record goes; null for runs/<run_id>")
    study_dir: str | None = key(None, RESOURCE, "where a study goes; null for studies/<name>-<hash>")


@dataclass(frozen=True)
class Key:
    """One leaf of the schema: dotted `path`, its `mark`, `doc` and `bounds`."""

    path: str
    mark: str
    doc: str
    bounds: dict[str, Any]

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, as a sentence, or None."""
        rules = {
            "above": (lambda v, b: v > b, "above {}"),
            "below": (lambda v, b: v < b, "below {}"),
            "at_least": (lambda v, b: v >= b, "at least {}"),
            "at_most": (lambda v, b: v <= b, "at most {}"),
        }
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.path}={value}: it must be a finite number."
        if value is None:
            return None
        if "allowed" in self.bounds:
            allowed = self.bounds["allowed"]
            return None if value in allowed else f"{self.path}={value}: it must be one of {', '.join(allowed)}."
        if all(rules[name][0](value, bound) for name, bound in self.bounds.items()):
            return None
        wanted = " and ".join(rules[name][1].format(bound) for name, bound in self.bounds.items())
        return f"{self.path}={value}: it must be {wanted}."


def keys(schema: type = Config, prefix: str = "") -> Iterator[Key]:
    """Every leaf of the schema, in order."""
    for item in fields(schema):
        path = prefix + item.name
        factory = item.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from keys(factory, path + ".")
        else:
            yield Key(path, **item.metadata)


def value_of(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def marked(config: Config, mark: str) -> dict[str, Any]:
    """Dotted path → value of the keys with `mark`."""
    return {k.path: value_of(config, k.path) for k in keys() if k.mark == mark}


def run_id(config: Config) -> str:
    """Twelve hexadecimal digits that name an experiment: a hash of its result keys."""
    text = json.dumps(marked(config, RESULT), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_dir(config: Config) -> Path:
    return Path(config.run_dir) if config.run_dir else Path("runs") / run_id(config)


def check(config: Config) -> None:
    """Raise UserError at the first key out of bounds, or keys that do not fit each other."""
    for k in keys():
        if problem := k.problem(value_of(config, k.path)):
            raise UserError(problem)
    for wrong, sentence in _misfits(config):
        if wrong:
            raise UserError(sentence)


def read_config(file: Path) -> Config:
    """A recorded `config.yaml`, checked against the schema. UserError where it is none, or not whole."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    nothing = object()
    try:
        recorded = OmegaConf.load(file)
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), recorded))
        lost = [path for path in marked(config, RESULT) if OmegaConf.select(recorded, path, default=nothing) is nothing]
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: it is no configuration of a run.") from error
    if lost:
        raise UserError(f"{file}: it is not whole, for {lost[0]} is missing.")
    check(config)
    return config


def config_yaml(config: Config) -> str:
    """The text of `config.yaml`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_of(values: dict[str, Any]) -> Config:
    """A configuration from its own plain data, as `dataclasses.asdict` gives it. TypeError where keys do not fit."""

    def built(schema: Any, node: dict[str, Any]) -> Any:
        kinds: dict[str, Any] = {item.name: item.default_factory for item in fields(schema)}
        return schema(**{name: built(kinds[name], v) if is_dataclass(kinds[name]) else v for name, v in node.items()})

    config: Config = built(Config, values)
    return config


def _misfits(config: Config) -> Iterator[tuple[bool, str]]:
    model, data, train = config.model, config.data, config.train
    yield (
        model.d_model % model.n_head != 0,
        f"model.n_head={model.n_head}: it must divide model.d_model={model.d_model}.",
    )
    yield (
        model.position.kind == "rope" and rotated(model) < 2,
        f"model.position.rope_fraction={model.position.rope_fraction}: of a head of "
        f"{model.d_model // model.n_head} channels it rotates less than one pair.",
    )
    yield (
        model.embedding == "norm" and model.norm.kind == "none",
        "model.embedding=norm: model.norm.kind=none was given, so that there is no norm to take.",
    )
    yield (
        model.sigma_reparam != "none" and model.init in ("zero", "zero_out"),
        f"model.init={model.init}: model.sigma_reparam={model.sigma_reparam} divides by the spectral norm, here 0.",
    )
    micro = train.micro_batch_size or train.batch_size
    yield (
        train.batch_size % micro != 0,
        f"train.micro_batch_size={micro}: it must divide train.batch_size={train.batch_size}.",
    )
    yield (
        config.schedule.min_lr > config.optim.lr,
        f"schedule.min_lr={config.schedule.min_lr}: it must be at most optim.lr={config.optim.lr}.",
    )
    optim = config.optim
    yield (
        optim.decay == "l2" and optim.decay_independent,
        "optim.decay_independent=true: it belongs to optim.decay=decoupled, and optim.decay=l2 was given.",
    )
    decay = optim.weight_decay * (1 if optim.decay_independent else optim.lr)
    yield (
        optim.decay == "decoupled" and decay >= 1,
        f"optim.weight_decay={optim.weight_decay}: "
        + ("" if optim.decay_independent else f"times optim.lr={optim.lr} it is {decay:g}, and ")
        + "it would erase the weights at each step; it must be below 1.",
    )
    yield (
        data.name == "local" and not data.path,
        "data.path=null: data=local needs data.path, a file of text, JSON lines or Parquet, or a folder of them.",
    )
    yield (
        data.name == "hub" and not data.path,
        "data.path=null: data=hub needs data.path, the name of a dataset such as org/name.",
    )
    foreign = [k for k in ("config", "revision") if getattr(data, k) is not None] + ["split"] * (data.split != "train")
    yield (
        data.name != "hub" and bool(foreign),
        f"data.{''.join(foreign[:1])}: data={data.name} has none; only data=hub does.",
    )
    yield (
        data.separator == "",
        "data.separator='': it must hold at least one character; null is none.",
    )
    yield (
        data.name == "embedded" and data.path is not None,
        f"data.path={data.path}: data=embedded ships its own text; say data=local as well.",
    )


def rotated(model: ModelConfig) -> int:
    """Channels of each head that RoPE rotates: an even number, 0 for other position encodings."""
    if model.position.kind != "rope":
        return 0
    return 2 * int(model.d_model // model.n_head * model.position.rope_fraction / 2)
