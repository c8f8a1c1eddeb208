"""The files of variants, shipped and a user's own: what they say and set, their listing and their combination."""

import itertools
import json
import re

import pytest
from helpers import ALL_VARIANTS, TINY, run, stabrun

from stabrun.cli.variants import entries, lines
from stabrun.composition import compose
from stabrun.config import UserError, conf_dir, keys, run_id, value_of
from stabrun.record.run_dir import RunDir
from stabrun.variants import GROUPS, Variant, directories, file_values, read_header, typed, variants

SAME = {frozenset({"fc_norm", "sandwich"}): "an ablation of the paper, and the name that the placement is known by"}
"""Pairs of shipped variants that set the same keys to the same values → why both are there."""

QUICK = (*TINY, "train.steps=3", "train.checkpoint_every=0", "train.val_every=0")
CALM = "# @package _global_\n# Soft capping at 10. [mine]\nmodel: {attn: {soft_cap: 10.0}}\n"
COLUMNS = 80


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes variants into the configuration directory `mine`, which is in the working directory; returns it."""
    monkeypatch.chdir(tmp_path)

    def write(**texts):
        for name, text in texts.items():
            file = tmp_path / "mine" / "variant" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text if text.startswith("#") else f"# @package _global_\n{text}\n")
        return tmp_path / "mine"

    return write


# Shipped files


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_a_shipped_file_says_its_group_definition_and_source(name):
    first, second = (conf_dir() / "variant" / f"{name}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert re.fullmatch(rf"# ({'|'.join(GROUPS)}): \S.*\. \[[^\[\]]+\]", second)
    assert len(second) <= 120


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_the_keys_of_a_shipped_file_are_those_that_hydra_sets(name):
    """All of them are result keys, and typing them gives the same run."""
    values = file_values("variant", name, directories(None))
    results = {key.path for key in keys() if key.mark == "result"}
    assert values.keys() <= results
    composed = compose([f"+variant={name}"])
    assert {key: value_of(composed, key) for key in values} == values
    assert run_id(compose([typed(key, value) for key, value in values.items()])) == run_id(composed)


def test_no_two_shipped_variants_set_the_same():
    values = {name: file_values("variant", name, directories(None)) for name in ALL_VARIANTS}
    same = {frozenset(pair) for pair in itertools.combinations(ALL_VARIANTS, 2) if values[pair[0]] == values[pair[1]]}
    assert same == SAME.keys()


# Headers and values


@pytest.mark.parametrize(
    ("comment", "header"),
    [
        ("logits: Norm of Q. [1; inferred]", ("logits", "Norm of Q.", "1; inferred")),
        ("Norm of Q. [mine]", ("other", "Norm of Q.", "mine")),
        ("heads: norm of Q.", ("other", "heads: norm of Q.", "")),
        ("residual:", ("residual", "", "")),
        ("x in [0, 1) and ]: [a]", ("other", "x in [0, 1) and ]:", "a")),
        ("", ("other", "", "")),
    ],
)
def test_headers(comment, header):
    found = read_header("x", comment)
    assert (found.group, found.definition, found.source) == header
    assert " ".join(found.text.split()) == comment.removeprefix(f"{found.group}:").strip()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model: {layer_scale: 1e-4}", "model.layer_scale=0.0001"),
        ("model: {layer_scale: 1.0E+2}", "model.layer_scale=100.0"),
        ("model: {layer_scale: ~}", "model.layer_scale=null"),
        ("model: {bias: true}", "model.bias=true"),
        ("model: {mlp: {width: 24}}", "model.mlp.width=24"),
        ("data: {separator: 'a, [b]'}", 'data.separator="a, [b]"'),
        ("tracker: {tags: [a, b]}", 'tracker.tags=["a", "b"]'),
        ("optim: {weight_decay: '${optim.eps}'}", 'optim.weight_decay="${optim.eps}"'),
    ],
)
def test_a_key_as_it_is_typed_gives_what_the_file_gives(mine, text, word):
    folder = mine(x=text)
    ((key, value),) = file_values("variant", "x", directories(folder)).items()
    assert typed(key, value) == word
    assert value_of(compose(["+variant=x"], folder), key) == value_of(compose([word]), key)


# Listing


def test_the_listing_is_by_group_and_holds_every_key(capsys, mine):
    folder = mine(calm=CALM, bare="", plain="# @package _global_\n# optimizer: Larger ε.\noptim: {eps: 1e-6}\n")
    status, out, _ = run(capsys, "variants", "-cd", folder)
    assert status == 0
    assert out.splitlines()[:2][0] == "placement"
    assert out.splitlines()[1].split()[0] == "baseline"
    headings = [line for line in out.splitlines() if not line.startswith(" ")]
    assert headings == sorted(headings, key=[*GROUPS, "other"].index)
    words = " ".join(out.split())
    for name in ALL_VARIANTS:
        for key, value in file_values("variant", name, directories(None)).items():
            assert f" {typed(key, value)} " in f"{words} "
    assert " plain Larger ε. optim.eps=1e-06" in words
    assert "other bare sets no key calm Soft capping at 10. [mine] model.attn.soft_cap=10.0" in words
    assert not re.search(rf"({'|'.join(GROUPS)}): ", out)


@pytest.mark.parametrize("columns", [20, COLUMNS, 300])
def test_the_listing_fits_the_terminal(mine, columns):
    folder = mine(**{"calm": CALM, "a_name_that_is_much_longer_than_all_of_the_shipped_ones": CALM})
    text = list(lines(entries(folder), columns))
    longest = max(len(word) for line in text for word in line.split())
    assert max(map(len, text)) <= max(40, min(columns, 110), 20 + longest)
    if columns == COLUMNS:
        assert max(map(len, text)) <= columns


def test_piped_output_is_plain(mine):
    done = stabrun("variants", cwd=mine(calm=CALM), env={"COLUMNS": "80", "FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert len(done.stdout.split()) > 100


def test_the_listing_as_json(capsys, mine):
    found = {
        fact.pop("name"): fact for fact in json.loads(run(capsys, "variants", "-cd", mine(calm=CALM), "--json")[1])
    }
    assert found.keys() == {*ALL_VARIANTS, "calm"}
    assert found["soft_cap"]["group"] == "logits"
    assert found["calm"] == {
        "group": "other",
        "definition": "Soft capping at 10.",
        "source": "mine",
        "switches": {"model.attn.soft_cap": 10.0},
    }


def test_a_file_of_the_user_replaces_a_shipped_one_and_editors_leftovers_are_not_listed(mine):
    folder = mine(qk_norm=CALM, **{"deep/er": CALM, ".#calm": CALM, "._calm": "\0\1"})
    (folder / "variant" / "broken.yaml").symlink_to("nowhere")
    found = {variant.name: variant for variant in variants(folder)}
    assert found.keys() == {*ALL_VARIANTS, "deep/er"}
    assert found["qk_norm"] == Variant("qk_norm", "other", "Soft capping at 10.", "mine")
    assert compose(["+variant=deep/er"], folder).model.attn.soft_cap == 10
    assert file_values("variant", "qk_norm", directories(folder)) == {"model.attn.soft_cap": 10}


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ({"x": "model: {attn: ["}, "x.yaml: not YAML"),
        ({"x": "model: &a {attn: *a}"}, "x.yaml: the alias *a contains itself"),
        ({"x": "- model"}, "x.yaml: must hold keys"),
        ({"x": "defaults: qk_norm"}, "x.yaml: must hold keys"),
        ({"x": "defaults: [nope]"}, "variant=nope: no such variant, in the defaults list of"),
        ({"x": "defaults: [../../x]"}, "no such variant/../.."),
        ({"x": "defaults: [{'': y}]"}, "=y: no such "),
        ({"x": "defaults: [y]", "y": "defaults: [x]"}, "leads back to itself"),
        ({"x": "defaults: [soft_cap, calm]", "calm": CALM}, "soft_cap=50.0 and calm sets model.attn.soft_cap=10.0"),
    ],
)
def test_a_file_that_cannot_be_listed_is_named(capsys, mine, texts, named):
    status, out, err = run(capsys, "variants", "-cd", mine(**texts))
    assert (status, out) == (2, "")
    assert named in err
    assert len(err.splitlines()) == 1


# Combination

PAIRS = {
    "disjoint": (("qk_norm", "soft_temp"), {"model.attn.qk_norm": "head", "model.attn.soft_temp": 0.5}),
    "same value twice": (("soft_cap", "qk_norm_cap"), {"model.attn.soft_cap": 50.0, "model.attn.qk_norm": "head"}),
    "mine with shipped": (("calm", "qk_norm"), {"model.attn.soft_cap": 10.0, "model.attn.qk_norm": "head"}),
    "includes the other": (("both", "qk_norm"), {"model.attn.soft_cap": 10.0, "model.attn.qk_norm": "head"}),
    "two of mine": (("both", "calm", "linear"), {"model.attn.soft_cap": 10.0, "schedule.kind": "linear"}),
    "spelled differently": (("calm", "ten"), {"model.attn.soft_cap": 10.0}),
}
CLASHES = {
    "shipped": (("qk_fc_norm", "qkv_norm"), "model.attn.pre_norm", "true", "false"),
    "mine with shipped": (("soft_cap", "calm"), "model.attn.soft_cap", "50.0", "10.0"),
    "three": (("qk_norm", "calm", "soft_cap"), "model.attn.soft_cap", "10.0", "50.0"),
    "with a default": (("soft_cap", "off"), "model.attn.soft_cap", "50.0", "null"),
    "included": (("both", "soft_cap"), "model.attn.soft_cap", "10.0", "50.0"),
    "own key over an included one": (("larger", "calm"), "model.attn.soft_cap", "20.0", "10.0"),
    "two choices of a group": (("linear", "wsd"), "schedule.kind", "linear", "wsd"),
    "a choice and a key": (("linear", "flat"), "schedule.kind", "linear", "constant"),
}
MINE = {
    "calm": CALM,
    "ten": "model: {attn: {soft_cap: 1e1}}",
    "off": "model: {attn: {soft_cap: null}}",
    "both": "defaults: [qk_norm, calm]",
    "larger": "defaults: [calm]\nmodel: {attn: {soft_cap: 20.0}}",
    "linear": "defaults: [override /schedule: linear]",
    "wsd": "defaults:\n  - override /schedule: wsd\n  - _self_",
    "flat": "schedule: {kind: constant}",
}


@pytest.mark.parametrize(("names", "wanted"), PAIRS.values(), ids=PAIRS)
def test_variants_that_agree_combine_in_any_order(mine, names, wanted):
    folder = mine(**MINE)
    for order in itertools.permutations(names):
        config = compose([f"+variant=[{','.join(order)}]"], folder)
        assert config.variant == "+".join(order)
        assert {key: value_of(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(("names", "key", "one", "other"), CLASHES.values(), ids=CLASHES)
def test_variants_that_contradict_each_other_are_refused(mine, names, key, one, other):
    folder = mine(**MINE)
    given = {f"{key}={one}", f"{key}={other}"}
    for order in itertools.permutations(names):
        with pytest.raises(UserError) as refused:
            compose([f"+variant=[{','.join(order)}]"], folder)
        text = str(refused.value)
        assert text.startswith(f"variant={'+'.join(order)}: ")
        clash = re.search(r": (\w+) sets (\S+) and (\w+) sets (\S+); ", text)
        assert {clash[2], clash[4]} == given
        assert {clash[1], clash[3]} <= set(names)
        assert text.count(".") == text.rstrip(".").count(".") + 1, "one sentence"


@pytest.mark.parametrize("name", MINE)
def test_what_a_file_with_a_defaults_list_sets_is_what_hydra_composes(mine, name):
    folder = mine(**MINE)
    composed = compose([f"+variant={name}"], folder)
    values = file_values("variant", name, directories(folder))
    assert values
    assert {key: value_of(composed, key) for key in values} == values


COMMANDS = {
    "train": ("train", "+variant=[soft_cap,calm]"),
    "multirun": ("train", "-m", "+variant=qk_norm,[soft_cap,calm]"),
    "cfg": ("train", "+variant=[soft_cap,calm]", "--cfg", "job"),
    "model": ("model", "+variant=[soft_cap,calm]"),
    "ramp": ("ramp", "+variant=[soft_cap,calm]"),
    "sweep": ("sweep", "study.variants=[qk_norm,soft_cap+calm]", "study.lrs=[0.1]"),
    "sweep as train": ("sweep", "+variant=[soft_cap,calm]", "study.lrs=[0.1]"),
    "search": ("sweep", "study.variants=[soft_cap+calm]", "study.strategy=frontier", "study.lr_range=[1e-2,1]"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_a_contradiction_before_it_begins(capsys, mine, tmp_path, words):
    folder = mine(**MINE)
    status, out, err = run(capsys, *words, "--config-dir", "mine", *(() if words[0] == "model" else QUICK))
    assert (status, out) == (2, "")
    assert "soft_cap sets model.attn.soft_cap=50.0 and calm sets model.attn.soft_cap=10.0" in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_a_key_that_is_typed_decides(mine):
    folder = mine(**MINE)
    for word in ("model.attn.soft_cap=3.0", "++model.attn.soft_cap=3.0"):
        config = compose(["+variant=[soft_cap,calm]", word], folder)
        assert (config.variant, config.model.attn.soft_cap) == ("soft_cap+calm", 3.0)
    assert compose(["+variant=qk_norm", "model.attn.qk_norm=none"]).model.attn.qk_norm == "none"
    with pytest.raises(UserError, match="soft_cap sets model"):
        compose(["+variant=[soft_cap,calm]", "model.attn.soft_temp=0.5"], folder)


def test_a_file_that_sets_the_key_itself_decides_between_those_that_it_includes(mine):
    clash = "defaults: [soft_cap, calm]"
    folder = mine(**MINE, decides=f"{clash}\nmodel: {{attn: {{soft_cap: 30.0}}}}", clashes=clash)
    assert compose(["+variant=decides"], folder).model.attn.soft_cap == 30
    with pytest.raises(UserError, match=r"mine/variant/clashes.yaml: soft_cap sets .*=50.0 and calm sets"):
        compose(["+variant=clashes"], folder)
    with pytest.raises(UserError, match=r"clashes.yaml: soft_cap sets"):
        compose(["+variant=[qk_norm,clashes]"], folder)
    assert compose(["+variant=clashes", "model.attn.soft_cap=3.0"], folder).model.attn.soft_cap == 3


@pytest.mark.parametrize(
    "words",
    [
        ("train", "+variant=[qk_norm,qk_norm]"),
        ("train", "-m", "+variant=[qk_norm,qk_norm],baseline"),
        ("sweep", "study.variants=[qk_norm+qk_norm]", "study.lrs=[0.1]"),
        ("train", "+variant=qk_norm", "+variant=qk_norm"),
        ("train", "+variant=qk_norm", "+variant=soft_cap"),
    ],
)
def test_a_variant_given_twice_is_refused(capsys, mine, tmp_path, words):
    mine(calm=CALM)
    status, out, err = run(capsys, *words, *QUICK)
    assert (status, out) == (2, "")
    assert "given twice" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("+variant='qk_norm'", "qk_norm"),
        ('+variant=["qk_norm", soft_cap]', "qk_norm+soft_cap"),
        ("+variant=[]", "baseline"),
        ("+variant=[qk_norm]", "qk_norm"),
    ],
)
def test_the_name_of_a_combination(word, name):
    assert compose([word]).variant == name


def test_two_arms_that_are_the_same_configuration_are_refused(capsys, mine):
    """Their runs would belong to one of them, and the other would have none."""
    folder = mine(same="model: {attn: {soft_cap: 50.0}}")
    words = ("sweep", "-cd", folder, "study.lrs=[0.1]", "study.seeds=1", "study_dir=s", *QUICK)
    status, _, err = run(capsys, *words, "study.variants=[soft_cap,same]")
    assert status == 2
    assert "soft_cap and same are the same configuration" in err
    assert run(capsys, *words, "study.variants=[soft_cap]")[0] == 0
    status, _, err = run(capsys, *words, "study.variants=[same]")
    assert status == 2
    assert "soft_cap and same are the same configuration" in err


# A directory of one's own, from the plan to the page


def test_variants_of_one_s_own_are_swept_resumed_run_again_and_reported(capsys, mine, tmp_path):
    """The records are complete: what is done with them later needs neither the directory nor its files."""
    folder = mine(**MINE)
    arms = ["both", "calm+fc_norm", "linear"]
    asked = ("sweep", "-cd", "mine", *QUICK, "study.lrs=[0.1]", "study.seeds=1", "study_dir=s")
    for count in (1, 3):  # the second extends the first
        done = stabrun(*asked, f"study.variants=[{','.join(arms[:count])}]", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    records = {found.config().variant: found for found in map(RunDir, (tmp_path / "s" / "runs").iterdir())}
    assert records.keys() == set(arms)
    for name, found in records.items():
        alone = compose([f"+variant=[{name.replace('+', ',')}]", *QUICK, "optim.lr=0.1"], folder)
        assert run_id(alone) == found.path.name
        assert [event["event"] for event in found.events()].count("start") == 1
    folder.rename(tmp_path / "gone")
    status, _, err = run(capsys, "rerun", records["calm+fc_norm"].path, "run_dir=again", "seed=1")
    assert status == 0, err
    again = RunDir(tmp_path / "again").config()
    assert (again.variant, again.model.attn.soft_cap, again.model.mlp.out_norm) == ("calm+fc_norm", 10.0, True)
    assert all(name in run(capsys, "status", "s")[1] for name in arms)
    assert run(capsys, "report", "s")[0] == 0
    page = (tmp_path / "s/report/index.html").read_text()
    assert all(name in page for name in arms)
