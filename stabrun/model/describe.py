"""What `stabrun model` reports: parameters, FLOPs, memory and switches. No torch is imported."""

from typing import Any

from stabrun.config import Config, ModelConfig, keys, micro_batch, rotated, value_of
from stabrun.model.counts import flops_per_token, parameters
from stabrun.model.memory import device_type, memory
from stabrun.model.switches import leak
from stabrun.text import human


def switches(model: ModelConfig) -> dict[str, Any]:
    """The model's switches that differ from their defaults: key → value."""
    defaults, given = Config(), Config(model=model)
    sizes = ("model.n_layer", "model.n_head", "model.d_model", "model.vocab_size")
    paths = [k.path for k in keys() if k.path.startswith("model.") and k.path not in sizes]
    return {p: value_of(given, p) for p in paths if value_of(given, p) != value_of(defaults, p)}


def describe(config: Config) -> dict[str, Any]:
    """Everything that `stabrun model` reports, as plain data."""
    model = config.model
    return {
        "variant": config.variant,
        "shape": {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "d_model": model.d_model,
            "head_dim": model.d_model // model.n_head,
            "rotated": rotated(model),
            "vocab_size": model.vocab_size,
            "seq_len": config.data.seq_len,
        },
        "parameters": parameters(model, config.data.seq_len),
        "flops_per_token": flops_per_token(model, config.data.seq_len),
        "memory": memory(config),
        "switches": switches(model),
    }


def report(facts: dict[str, Any], config: Config) -> str:
    """The description as text."""
    shape, count, bytes_ = facts["shape"], facts["parameters"], facts["memory"]
    sequences = micro_batch(config)
    lines = [
        f"{facts['variant']}: {count['total'] / 1e6:,.2f}M parameters, {shape['n_layer']} layers × "
        f"{shape['d_model']}, {shape['n_head']} heads of {shape['head_dim']}, context {shape['seq_len']}",
        "",
        "parameters",
        *(f"  {name:<18}{value:>15,}" for name, value in count.items() if value),
        "",
        f"FLOPs per token (training)  {facts['flops_per_token']:,}",
        "",
        f"memory of a step of {sequences} sequences in {config.train.precision} on {device_type(config)}: an estimate; "
        "the parts do not all exist at the same time",
        *(f"  {name.removesuffix('_bytes'):<18}{human(value):>15}" for name, value in bytes_.items()),
        "",
        "switches",
        *(f"  {path} = {value}" for path, value in facts["switches"].items()),
    ]
    if not facts["switches"]:
        lines.append("  none: all at their defaults")
    if sentence := leak(config.model):
        lines += ["", sentence]
    return "\n".join(lines)
