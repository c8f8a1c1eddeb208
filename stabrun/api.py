"""The Python API: train a configuration, and read runs and studies as data frames and models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stabrun.config import Config, UserError, run_dir
from stabrun.record.metrics import flatten
from stabrun.record.run_dir import RunDir
from stabrun.record.schema import Event, StudySummary, Summary
from stabrun.record.study_dir import StudyDir

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from pandas import DataFrame

    from stabrun.data.tokenizer import Tokenizer
    from stabrun.model.gpt import GPT
    from stabrun.training.evaluate import Evaluation
    from stabrun.verdict.judge import Verdict


class Run:
    """A run directory. Files are read when they are asked for, so a run can be read while it trains.

    Raises UserError if the directory holds no run.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = RunDir(self.directory)
        if not self.files.is_run():
            raise UserError(f"{directory}: not a run directory: {self.files.config_file.name} is missing.")

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    @property
    def config(self) -> Config:
        return self.files.config()

    @property
    def summary(self) -> Summary:
        """What `summary.json` holds. Raises UserError before the run has ended once."""
        summary = self.files.summary()
        if summary is None:
            raise UserError(f"{self.directory}: no summary yet: {self.files.summary_file.name} is missing.")
        return summary

    @property
    def verdict(self) -> str:
        """`converged`, `recovered`, `diverged` or `undecided`."""
        return str(self.summary["verdict"])

    @property
    def events(self) -> list[Event]:
        """Starts, checkpoints, warnings and the end of the run, in order."""
        return self.files.events()

    def metrics(self) -> DataFrame:
        """`metrics.jsonl` as floats, indexed by step. Lists over layers become columns such as `attn/entropy/layer_03`.

        Cells are NaN where a row lacks the statistic. Raises UserError if the file is damaged.
        """
        from pandas import DataFrame, Index

        rows = [flatten(row) for row in self.files.rows()]
        return DataFrame(rows, index=Index([int(row.pop("step")) for row in rows], name="step"))

    def model(self, step: int | None = None) -> GPT:
        """The weights of the newest checkpoint, or of the one after `step` updates: on the CPU, in eval mode.

        Raises UserError if there is no such checkpoint.
        """
        from stabrun.model.gpt import GPT
        from stabrun.training.checkpoint import at, load_model

        config = self.config
        path = at(self.files.checkpoints, step)
        model = GPT(config.model, config.data.seq_len, config.seed)
        load_model(path, model)
        return model.eval()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with: `encode(text)` and `decode(ids)`."""
        from stabrun.data.tokenizer import Bytes, load

        file = self.files.tokenizer_file
        if file.is_file():
            return load(file)
        if self.config.data.tokenizer == "bytes":
            return Bytes()
        raise UserError(f"{self.directory}: {file.name} is missing; the run was recorded by an earlier version.")

    def sample(
        self,
        prompt: str = "\n",
        tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        step: int | None = None,
    ) -> str:
        """The prompt continued by `tokens` tokens. Deterministic for a seed; temperature 0 takes the most likely one.

        Raises UserError at an argument out of bounds, or a prompt that is empty or longer than the context.
        """
        from stabrun.training.generate import generate

        tokenizer = self.tokenizer()
        model = self.model(step)
        ids = generate(
            model,
            tokenizer.encode(prompt).tolist(),
            tokens,
            context=self.config.data.seq_len,
            vocabulary=tokenizer.size,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        return tokenizer.decode(ids)

    def evaluate(self, overrides: Sequence[str] = (), step: int | None = None) -> Evaluation:
        """Mean loss of a checkpoint on the run's validation sequences, or on the whole text that `overrides` name.

        Args:
            overrides: keys of `data`, such as `["data=local", "data.path=FILE"]`.
            step: the checkpoint; the newest by default.
        """
        from stabrun.training.evaluate import evaluate, text_windows, validation_windows

        config = self.config
        model = self.model(step)
        if overrides:
            return evaluate(model, text_windows(config, overrides, self.tokenizer()))
        return evaluate(model, validation_windows(config, self.files))


class Study:
    """A study directory. Raises UserError if the directory holds no study."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = StudyDir(self.directory)
        if not self.files.is_study():
            raise UserError(f"{directory}: not a study directory: {self.files.plan_file.name} is missing.")

    def __repr__(self) -> str:
        return f"Study({str(self.directory)!r})"

    @property
    def summary(self) -> StudySummary:
        """What `study.json` holds. Raises UserError before a run has finished."""
        summary = self.files.summary()
        if summary is None:
            raise UserError(f"{self.directory}: no summary yet: {self.files.summary_file.name} is missing.")
        return summary

    @property
    def runs(self) -> list[Run]:
        """The finished runs, in the order of `results.csv`."""
        return [Run(self.files.run(run_id).path) for run_id in self.results().index]

    def results(self) -> DataFrame:
        """`results.csv`, one row per finished run, indexed by `run_id`."""
        from pandas import read_csv

        if not self.files.results_file.is_file():
            raise UserError(f"{self.directory}: no results yet: {self.files.results_file.name} is missing.")
        return read_csv(self.files.results_file, index_col="run_id", dtype={"run_id": str, "arm": str, "variant": str})


def train(config: Config) -> Run:
    """Train a run to its end, or resume it from its checkpoint, as `stabrun train` does. Divergence raises nothing.

    Raises UserError if the configuration, its data or its run directory do not allow it.
    """
    from stabrun.training.offline import write_run
    from stabrun.training.run import train

    summary, run = train(config), Run(run_dir(config))
    write_run(config.tracker, run.files, summary)
    return run


load_run, load_study = Run, Study


def judge(
    losses: ArrayLike,
    steps: ArrayLike | None = None,
    lr: ArrayLike | None = None,
    grad_norm: ArrayLike | None = None,
    val_loss: ArrayLike | None = None,
) -> Verdict:
    """The verdict on a loss curve, as `stabrun judge` gives it for a file.

    Args:
        losses: training losses `[n]` in the order of training; NaN and infinity are divergences.
        steps: their steps `[n]`, ascending; 0, 1, 2, … by default.
        lr: learning rates `[n]`, which show where a schedule begins again.
        grad_norm: gradient norms `[n]`; NaN and infinity are divergences.
        val_loss: validation losses `[n]`, NaN at steps without a validation.

    Raises UserError if the shapes differ, or the steps do not ascend.
    """
    import numpy as np

    from stabrun.verdict.judge import Judge

    columns = {"train/loss": losses, "step": steps, "train/lr": lr, "grad/norm": grad_norm, "val/loss": val_loss}
    arrays = {key: np.asarray(values, dtype=float) for key, values in columns.items() if values is not None}
    shape = arrays["train/loss"].shape
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape != shape:
            raise UserError(f"judge: {name} has shape {array.shape}; all arrays must have the shape [n] of the losses.")
    arrays.setdefault("step", np.arange(len(arrays["train/loss"]), dtype=float))
    if not (np.diff(arrays["step"]) > 0).all():
        raise UserError("judge: steps must ascend. Judge the parts of a curve whose steps begin again one by one.")
    fold = Judge()
    for values in zip(*(array.tolist() for array in arrays.values()), strict=True):
        row = dict(zip(arrays, values, strict=True))
        if math.isnan(row.get("val/loss", 0.0)):
            del row["val/loss"]
        fold.add(row)
    return fold.conclude()
