"""What the output of a site feeds, by the names that the layers of common models have."""

from collections.abc import Collection, Iterable
from itertools import takewhile

from stabrun.record.metrics import BY_LAYER, METRICS, find

QKV, PROJ, FC1, FC2, HEAD = "qkv", "proj", "fc1", "fc2", "head"
NAMES = {
    QKV: (
        "qkv", "c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "Wqkv", "query_key_value", "in_proj", "query", "key",
        "value", "q", "k", "v", "wq", "wk", "wv", "q_lin", "k_lin", "v_lin", "to_q", "to_k", "to_v", "to_qkv", "q_attn",
        "query_proj", "key_proj", "value_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    ),
    PROJ: (
        "proj", "attn.c_proj", "o_proj", "out_proj", "attn.proj", "attention.output.dense", "attention.dense",
        "self_attention.dense", "dense", "o", "Wo", "attn.Wo", "attention.wo", "out_lin", "to_out", "to_out.0",
        "crossattention.c_proj",
    ),
    FC1: (
        "fc1", "c_fc", "gate_proj", "up_proj", "gate_up_proj", "intermediate.dense", "dense_h_to_4h", "wi", "wi_0",
        "wi_1", "mlp.Wi", "Wi", "w1", "w3", "lin1", "linear1", "fc_in", "ffn",
    ),
    FC2: (
        "fc2", "mlp.c_proj", "down_proj", "output.dense", "dense_4h_to_h", "wo", "mlp.Wo", "w2", "lin2", "linear2",
        "fc_out", "ffn_output",
    ),
    HEAD: ("head", "lm_head", "embed_out", "classifier", "score", "qa_outputs"),
}  # fmt: skip
"""Role of a layer → the last parts of its path. GPT-2, Llama, T5, BERT, ViT, GPT-NeoX, MPT, Phi and their like."""

ROLES = {name: role for role, names in NAMES.items() for name in names}


def role(site: str) -> str | None:
    """The role of a site by the longest end of its name that is known: `encoder.SelfAttention.q` is `qkv`."""
    parts = site.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((ROLES[end] for end in ends if end in ROLES), None)


def feeds(keys: Collection[str]) -> dict[str, list[str]]:
    """Each site whose output is among the keys of a record → those of the keys that tell what it feeds.

    Queries, keys and values feed the projection of their attention, and the attention logits; the first layer of an MLP
    feeds the second; both of these second layers feed the residual stream of their stack. The growth of a head harms no
    layer. A site of no known role has an empty list: what it feeds is unknown.
    """
    inputs = {site: role(site) for site in sites_of(keys, "norm/in/{site}")}
    outputs = sites_of(keys, "norm/out/{site}")
    stacks = stacks_of(outputs, keys)
    return {site: [key for key in _fed(site, inputs, stacks[site]) if key in keys] for site in outputs}


def _fed(site: str, inputs: dict[str, str | None], stack: str) -> list[str]:
    """The keys, recorded or not, of what a site in the stack `stack` feeds; `inputs`: site → role."""

    def inside(wanted: str) -> list[str]:
        """The input norms of the sites of a role whose names have most in common with this one's."""
        shared = {other: common(site, other) for other, found in inputs.items() if found == wanted}
        return [f"norm/in/{other}" for other, count in shared.items() if count == max(shared.values())]

    def of_stack(key: str) -> str:
        return f"{key}/{stack}" if stack else key

    match role(site):
        case "qkv":
            return [*inside(PROJ), of_stack("attn/max_logit")]
        case "fc1":
            return inside(FC2)
        case "proj" | "fc2":
            return [of_stack("residual/norm")]
        case "head":
            return [f"norm/out/{site}"]
    return []


def common(site: str, other: str) -> int:
    """How many first parts of their paths two sites share."""
    pairs = zip(site.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def sites_of(keys: Iterable[str], metric: str) -> list[str]:
    """The sites whose `metric` is among the keys, in their order."""
    return [key.rpartition("/")[2] for key in keys if find(key) is METRICS[metric]]


def stacks_of(sites: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """The stack of each site, "" if there is only one; `sites` and `keys` are in the order of the forward pass.

    The names of the stacks are those of the keys by layer. A site whose name does not begin with one of them is in the
    stack of the site before it.
    """
    found = [(key, find(key)) for key in keys]
    names = {key.removeprefix(metric.key)[1:] for key, metric in found if metric and metric.shape == BY_LAYER} - {""}
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    stacks, stack = dict[str, str](), ""
    for site in sites:
        stack = next((name for name in longest_first if site.startswith(f"{name}.")), stack)
        stacks[site] = stack
    return stacks
