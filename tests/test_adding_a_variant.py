"""docs/adding-a-variant.md, carried out on a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stabrun.composition import compose
from stabrun.config import run_id

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(diff|yaml)\n(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MOST_LINES = 10  # of code in the package
NAME = "update_norm"

ASK = f"""
import json
from stabrun.api import train
from stabrun.composition import compose
from stabrun.config import run_id
from stabrun.model.describe import describe
from stabrun.model.gpt import GPT

TINY = ["model.n_layer=2", "model.d_model=8", "data.seq_len=8", "train.batch_size=2", "train.val_sequences=2"]
TINY += ["train.steps=3", "schedule.warmup_steps=1", "tracker=none", "optim.lr=0.1"]
facts = {{"run_id": run_id(compose()), "runs": {{}}}}
for variant in ("baseline", "{NAME}"):
    config = compose([f"+variant={{variant}}", *TINY, f"run_dir={{variant}}"])
    summary = train(config).summary
    model = GPT(config.model, config.data.seq_len)
    facts["runs"][variant] = {{
        "steps": summary["steps"],
        "loss": summary["final_loss"],
        "built": sum(parameter.numel() for parameter in model.parameters()),
        "counted": describe(config)["parameters"]["total"],
        "switches": describe(config)["switches"],
    }}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package, its configuration and its tests, changed as the page says."""
    folder = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("__pycache__", "data")
    for name in ("stabrun", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for kind, path, text in blocks():
        if kind == "yaml":
            (folder / path).write_text(text)
        else:
            apply(folder / path, text)
    return folder


def blocks():
    """Kind, path and text of each block of the page that names a file."""
    return BLOCK.findall((ROOT / "docs" / "adding-a-variant.md").read_text())


def apply(file, diff):
    """Replace the lines of a diff that are kept or removed, which the file must hold once, with those kept or added."""
    before, after = (
        "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in signs) for signs in (" -", " +")
    )
    text = file.read_text()
    assert text.count(before) == 1, f"{file.name} holds {text.count(before)} times:\n{before}"
    file.write_text(text.replace(before, after))


def of_the_copy(copy, *words):
    """A Python process that imports the copy."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_placement_is_ten_lines_of_code_and_one_file():
    changes = [(path, line) for kind, path, text in blocks() for line in text.splitlines() if kind == "diff"]
    added = [line for path, line in changes if path.startswith("stabrun/") and line.startswith("+")]
    assert 0 < len(added) <= MOST_LINES
    assert [path for kind, path, _ in blocks() if kind == "yaml"] == [f"conf/variant/{NAME}.yaml"]


def test_the_new_placement_trains_and_is_counted(copy):
    facts = json.loads(of_the_copy(copy, "-c", ASK).splitlines()[-1])
    plain, new = facts["runs"]["baseline"], facts["runs"][NAME]
    assert facts["run_id"] == run_id(compose()), "earlier runs keep their id"
    assert (plain["steps"], new["steps"]) == (3, 3)
    assert new["loss"] != plain["loss"]
    assert new["switches"] == {"model.update_norm": True}
    assert plain["counted"] == plain["built"]
    assert new["counted"] == new["built"] == plain["built"] + 2 * 8


def test_the_tests_of_the_copy_compare_it_with_its_formula(copy):
    chosen = f"{NAME} or switches_are_those_of_the_schema or set_the_same"
    files = ("tests/test_variants.py", "tests/test_variant_files.py")
    out = of_the_copy(copy, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", *files, "-k", chosen)
    passed = re.search(r"(\d+) passed", out)
    assert passed, out
    assert int(passed[1]) >= 8
    assert f"  {NAME} " in of_the_copy(copy, "-m", "stabrun", "variants")
