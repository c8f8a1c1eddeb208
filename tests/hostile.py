"""Generated configurations and overrides: each key at its bounds, beyond them, of a wrong type, and nonsense.

`python tests/hostile.py COUNT [SEED]` tries so many in this process. It prints a line every 100, each command that did
anything else than train or be refused, and at the end how many did each.
"""

import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import hypothesis
from hypothesis import strategies as st

from stabrun.cli.main import main
from stabrun.config import added_groups, choices, groups, keys

SMALL = """\
defaults: [config, override tracker: none, _self_]
model: {n_layer: 1, n_head: 2, d_model: 8}
data: {seq_len: 8}
train: {batch_size: 2, threads: 1, steps: 2, val_sequences: 2}
schedule: {warmup_steps: 1}
"""
OVER = ["complete"], ["stopped"]  # the latter at a divergence
SECRET = "marker-of-a-secret"
# Of the size of a run, or the number of its processes: larger values than these would train for long, or be W&B's.
SIZES = {
    "model.n_layer": (1, 2), "model.n_head": (1, 2, 4), "model.d_model": (4, 8, 16), "model.vocab_size": (256, 300),
    "model.mlp.width": (1, 8), "data.seq_len": (2, 8), "train.steps": (1, 2), "train.batch_size": (1, 2, 4),
    "train.micro_batch_size": (1, 2), "train.ranks": (1,), "train.threads": (1,), "data.workers": (1,),
    "data.bpe_size": (257,), "train.val_sequences": (1, 4),
}  # fmt: skip
KINDLESS = {"run_dir", "study_dir", "data.cache_dir", "data.path", "tracker.name", "train.compile", "data.name"}
WRONG = (
    "null", "true", "-1", "0", "1e400", "-1e400", "nan", "inf", "1.5", "''", '""', "' '", "abc", "[]", "[1]", "[[1]]",
    "{}", "{a: 1}", "[{a: 1}]", "[null]", "9" * 30, "-" + "9" * 30, "1e-320", "0x10", "1_0", "é", "日本", "'\\u202e'",
    "'\x1b[31m'", "'<b>x</b>'", "'a\\nb'", "???", "a b", "'a b'", "\\", "'", '"', "[", "}", "${", "$", "%", "#",
    "a=b", "a,", "=", "~", "@", "[" * 200, "{a:" * 200, "'" + "x" * 2000 + "'", "\ud800", "\0", "\n",
)  # fmt: skip
INTERPOLATIONS = (
    "${optim.lr}", "${optim}", "${model.n_layer}", "${seed}", "${nothing}", "${.lr}", "${study.lrs}", "${variant}",
    "${tracker.tags}", "[${optim.lr}]", "[${optim}]", "${oc.env:HOME}", "${oc.env:STABRUN_TEST_KEY}",
    "${oc.env:NOT_THERE}", "${oc.env:NOT_THERE,1}", "${oc.decode:'[1'}", "${oc.decode:'1'}", "${oc.create:{a: 1}}",
    "${oc.select:nothing,3}", "${oc.dict.keys:model}", "${oc.dict.values:optim}", "${hydra:runtime.cwd}",
    "${hydra:job.num}", "${now:%Y}", "${no_resolver:1}", "x${seed}y", "${${variant}}", "${seed",
)  # fmt: skip
OTHERS = (
    "+variant=[qk_norm,soft_cap]", "+variant=", "+variant=[]", "+variant=null", "+variant=[[qk_norm]]",
    "+variant={a:1}", "+variant=../variant/qk_norm", "+variant=/etc/passwd", "variant={a: 1}", "model=[nano]",
    "model=null", "model={a: 1}", "~model", "~seed", "~optim.lr", "~data", "+seed=1", "++seed=1", "+foo=1", "foo=1",
    "++foo.bar=1", "optim=null", "optim=5", "optim={lr: 1}", "optim={}", "train=[1]", "=1", "seed", "a=", "-m",
    "hydra=null", "hydra.job=null", "~hydra", "hydra.sweeper=null", "hydra.launcher._target_=os.system",
    "hydra.callbacks.a._target_=os.system", "+hydra.callbacks.a._target_=os.system", "hydra/launcher=nope",
    "hydra.mode=x", "hydra.mode=MULTIRUN", "hydra.verbose=1", "hydra.job.env_copy=[HOME]", "hydra.job.env_copy=[NOPE]",
    "hydra.searchpath=[pkg://this]", "hydra.output_subdir=x", "hydra.overrides.task=[a]", "+hydra/callbacks=x",
    "schema=x", "+schema=x", "config=x", "_self_=x", "defaults=[x]", "+defaults=[x]", "seed=1,2", "seed=range(0,3)",
    "seed=range(0,10000000000)", "seed=choice(1,2)", "seed=glob(*)", "seed=interval(0,1)", "seed=shuffle(1,2)",
    "seed=int(1.5)", "seed=float(1)", "seed=nothing(1)", "tracker.tags=extend_list(a,b)", "seed=json_str('{')",
)  # fmt: skip


