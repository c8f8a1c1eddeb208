"""Everything that needs a GPU, in less than ten minutes and without a network: the tests marked `cuda`, a small sweep,
and some steps at 830M with their speed and memory beside the predictions. Ends with status 1 if a part failed.

    make gpu-check        or: python scripts/gpu_check.py [--output DIRECTORY] [--parts sweep tests]
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}
COMMON = [
    "train.device=cuda",
    "train.precision=bf16",
    "data.tokenizer=bytes",
    "tracker=none",
    "train.checkpoint_every=0",
]
SWEEP = [
    "model=micro", "study.variants=[baseline,soft_cap,soft_clip]", "study.lrs=[3e-3,0.3]", "study.seeds=1",
    "train.steps=60", "schedule.warmup_steps=10", "train.val_every=0",
]  # fmt: skip
LARGE = [
    "model=830m", "train.batch_size=16", "train.steps=8", "schedule.warmup_steps=4", "train.val_every=0",
    "train.val_sequences=4",
]  # fmt: skip
PARTS = ("830m-baseline", "830m-soft_cap", "sweep", "tests")
TEST_PROCESSES = "8"  # which share the GPU
FIELDS = (
    "variant",
    "seconds",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "predicted_bytes",
    "attention",
    "graphs",
)


def environment() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_check: no CUDA device; torch is " + torch.__version__)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "device": torch.cuda.get_device_name(),
        "devices": str(torch.cuda.device_count()),
        "memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB",
    }


def part(name: str, command: list[str], seconds: int, output: Path) -> bool:
    """Run a command with a time limit; its output goes to a file, and the last lines to the console."""
    log, began = output / f"{name}.log", time.monotonic()
    print(f"\n== {name}: {' '.join(command[1:])[:200]}", flush=True)
    with open(log, "w") as file:
        try:
            status = subprocess.run(
                command, cwd=output, env=os.environ | OFFLINE, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    print("\n".join(log.read_text(errors="replace").splitlines()[-25:]))
    print(
        f"== {name}: {'passed' if status == 0 else f'FAILED ({status})'} in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return status == 0


def facts(run: Path) -> dict[str, object]:
    """What a run at 830M used, and what was predicted."""
    from stabrun.config import read_config
    from stabrun.model.memory import memory
    from stabrun.record.run_dir import RunDir

    directory = RunDir(run)
    summary, made = directory.summary() or {}, [e for e in directory.events() if e.get("event") == "compiled"]
    found = (
        dict(summary)
        | directory.environment()
        | {
            "predicted_bytes": memory(read_config(directory.config_file), "cuda")["peak_bytes"],
            "graphs": {str(event["step"]): dict(event)["graphs"] for event in made},
        }
    )
    return {name: found.get(name) for name in FIELDS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="directory of logs and records")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run; all by default")
    words = parser.parse_args()
    output = words.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    machine = environment()
    print(json.dumps(machine, indent=1), flush=True)
    python, results = sys.executable, {}
    train = [python, "-m", "stabrun", "train", *COMMON, *LARGE]
    for name in ("830m-baseline", "830m-soft_cap"):
        if name in words.parts:
            run, variant = output / name, name.removeprefix("830m-")
            results[name] = part(name, [*train, f"+variant={variant}", f"run_dir={run}"], 120, output)
            if results[name]:
                print(json.dumps(facts(run), indent=1), flush=True)
    if "sweep" in words.parts:
        sweep = [python, "-m", "stabrun", "sweep", *COMMON, *SWEEP, f"study_dir={output / 'study'}"]
        results["sweep"] = part("sweep", sweep, 150, output)
    if "tests" in words.parts:
        several = ["-n", TEST_PROCESSES] if importlib.util.find_spec("xdist") else []
        tests = [python, "-m", "pytest", str(ROOT / "tests"), "-m", "cuda", "-p", "no:cacheprovider", "--durations=10"]
        results["tests"] = part("tests", [*tests, *several, "-c", str(ROOT / "pyproject.toml")], 240, output)
    (output / "results.json").write_text(json.dumps({"machine": machine, "passed": results}, indent=1) + "\n")
    print("\n" + "\n".join(f"{name}: {'passed' if good else 'FAILED'}" for name, good in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
