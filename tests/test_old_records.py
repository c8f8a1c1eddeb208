"""Records outlive versions: a run and a study of version 0.1.0 are read, resumed and extended, and newer ones are read.

`data/records_0.1.0.tar.xz` was made by the last commit of 0.1.0: `run/` was interrupted after 16 of 30 steps, and
`study/` has two finished cells, an interrupted one and a planned one.
"""

import json
import tarfile
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import yaml
from helpers import run
from studies import write_results

from stabrun.composition import compose
from stabrun.config import IN_EVERY_RECORD, RESULT, Config, ModelConfig, UserError, key, keys, run_id
from stabrun.record.jsonl import read_checked
from stabrun.record.run_dir import RunDir
from stabrun.record.study_dir import StudyDir
from stabrun.report import sentences
from stabrun.report.study_data import read
from stabrun.study import worker
from stabrun.study.ledger import DONE, PLANNED, Ledger
from stabrun.study.plan import extended, load
from stabrun.study.question import planned
from stabrun.study.worker import work
from stabrun.verdict.judge import RULE

RECORDS = Path(__file__).parent / "data" / "records_0.1.0.tar.xz"
SHAPE = (
    "model.n_layer=2", "model.d_model=8", "data.seq_len=16", "train.batch_size=4", "train.threads=1",
    "schedule.warmup_steps=5", "train.val_sequences=4", "tracker=none",
)  # fmt: skip
RUN = (*SHAPE, "train.steps=30", "train.checkpoint_every=5", "+variant=qk_norm")
RUN_ID = "0d34786fc5f1"
STUDY = (
    *SHAPE, "train.steps=200", "train.checkpoint_every=20", "observe.slow_every=50", "observe.every=10",
    "study.variants=[baseline,qk_norm]", "study.seeds=1", "study.workers=1",
)  # fmt: skip
LRS = "study.lrs=[1e-2,1e-1]"
FINISHED, INTERRUPTED_CELL, PLANNED_CELL = ("433645bcc860", "58b0e35e8c0f"), "6bcde00498ee", "8dcbc75a0500"
CELLS = (*FINISHED, INTERRUPTED_CELL, PLANNED_CELL)


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    """The records of 0.1.0 in the current directory."""
    with tarfile.open(RECORDS) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def later_key(monkeypatch):
    """A version of the schema with another result key, `model.later_key`."""
    cap = key(None, RESULT, "cap of the logits", absent=None, above=0)
    later = make_dataclass("ModelConfig", [("later_key", float | None, cap)], bases=(ModelConfig,))
    monkeypatch.setattr(Config.__dataclass_fields__["model"], "default_factory", later)
    keys.cache_clear()
    assert "model.later_key" in {k.path for k in keys()}
    yield
    monkeypatch.undo()
    keys.cache_clear()


@pytest.fixture(params=["this version", "a version with another key"])
def version(request):
    """Each test is done by this version, and by one with another key in the schema."""
    if request.param != "this version":
        request.getfixturevalue("later_key")


def leaves(node, prefix=""):
    for name, value in node.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


def edited(file, change):
    """Change a YAML or JSON file as another version would have written it."""
    facts = yaml.safe_load(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts) if file.suffix == ".json" else yaml.safe_dump(facts, sort_keys=False))


def asked(*words):
    plan, directory, _ = planned([*STUDY, *words])
    return plan, directory


def test_every_later_result_key_says_what_its_absence_means():
    recorded = set(leaves(yaml.safe_load(RunDir(Path("run")).config_file.read_text())))
    results_of_0_1_0 = {k.path for k in keys() if k.mark == RESULT and k.absent is IN_EVERY_RECORD}
    assert results_of_0_1_0 <= recorded
    assert {k.path for k in keys() if k.mark == RESULT} & recorded == results_of_0_1_0


def test_ids_stay(version):
    plan, directory = asked(LRS)
    assert run_id(compose(RUN)) == run_id(RunDir(Path("run")).config()) == RUN_ID
    assert tuple(plan.cells) == tuple(load(Path("study")).cells) == CELLS
    assert directory == Path("studies/study-d917a2a0")