def at_bounds(key):
    """Values at the bounds of a key, next to them, and beyond."""
    for name, bound in key.bounds.items():
        if name == "allowed":
            yield from bound
        elif name == "named":
            yield from ("a", "'" + "a" * bound + "'", "'" + "a" * (bound + 1) + "'", "../a", "/a", "..", "'a\x07'")
        elif "int" in str(key.type):
            yield from (bound - 1, bound, bound + 1)
        else:
            yield from (bound, math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf), -bound, bound / 2)


def plain(key):
    """Values of a key's type, and at its bounds and beyond."""
    if key.path in SIZES:
        return SIZES[key.path]
    return [*at_bounds(key), *([True, False] if "bool" in str(key.type) else [1, 0.5, 2])]


def used_keys():
    return [key for key in keys() if key.path not in KINDLESS]


def values(key):
    """Values of a key, as they are typed, most of them wrong."""
    beyond = ["0", "-1", "999999999999", "9" * 30]
    some = [st.sampled_from(beyond)] if key.path in SIZES else [st.integers().map(str), st.floats().map(str)]
    return st.one_of(
        st.sampled_from(plain(key)).map(str), st.sampled_from(WRONG), st.sampled_from(INTERPOLATIONS), *some
    )


def overrides():
    """The words of a command: of a half, each is valid by itself; of the others, one is a hostile word."""
    # A model of a preset is too large for two steps each, and the Hub is not asked.
    skipped = {"model", "data", "tracker", "experiment"}
    chosen = [
        f"{'+' * (group in added_groups())}{group}={name}"
        for group in groups() if group not in skipped for name in choices(group)
    ]  # fmt: skip
    inside = [f"{key.path}={value}" for key in used_keys() for value in plain(key) if not key.problem(value)]
    valid = st.one_of(*[st.sampled_from(inside)] * 4, st.sampled_from(chosen))
    by_key = st.sampled_from(used_keys()).flatmap(lambda key: values(key).map(f"{key.path}={{}}".format))
    text = st.tuples(st.sampled_from([key.path for key in used_keys()]), st.text(max_size=12)).map("=".join)
    prefixed = st.tuples(st.sampled_from(["+", "++", "~"]), by_key).map("".join)
    hostile = st.one_of(by_key, by_key, by_key, st.sampled_from(OTHERS), prefixed, text)
    return st.one_of(
        st.lists(valid, min_size=1, max_size=4),
        st.tuples(hostile, st.lists(valid, max_size=2)).map(lambda both: [both[0], *both[1]]),
    )


def tried(words):
    """`trained` or `refused`: what `stabrun train` did in the working directory. Anything else is told."""
    out, err = io.StringIO(), io.StringIO()
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(["train", "--config-dir", "conf", "--config-name", "small", *words])
        except SystemExit as ended:
            status = ended.code
        except Exception:
            return traceback.format_exc()
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)
    said = [line for line in err.getvalue().splitlines() if not line.startswith("stabrun: warning: ")]
    left = [item for item in Path().iterdir() if item.name != "conf"]
    records = [file.read_text(errors="replace") for file in Path().rglob("*.*") if file.is_file()]
    if SECRET in "".join([*records, out.getvalue(), err.getvalue()]):
        return "a secret is told"
    if status == 0 and not said:
        summaries = [json.loads(file.read_text()) for file in Path().glob("runs/*/summary.json")]
        return "trained" if [summary["status"] for summary in summaries] in OVER else "trained nothing"
    if status == 2 and len(said) == 1 and said[0].startswith("stabrun: ") and not out.getvalue() and not left:
        return "refused"
    return f"status {status}, {said}, {out.getvalue()!r}, {left}"


def all_tried(count, seed=0):
    """What so many generated commands did: the number of each outcome, and the words of those that did otherwise."""
    counts, wrong = Counter(), []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
        deadline=None, database=None, derandomize=False,
    )  # fmt: skip
    @hypothesis.given(overrides())
    def each(words):
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            Path("conf").mkdir()
            Path("conf/small.yaml").write_text(SMALL)
            found = tried(words)
        if found not in ("trained", "refused"):
            wrong.append((words, found))
            print(words, found, sep="\n", end="\n\n", flush=True)
            found = "wrong"
        counts[found] += 1
        if counts.total() % 100 == 0:
            print(dict(counts), flush=True)

    os.environ["STABRUN_TEST_KEY"] = SECRET
    each()
    return counts, wrong


if __name__ == "__main__":
    import torch

    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    began = time.monotonic()
    counts, wrong = all_tried(*map(int, sys.argv[1:]))
    print(f"{dict(counts)} in {time.monotonic() - began:.0f} s")
    sys.exit(bool(wrong))
