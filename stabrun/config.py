"""The schema of everything in `conf/`: types, bounds and the mark of each key.

Each key is marked **result** (it changes the numbers), **resource** (where and how fast a run trains) or **view** (what
is shown). `run_id` is a hash of the result keys only, so the same experiment is the same run on any machine.
"""

import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

RESULT, RESOURCE, VIEW = "result", "resource", "view"

GPUS = (  # with a row in stabrun/model/gpus.py
    "b200", "h200", "h200-nvl", "h100", "h100-nvl", "h100-pcie", "a100", "a100-40", "l40s", "l4", "a40", "a10", "v100",
    "v100-32", "t4", "rtx4090", "rtx3090", "mi300x",
)  # fmt: skip


def conf_dir() -> Path:
    """The directory of configuration files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return next(d for d in (package / "conf", package.parent / "conf") if (d / "config.yaml").is_file())


def groups() -> list[str]:
    """The config groups: the directories of `conf/`."""
    return sorted(item.name for item in conf_dir().iterdir() if item.is_dir())


def added_groups() -> list[str]:
    """The config groups without a default, chosen by `+GROUP=NAME`."""
    defaults = re.findall(r"^  - (\w+):", (conf_dir() / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    return [name for name in groups() if name not in defaults]


def choices(group: str, config_dir: Path | None = None) -> dict[str, str]:
    """Name → first comment line of each file of a config group, those of a user's directory included, by name.

    A name is the path below the group's directory. Hidden files, which editors leave behind, are not among them.
    """
    found = dict[str, Path]()
    for directory in (parent / group for parent in (conf_dir(), config_dir) if parent is not None):
        names = {file.relative_to(directory).with_suffix("").as_posix(): file for file in directory.rglob("*.yaml")}
        found |= {name: file for name, file in names.items() if file.is_file() and not re.search(r"(^|/)\.", name)}
    return {name: _first_comment(found[name]) for name in sorted(found)}


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    comments = (line[1:].strip() for line in lines if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@")), "")


class UserError(Exception):
    """An error in a command or configuration. Its text is one or two sentences for the user; exit status 2."""


IN_EVERY_RECORD = "in every record"
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def key(default: Any, mark: str, doc: str, *, absent: Any = IN_EVERY_RECORD, **bounds: Any) -> Any:
    """A config field. `bounds`: `above`, `at_least`, `at_most`, `below` (numbers), `allowed` (a tuple) or `named`.

    `named`: the value is a part of a file name, at most so many bytes of it.

    A result key added after version 0.1.0 must give `absent`: the value that records without the key were made with.
    It keeps `run_id` and the directory of a study unchanged while the key has that value.
    """
    how = {"default_factory": list} if isinstance(default, list) else {"default": default}
    return field(**how, metadata={"mark": mark, "doc": doc, "absent": absent, "bounds": bounds})


def group(cls: type) -> Any:
    return field(default_factory=cls)


@dataclass
class NormConfig:
    kind: str = key(
        "layernorm", RESULT, "kind of every norm in the model; those on 1p store their gain minus one",
        allowed=("layernorm", "rmsnorm", "layernorm1p", "rmsnorm1p", "dyt", "batchnorm", "none"),
    )  # fmt: skip
    eps: float = key(1e-5, RESULT, "added to the variance", above=0)
    affine: bool = key(True, RESULT, "whether norms learn a gain (and a bias if model.norm.bias is set)")
    bias: bool | None = key(None, RESULT, "whether norms with a gain have a bias; null: as model.bias", absent=None)
    alpha: float = key(0.5, RESULT, "dyt: initial value of α in tanh(α·x)", absent=0.5, above=0)
    depth_scaled: bool = key(
        False, RESULT, "whether the pre-norms of block l, counted from 1, are multiplied by 1/√l", absent=False
    )
    doubled: bool = key(False, RESULT, "whether each pre-norm is applied twice: a control", absent=False)


@dataclass
class AttentionConfig:
    pre_norm: bool = key(True, RESULT, "norm before QKV")
    out_norm: bool = key(False, RESULT, "norm of Proj's output, before the residual add")
    post_norm: bool = key(False, RESULT, "norm after the residual add")
    qk_norm: str = key(
        "none", RESULT, "norm of Q and K: per head, or over the full width", allowed=("none", "head", "full")
    )
    v_norm: str = key("none", RESULT, "norm of V: per head, or over the full width", allowed=("none", "head", "full"))
    norm_after_position: bool = key(False, RESULT, "whether Q/K norms are applied after the position encoding")
    soft_temp: float = key(1.0, RESULT, "β in softmax(β·logit)", above=0)
    soft_cap: float | None = key(None, RESULT, "c in c·tanh(logit/c); null for none", above=0)
    clip_low: float = key(0.0, RESULT, "γ in clip((ζ−γ)·softmax+γ, 0, 1)", at_most=0)
    clip_high: float = key(1.0, RESULT, "ζ in clip((ζ−γ)·softmax+γ, 0, 1)", at_least=1)
    gate: bool = key(
        False, RESULT, "whether the input of Proj is multiplied by a sigmoid that is linear in the input of QKV",
        absent=False,
    )  # fmt: skip


@dataclass
class MlpConfig:
    pre_norm: bool = key(True, RESULT, "norm before FC1")
    out_norm: bool = key(False, RESULT, "norm of FC2's output, before the residual add")
    post_norm: bool = key(False, RESULT, "norm after the residual add")
    width: int | None = key(None, RESULT, "hidden width; null for ratio × model.d_model, rounded", at_least=1)
    ratio: float = key(4.0, RESULT, "hidden width as a multiple of model.d_model", absent=4.0, above=0)
    activation: str = key(
        "relu2", RESULT, "relu2 is the squared ReLU; swiglu, geglu and geglu_tanh are gated: FC1 has twice the width",
        allowed=("gelu", "gelu_tanh", "relu2", "swiglu", "geglu", "geglu_tanh"),
    )  # fmt: skip


@dataclass
class PositionConfig:
    kind: str = key("rope", RESULT, "position encoding", allowed=("rope", "learned", "none"))
    rope_fraction: float = key(1.0, RESULT, "share of each head's channels that RoPE rotates", above=0, at_most=1)
    rope_base: float = key(10000.0, RESULT, "base of RoPE's wavelengths", above=1)


@dataclass
class ModelConfig:
    n_layer: int = key(4, RESULT, "number of blocks", at_least=1, at_most=10_000)
    n_head: int = key(2, RESULT, "number of attention heads", at_least=1)
    d_model: int = key(64, RESULT, "width of the residual stream", at_least=1)
    vocab_size: int = key(256, RESULT, "vocabulary size", at_least=2)
    norm: NormConfig = group(NormConfig)
    attn: AttentionConfig = group(AttentionConfig)
    mlp: MlpConfig = group(MlpConfig)
    position: PositionConfig = group(PositionConfig)
    layer_scale: float | None = key(None, RESULT, "initial value of a learned scale on each branch; null for none")
    sigma_reparam: str = key(
        "none", RESULT, "W ← (γ/σ(W))·W in the linear layers of the blocks, γ initialized to 1 or to σ(W₀)",
        allowed=("none", "one", "sigma"),
    )  # fmt: skip
    bias: bool = key(False, RESULT, "whether the norms and the linear layers of the blocks have biases")
    tied: bool = key(False, RESULT, "whether the output layer shares the weights of the embedding")
    dropout: float = key(0.0, RESULT, "dropout on embeddings, attention weights and branches", at_least=0, below=1)
    init: str = key(
        "fan_in", RESULT, "initialization scheme; see stabrun/model/init.py",
        allowed=("fan_in", "trunc_fan_in", "gpt2", "xavier", "kaiming", "small", "zero_out", "zero"),
    )  # fmt: skip
    embedding: str = key(
        "plain", RESULT, "token embeddings: unchanged, multiplied by √d_model, or normalized",
        allowed=("plain", "scaled", "norm"),
    )  # fmt: skip
    residual: bool = key(True, RESULT, "whether blocks have residual connections")
    post_ln_share: float = key(
        0.0, RESULT, "share of the blocks, the first ones, with norms after the residual adds, not before the branches",
        absent=0.0, at_least=0, at_most=1,
    )  # fmt: skip
    final_norm: bool = key(True, RESULT, "norm before the output layer", absent=True)
    final_cap: float | None = key(
        None, RESULT, "c in c·tanh(logit/c) of the output layer; null for none", absent=None, above=0
    )


@dataclass
class DataConfig:
    name: str = key("embedded", RESULT, "source of the text", allowed=("embedded", "local", "hub"))
    path: str | None = key(None, RESULT, "a file or directory (data=local), or a dataset on the Hub (data=hub)")
    config: str | None = key(None, RESULT, "configuration of the Hub dataset; null for its default")
    split: str = key("train", RESULT, "split of the Hub dataset, from which training and validation data are taken")
    revision: str | None = key(None, RESULT, "commit, tag or branch of the Hub dataset; null for the latest")
    text_key: str = key("text", RESULT, "field of a JSON line, or Parquet column, with the text")
    max_documents: int | None = key(None, RESULT, "maximum number of documents; null for all", at_least=1)
    separator: str | None = key(None, RESULT, "text inserted after each document; null for none")
    seq_len: int = key(64, RESULT, "context length in tokens", at_least=2, at_most=2**31 - 1)
    tokenizer: str = key(
        "bytes", RESULT, "bytes; bpe (trained on the training text); path of a tokenizer.json; or a name on the Hub"
    )
    tokenizer_revision: str | None = key(None, RESULT, "revision of the Hub tokenizer; null for the latest")
    bpe_size: int | None = key(
        None, RESULT, "vocabulary size of the trained BPE; null for model.vocab_size", at_least=257
    )
    val_fraction: float = key(
        0.05, RESULT, "share of the text for validation: one block in round(1/share)", at_least=0.001, at_most=0.5
    )
    workers: int = key(1, RESOURCE, "number of tokenizing processes", at_least=1, at_most=256)
    cache_dir: str = key("", RESOURCE, "directory of prepared data; empty for the user's cache directory")


@dataclass
class OptimConfig:
    kind: str = key(
        "adam", RESULT,
        "muon: Muon for the matrices inside the blocks, AdamW for the rest; stable_adamw: AdamW with a lower "
        "rate for tensors with unusual gradients",
        absent="adam", allowed=("adam", "muon", "stable_adamw"),
    )  # fmt: skip
    lr: float = key(1e-2, RESULT, "peak learning rate", above=0)
    beta1: float = key(0.9, RESULT, "decay of Adam's first moment", at_least=0, below=1)
    beta2: float = key(0.95, RESULT, "decay of Adam's second moment", at_least=0, below=1)
    eps: float = key(1e-8, RESULT, "Adam's ε", above=0)
    weight_decay: float = key(0.1, RESULT, "weight decay λ, applied to matrices only", at_least=0)
    decay: str = key(
        "decoupled", RESULT, "decoupled: AdamW; l2: λ·w is added to the gradient after clipping, before Adam",
        allowed=("decoupled", "l2"),
    )  # fmt: skip
    decay_independent: bool = key(
        False, RESULT,
        "decoupled decay that follows the schedule but not the peak learning rate; typical weight_decay: 1e-4",
    )  # fmt: skip
    clip: float | None = key(1.0, RESULT, "gradient clipping threshold; null for none", above=0)
    clip_by: str = key(
        "norm", RESULT,
        "clip by global norm, or each value; adagc, zclip: also by the recent norms of each tensor, or of all",
        allowed=("norm", "value", "adagc", "zclip"),
    )  # fmt: skip
    qk_clip: float | None = key(
        None, RESULT, "largest attention logit: after an update the Q and K weights of heads above are scaled down",
        absent=None, above=0,
    )  # fmt: skip
    z_loss: float = key(0.0, RESULT, "coefficient of the z-loss (log Z)²; 1e-4 in PaLM", at_least=0)


@dataclass
class ScheduleConfig:
    kind: str = key(
        "cosine", RESULT, "shape after warmup; wsd: warmup, stable, decay; ramp: rises from min_lr to optim.lr",
        allowed=("constant", "cosine", "linear", "inverse_sqrt", "wsd", "ramp"),
    )  # fmt: skip
    warmup_steps: int = key(75, RESULT, "steps of linear warmup", at_least=0)
    warmup_share: float | None = key(
        None, RESULT, "warmup as a share of train.steps; null: use warmup_steps", at_least=0, at_most=1
    )
    decay_share: float = key(0.2, RESULT, "share of train.steps, at the end, in which wsd decays", above=0, at_most=1)
    min_lr: float = key(0.0, RESULT, "final learning rate of a decaying schedule, first one of a ramp", at_least=0)


@dataclass
class TrainConfig:
    steps: int = key(500, RESULT, "number of optimizer updates", at_least=1)
    batch_size: int = key(16, RESULT, "sequences per step", at_least=1, at_most=2**31 - 1)
    micro_batch_size: int | None = key(
        None, RESOURCE, "sequences per forward pass; null for the whole batch, or a rank's share of it", at_least=1
    )
    ranks: int = key(
        1, RESOURCE, "processes that share each batch, on one GPU each if there are any", at_least=1, at_most=4096
    )
    device: str = key(
        "auto",
        RESOURCE,
        "device to train on; auto is cuda if there is one, else cpu",
        allowed=("auto", "cpu", "cuda", "mps"),
    )
    precision: str = key(
        "fp32",
        RESULT,
        "precision of matrix products; weights, moments and norms are always fp32; fp16 uses loss scaling",
        allowed=("fp32", "tf32", "bf16", "fp16"),
    )
    loss_scale: float = key(65536.0, RESULT, "fp16: initial loss scale", above=0, at_most=2.0**32)
    loss_scale_growth: int = key(
        2000, RESULT, "fp16: steps without overflow after which the loss scale doubles", at_least=1
    )
    recovery: str = key(
        "none", RESULT,
        "skip: leave out updates whose loss or gradient is an outlier; rewind: when the run diverges or its loss has a "
        "spike, go back to an earlier state, and on with other batches",
        absent="none", allowed=("none", "skip", "rewind"),
    )  # fmt: skip
    recovery_limit: int = key(
        5, RESULT, "skip: outliers in a row that are left out; rewind: number of times that a run goes back",
        absent=5, at_least=1,
    )  # fmt: skip
    recovery_every: int = key(
        100, RESULT, "rewind: interval in steps between the states that a run can go back to", absent=100, at_least=1
    )
    recovery_lr: float = key(
        1.0, RESULT, "rewind: factor of the learning rate after each time", absent=1.0, above=0, at_most=1
    )
    outlier_loss: float = key(
        6.0, RESULT, "loss of an outlier or a spike: above the recent median, in robust standard deviations",
        absent=6.0, above=0,
    )  # fmt: skip
    outlier_grad: float = key(
        10.0, RESULT, "gradient norm of an outlier, as a multiple of the recent median", absent=10.0, above=1
    )
    stop_early: bool = key(False, RESULT, "end a run once its divergence is certain; always true in a search")
    compile: bool | None = key(None, RESOURCE, "torch.compile; null: only on CUDA")
    recompute: str = key(
        "none", RESOURCE, "activations computed again in the backward pass instead of kept: less memory, more time",
        allowed=("none", "blocks"),
    )  # fmt: skip
    threads: int | None = key(None, RESOURCE, "CPU threads; null for torch's default", at_least=1, at_most=1024)
    deterministic: bool = key(False, RESOURCE, "bit-identical results on CUDA too, at lower speed")
    checkpoint_every: int = key(200, RESOURCE, "interval between checkpoints in steps; 0 for none", at_least=0)
    checkpoint_minutes: float = key(
        0.0, RESOURCE, "interval between checkpoints in minutes, beside that in steps; 0 for none", at_least=0
    )
    extends: str | None = key(
        None, RESOURCE, "directory of a run with fewer steps, and otherwise the same, from whose checkpoint to begin"
    )
    keep_checkpoints: int = key(2, RESOURCE, "checkpoints that are kept, the newest ones", at_least=1)
    val_every: int = key(100, VIEW, "interval between validations in steps; 0: only after the last step", at_least=0)
    val_sequences: int = key(64, VIEW, "number of validation sequences, always the same", at_least=1)


@dataclass
class ObserveConfig:
    every: int = key(1, VIEW, "interval between statistics in steps; 0 turns observation off", at_least=0)
    slow_every: int = key(
        10, VIEW, "interval between expensive statistics (attention, updates, moments) in steps; 0 for none", at_least=0
    )


@dataclass
class TrackerConfig:
    name: str = key("wandb", VIEW, "experiment tracker", allowed=("wandb", "none"))
    project: str = key("stabrun", VIEW, "W&B project")
    entity: str | None = key(None, VIEW, "W&B entity; null for the account's default")
    group: str | None = key(None, VIEW, "W&B group; null for the variant, or the name of the study directory")
    run_name: str | None = key(None, VIEW, "W&B name of the run; null for variant, learning rate and seed")
    tags: list[str] = key([], VIEW, "W&B tags")
    norms_every: int = key(10, VIEW, "interval between per-layer values sent to W&B, in steps", at_least=1)


@dataclass
class StudyConfig:
    name: str = key("study", VIEW, "name of the study, and prefix of its directory", named=100)
    strategy: str = key(
        "grid", VIEW, "grid: every learning rate; frontier: adaptive search for lr50", allowed=("grid", "frontier")
    )
    variants: list[str] = key([], VIEW, "variants; A+B combines two, and settings may follow: 'A model.n_layer=2'")
    lrs: list[float] = key([], VIEW, "learning rates of a grid")
    lr_range: list[float] = key([], VIEW, "lowest and highest learning rate of a search")
    seeds: int = key(3, VIEW, "seeds per learning rate, starting at `seed`", at_least=1, at_most=10_000)
    width: float = key(0.25, VIEW, "a search ends when lr50 is known to ± this many octaves", above=0)
    max_runs: int = key(40, VIEW, "maximum runs per arm in a search", at_least=1)
    workers: int = key(1, RESOURCE, "number of training processes", at_least=1, at_most=1024)
    gpu: str | None = key(
        None, VIEW, "GPU for which --dry-run computes times; null for the one of this machine", allowed=GPUS
    )
    mfu: float | None = key(
        None, VIEW, "model FLOPs utilization that --dry-run assumes on a GPU; null for 0.35", above=0, at_most=1
    )


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
    seed: int = key(
        0, RESULT, "seed of the initial weights and of the order of the data", at_least=0, at_most=2**31 - 1
    )
    variant: str = key("baseline", VIEW, "name of the variant; set by +variant=NAME")
    check: str = key(
        "none", VIEW, "set by +check=init: `stabrun model` also checks one pass at initialization",
        allowed=("none", "init"),
    )  # fmt: skip
    run_dir: str | None = key(None, RESOURCE, "run directory; null for runs/<run_id>")
    study_dir: str | None = key(None, RESOURCE, "study directory; null for studies/<name>-<hash>")


@dataclass(frozen=True)
class Key:
    """One leaf of the schema: dotted `path`, `type`, `mark`, `doc`, value of a record without it, and `bounds`."""

    path: str
    type: Any
    mark: str
    doc: str
    absent: Any
    bounds: dict[str, Any]

    def values(self) -> list[str]:
        """The values of an enumeration or a boolean; otherwise empty."""
        allowed = self.bounds.get("allowed") or (("true", "false") if "bool" in str(self.type) else ())
        return [*allowed, *["null"] * (bool(allowed) and "None" in str(self.type))]

    def problem(self, value: Any) -> str | None:
        """The error message for `value`, or None if it is valid."""
        rules = {
            "above": (lambda v, b: v > b, "above {}"),
            "below": (lambda v, b: v < b, "below {}"),
            "at_least": (lambda v, b: v >= b, "at least {}"),
            "at_most": (lambda v, b: v <= b, "at most {}"),
            "named": (is_name, "at most {} bytes, for a directory's name: no / and no control characters"),
        }
        if not is_of(value, self.type):
            return f"{self.path}={value}: must be {kind_text(self.type)}."
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                return f"{self.path}={value}: must be a finite number."
        if value is None:
            return None
        if "allowed" in self.bounds:
            allowed = self.bounds["allowed"]
            return None if value in allowed else f"{self.path}={value}: must be one of {', '.join(allowed)}."
        if all(rules[name][0](value, bound) for name, bound in self.bounds.items()):
            return None
        wanted = " and ".join(rules[name][1].format(bound) for name, bound in self.bounds.items())
        return f"{self.path}={value}: must be {wanted}."


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value has the type of a key: a union, a list, or one of KINDS. Whole numbers are numbers, too."""
    if isinstance(kind, types.UnionType):
        return any(is_of(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(is_of(item, *typing.get_args(kind)) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def is_name(text: str, size: int) -> bool:
    """Whether a text can begin the name of a directory, in so many bytes."""
    return text.isprintable() and bool(text) and "/" not in text and len(text.encode()) <= size


def kind_text(kind: Any) -> str:
    """`a number or null`, `a list of text`."""
    if isinstance(kind, types.UnionType):
        return " or ".join(kind_text(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list, each item {kind_text(*typing.get_args(kind))}"
    return KINDS[kind]


@cache
def keys(schema: type = Config) -> tuple[Key, ...]:
    """Every leaf of the schema, in order."""
    return tuple(_leaves(schema, ""))


def _leaves(schema: type, prefix: str) -> Iterator[Key]:
    for item in fields(schema):
        path = prefix + item.name
        factory = item.default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            yield from _leaves(factory, path + ".")
        else:
            yield Key(path, item.type, **item.metadata)


def value_of(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def marked(config: Config, mark: str) -> dict[str, Any]:
    """Dotted path → value of the keys with `mark`."""
    return {k.path: value_of(config, k.path) for k in keys() if k.mark == mark}


def hashed(config: Config) -> dict[str, Any]:
    """What identifies an experiment: its result keys, later ones only if they differ from `absent`."""
    values = marked(config, RESULT)
    later = {k.path: k.absent for k in keys() if k.absent is not IN_EVERY_RECORD}
    return {path: value for path, value in values.items() if path not in later or value != later[path]}


def run_id(config: Config) -> str:
    """Twelve hexadecimal digits that name an experiment: a hash of its result keys."""
    text = json.dumps(hashed(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_dir(config: Config) -> Path:
    return Path(config.run_dir) if config.run_dir else Path("runs") / run_id(config)


def check(config: Config) -> None:
    """Raise UserError if a key is out of bounds, or keys contradict each other."""
    for k in keys():
        if problem := k.problem(value_of(config, k.path)):
            raise UserError(problem)
    for wrong, sentence in _misfits(config):
        if wrong:
            raise UserError(sentence)


def read_config(file: Path, to_train: bool = False) -> Config:
    """A recorded `config.yaml`, of this version or another.

    Raises UserError if it is damaged or, `to_train`, if a newer version wrote it: training would not be the same then.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        recorded: Any = OmegaConf.to_container(OmegaConf.load(file))
        values = as_known(recorded, file, to_train)
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: not the configuration of a run.") from error
    if to_train:
        check(config)
    return config


def as_known(values: Any, file: Path, to_train: bool, schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Recorded values with the keys of this version: later ones are added, unknown ones dropped.

    Raises UserError if a result key is missing that every record has or, `to_train`, if a key is unknown.
    """
    known: dict[str, Any] = {}
    for item in fields(schema):
        path, absent = prefix + item.name, item.metadata.get("absent")
        if not item.metadata:
            group: Any = item.default_factory
            known[item.name] = as_known(values.pop(item.name, {}), file, to_train, group, path + ".")
        elif item.name in values:
            known[item.name] = values.pop(item.name)
        elif absent is not IN_EVERY_RECORD:
            known[item.name] = absent
        elif item.metadata["mark"] == RESULT:
            raise UserError(f"{file} is damaged: {path} is missing.")
    if values and to_train:
        raise UserError(
            f"{file}: {prefix}{next(iter(values))} is a key of a newer version of stabrun; use that version."
        )
    return known


def config_yaml(config: Config) -> str:
    """The text of `config.yaml`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_of(values: dict[str, Any], schema: type = Config) -> Any:
    """A configuration from the values of `as_known`, their types unchecked."""
    groups: dict[str, Any] = {item.name: item.default_factory for item in fields(schema) if not item.metadata}
    return schema(**{name: config_of(v, groups[name]) if name in groups else v for name, v in values.items()})


def differences(*pairs: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """Which values differ, as `optim.lr=0.01 (now 0.1)`, three at most; empty if none does."""
    differing = [
        f"{key}={before[key]} (now {now[key]})"
        for before, now in pairs
        for key in now
        if key in before and before[key] != now[key]
    ]
    differing = list(dict.fromkeys(differing))
    return ", ".join(differing[:3]) + f" and {len(differing) - 3} more" * (len(differing) > 3)


def _misfits(config: Config) -> Iterator[tuple[bool, str]]:
    model, data, train = config.model, config.data, config.train
    # fmt: off
    yield (model.d_model % model.n_head != 0,
           f"model.n_head={model.n_head}: must divide model.d_model={model.d_model}.")
    yield (model.position.kind == "rope" and rotated(model) < 2,
           f"model.position.rope_fraction={model.position.rope_fraction}: must rotate at least one pair "
           f"of the {model.d_model // model.n_head} channels of a head.")
    yield (model.embedding == "norm" and model.norm.kind == "none",
           "model.embedding=norm: not possible with model.norm.kind=none.")
    yield (model.norm.kind == "batchnorm" and train.ranks > 1,
           f"train.ranks={train.ranks}: must be 1 with model.norm.kind=batchnorm, whose statistics are of a whole "
           "batch.")
    yield (model.norm.kind == "batchnorm" and micro_batch(config) * train.ranks < train.batch_size,
           f"train.micro_batch_size={train.micro_batch_size}: must be null with model.norm.kind=batchnorm, whose "
           "statistics are of a whole batch.")
    yield (model.sigma_reparam != "none" and model.init in ("zero", "zero_out"),
           f"model.init={model.init}: model.sigma_reparam={model.sigma_reparam} divides by the spectral norm, "
           "which is 0.")
    yield (train.batch_size % train.ranks != 0,
           f"train.ranks={train.ranks}: must divide train.batch_size={train.batch_size}.")
    share, micro = train.batch_size // train.ranks, micro_batch(config)
    yield (share % micro != 0,
           f"train.micro_batch_size={micro}: must divide "
           + (f"train.batch_size={share}." if train.ranks == 1 else
              f"train.batch_size/train.ranks={train.batch_size}/{train.ranks}={share}."))
    yield (config.schedule.min_lr > config.optim.lr,
           f"schedule.min_lr={config.schedule.min_lr}: must be at most optim.lr={config.optim.lr}.")
    yield (config.schedule.kind == "ramp" and config.schedule.min_lr == 0,
           "schedule.min_lr=0: a ramp rises from it by the same factor each step, so it must be above 0, such as 1e-4.")
    optim = config.optim
    yield (optim.decay == "l2" and optim.decay_independent,
           "optim.decay_independent=true: requires optim.decay=decoupled, not l2.")
    yield (optim.decay == "l2" and optim.kind != "adam",
           f"optim.decay=l2: requires optim.kind=adam, not {optim.kind}.")
    for name, value in (("attn.qk_norm", model.attn.qk_norm), ("sigma_reparam", model.sigma_reparam)):
        yield (optim.qk_clip is not None and value != "none",
               f"optim.qk_clip={optim.qk_clip}: not possible with model.{name}={value}, which undoes a scaling of the "
               "weights of Q and K.")
    decay = optim.weight_decay * (1 if optim.decay_independent else optim.lr)
    yield (optim.decay == "decoupled" and decay >= 1,
           f"optim.weight_decay={optim.weight_decay}: "
           + ("" if optim.decay_independent else f"its product with optim.lr={optim.lr}, {decay:g}, ")
           + "must be below 1, or each step would erase the weights.")
    yield (data.name == "local" and not data.path,
           "data.path=null: data=local requires data.path, a text, JSON lines or Parquet file, or a directory of them.")
    yield (data.name == "hub" and not data.path,
           "data.path=null: data=hub requires data.path, the name of a dataset such as org/name.")
    foreign = [k for k in ("config", "revision") if getattr(data, k) is not None] + ["split"] * (data.split != "train")
    yield (data.name != "hub" and bool(foreign),
           f"data.{''.join(foreign[:1])}: only used with data=hub, not with data={data.name}.")
    yield (data.separator == "",
           "data.separator='': must have at least one character; use null for no separator.")
    yield (data.name == "embedded" and data.path is not None,
           f"data.path={data.path}: data=embedded has its own text; add data=local.")
    # fmt: on


def micro_batch(config: Config) -> int:
    """Sequences of a forward pass: those of a micro-batch, or of a rank's share of the batch."""
    return config.train.micro_batch_size or config.train.batch_size // config.train.ranks


def rotated(model: ModelConfig) -> int:
    """Channels of each head that RoPE rotates: an even number, 0 for other position encodings."""
    if model.position.kind != "rope":
        return 0
    return 2 * int(model.d_model // model.n_head * model.position.rope_fraction / 2)