def test_a_later_key_makes_another_run_only_if_it_differs(later_key):
    assert run_id(compose([*RUN, "model.later_key=null"])) == RUN_ID
    assert run_id(compose([*RUN, "model.later_key=30"])) != RUN_ID
    plan, directory = asked(LRS, "model.later_key=30")
    assert not set(plan.cells) & set(CELLS)
    assert directory != asked(LRS)[1]
    with pytest.raises(UserError, match=r"model\.later_key=None \(now 30\.0\)"):
        extended(load(Path("study")), plan)


def test_a_run_is_read(version, capsys):
    status, out, _ = run(capsys, "judge", "run", "--json")
    facts = json.loads(out)
    assert (status, facts["verdict"], facts["horizon"]) == (0, "undecided", 15)
    status, out, _ = run(capsys, "status", "run", "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["run_id"], facts["status"], facts["step"], facts["checkpoint"]) == (RUN_ID, "interrupted", 16, 16)
    source = read(Path("run"))
    assert source.rows[0]["run_id"] == RUN_ID
    assert list(sentences.state(source))
    status, out, _ = run(capsys, "rerun", "run", "--cfg")
    assert (status, yaml.safe_load(out)["variant"]) == (0, "qk_norm")


def without_estimates(summary):
    """Without lr50 and lr10, which depend on the prior of the version."""
    arms = {name: {**arm, "frontier": arm["frontier"].keys()} for name, arm in summary["variants"].items()}
    return summary | {"variants": arms}


def test_a_study_is_read(version, capsys):
    status, out, _ = run(capsys, "judge", "study", "--json")
    assert (status, [facts["verdict"] for facts in json.loads(out)]) == (0, ["converged"] * 2)
    status, out, _ = run(capsys, "status", "study", "--json")
    assert (status, json.loads(out)["counts"]) == (0, {"planned": 2, "running": 0, "done": 2, "failed": 0})
    source = read(Path("study"))
    assert [row["run_id"] for row in source.rows] == list(FINISHED)
    assert [*sentences.state(source), *sentences.results(source)]
    before = {file.name: file.read_bytes() for file in Path("study").glob("*.*")}
    summary = json.loads(before.pop("study.json")) | {"rule": RULE}
    head, *lines = before["results.csv"].splitlines()
    later = [
        head + b",mfu,peak_memory_bytes,outliers_skipped,rewinds",
        *(line + b",,,," for line in lines),
    ]  # columns that are empty
    before["results.csv"] = b"".join(line + b"\n" for line in later)
    write_results(load(Path("study")), Path("study"))
    after = {file.name: file.read_bytes() for file in Path("study").glob("*.*")}
    assert without_estimates(read_checked(Path("study/study.json"))) == without_estimates(summary)
    assert after.pop("study.json")
    assert after == before


def test_a_run_is_resumed(version, capsys):
    directory = RunDir(Path("run"))
    before = directory.metrics.read_bytes()
    status, _, err = run(capsys, "train", *RUN, "run_dir=run")
    assert status == 0, err
    assert directory.metrics.read_bytes()[: len(before)] == before
    assert [row["step"] for row in directory.rows()] == list(range(30))
    assert directory.starts()[-1] == 16
    summary = directory.summary()
    assert (summary["run_id"], summary["status"], summary["steps"]) == (RUN_ID, "complete", 30)


def test_a_study_is_resumed_and_extended(version, monkeypatch):
    """Another learning rate; runs that are new end at once, so that the test is quick."""
    study, trained = StudyDir(Path("study")), []
    before = study.attempt(INTERRUPTED_CELL, 1).metrics.read_bytes()
    untouched = {cell: study.run(cell).metrics.stat() for cell in FINISHED}
    plan = extended(load(study.path, to_train=True), asked("study.lrs=[3e-2]")[0])
    assert len(plan.cells) == 6
    assert tuple(plan.cells)[:4] == CELLS
    plan.save(study.path)
    really = worker.train

    def train(config, directory, watch, stop):
        trained.append(run_id(config))
        if trained[-1] != INTERRUPTED_CELL:
            stop.asked = True
        return really(config, directory, watch, stop)

    monkeypatch.setattr(worker, "train", train)
    with pytest.raises(KeyboardInterrupt):
        work(study.path)
    assert trained == [INTERRUPTED_CELL, PLANNED_CELL]
    assert study.run(INTERRUPTED_CELL).metrics.read_bytes()[: len(before)] == before
    assert study.run(INTERRUPTED_CELL).restarts() == [21]
    assert untouched == {cell: study.run(cell).metrics.stat() for cell in FINISHED}
    statuses = [entry.status for entry in Ledger(study.path).entries(plan.cells).values()]
    assert statuses == [DONE] * 3 + [PLANNED] * 3


@pytest.mark.parametrize("command", [["train", *RUN, "run_dir=run"], ["rerun", "run"]], ids=["train", "rerun"])
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.yaml", lambda facts: facts["model"].update(later_key=30.0), "model.later_key is a key of a newer"),
        ("config.yaml", lambda facts: facts.update(moe={"experts": 8}), "moe is a key of a newer version"),
        ("environment.json", lambda facts: facts.update(format=2), "format 2 was written by a newer version"),
    ],
    ids=["key", "group", "format"],
)
def test_a_run_of_a_newer_version_is_read_and_not_trained(capsys, file, change, message, command):
    edited(Path("run") / file, change)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert run(capsys, "judge", "run")[0] == run(capsys, "status", "run")[0] == 0
    assert read(Path("run")).rows[0]["run_id"] == RUN_ID
    status, _, err = run(capsys, *command)
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["arms"]["qk_norm"]["model"].update(later_key=30.0), "model.later_key is a key of a newer"),
        (lambda facts: facts.update(format=2, priority="high"), "format 2 was written by a newer version"),
        (lambda facts: facts.update(cells=[[*cell, "new"] for cell in facts["cells"]], format=2), "format 2 was"),
    ],
    ids=["key", "fact", "cell"],
)
def test_a_study_of_a_newer_version_is_read_and_not_trained(capsys, change, message):
    edited(Path("study/study.yaml"), change)
    assert run(capsys, "status", "study")[0] == 0
    assert len(list(read(Path("study")).rows)) == 2
    status, _, err = run(capsys, "sweep", *STUDY, LRS, "study_dir=study")
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err
    with pytest.raises(UserError, match="newer version"):
        work(Path("study"))


def test_a_missing_key_of_0_1_0_is_damage(capsys):
    edited(Path("run/config.yaml"), lambda facts: facts["model"].pop("d_model"))
    assert "model.d_model is missing" in run(capsys, "status", "run")[2]
    edited(Path("study/study.yaml"), lambda facts: facts["arms"]["qk_norm"]["optim"].pop("lr"))
    assert "optim.lr is missing" in run(capsys, "status", "study")[2]


LACKING = "reason", "by_strictness", "scar", "final_loss", "val_loss", "rule", "signals", "spikes", "tokens", "seconds"


@pytest.mark.parametrize("lacking", [*LACKING, LACKING, ()], ids=str)
def test_summaries_of_another_version_are_read(capsys, lacking):
    """With fields that this one does not know, and without some that it does."""
    lacking = [lacking] if isinstance(lacking, str) else lacking

    def change(facts):
        facts["a_new_field"] = {"a": [1]}
        for name in lacking:
            del facts[name]

    for cell in FINISHED:
        edited(StudyDir(Path("study")).run(cell).summary_file, change)
    edited(Path("study/study.json"), lambda facts: facts["variants"]["baseline"].clear())
    edited(Path("study/ledger") / f"{INTERRUPTED_CELL}.0001.claim", lambda facts: facts.update(rack=7))
    assert run(capsys, "status", "study")[0] == run(capsys, "status", f"study/runs/{FINISHED[0]}")[0] == 0
    for place in ("study", f"study/runs/{FINISHED[0]}"):
        source = read(Path(place))
        assert [*sentences.state(source), *sentences.results(source)]
    _, told = write_results(load(Path("study")), Path("study"))
    assert told["runs"] == 2
    assert run(capsys, "upload", "study", "--dry-run")[0] == 0
