"""Usual names of columns: steps and other clocks, losses, validation losses, gradient norms, learning rates.

Names are compared in a plain form: lower case, words joined by `_`. `Loss/train`, `loss train` and `lossTrain` are the
same name.
"""

import re
from functools import lru_cache

CLOCK, LOSS, VALIDATION, GRADIENT, RATE = "clock", "loss", "validation", "gradient", "rate"

# In order of preference. These must be whole numbers.
STEPS = (
    "step", "global_step", "trainer_global_step", "train_global_step", "iteration", "iter", "num_update", "update",
    "current_step", "completed_step", "train_step", "training_step", "optimizer_step", "optim_step", "opt_step",
    "step_num", "step_number", "num_step", "step_id", "iter_num", "num_iter", "n_iter", "niter", "itr", "it",
    "time_total_timestep", "train_iter", "training_iteration", "train_iteration", "num_iteration", "time_iteration",
    "n_update", "train_num_update", "num_timestep", "timestep", "total_timestep", "train_batch", "time_batch",
    "trainer_step", "batch_num", "n_batch", "global_step_max_step", "up", "[n]", "n/m",
)  # fmt: skip
# Clocks that may be fractions and, if they are too coarse, may repeat.
COARSE = (
    "sample", "samples_count", "sample_count", "num_sample", "consumed_sample", "seen_sample", "total_sample",
    "train_sample", "example", "num_example", "examples_seen", "images_seen", "token", "num_token", "token_count",
    "total_token", "consumed_token", "tokens_seen", "train_token", "train_tokens_seen", "num_input_tokens_seen",
    "epoch", "current_epoch", "epoch_num", "epoch_number", "train_epoch", "epoch_num_float", "n_epoch",
)  # fmt: skip
EXACT_LOSSES = ("train/loss", "loss", "train_loss")  # preferred to the others, in this order
LOSSES = (
    "train_loss", "loss", "training_loss", "loss_train", "loss_training", "train_loss_step", "training_loss_step",
    "train_step_loss", "loss_step", "step_loss", "train_batch_loss", "batch_loss", "train_loss_batch", "loss_batch",
    "train_iter_loss", "iter_loss", "total_loss", "train_total_loss", "train_loss_total", "loss_total",
    "loss_train_total", "train_loss_train_total", "total_train_loss", "loss_out", "train_loss_out",
    "reduced_train_loss", "metrics_train_loss", "train_metrics_loss", "train_main_loss", "main_loss", "lm_loss",
    "train_lm_loss", "loss_lm", "loss_train_lm", "language_model_loss", "lm_loss_value", "cross_entropy_loss",
    "train_cross_entropy_loss", "ce_loss", "train_ce_loss", "loss_ce", "loss_cross_entropy",
    "loss_train_cross_entropy", "train_loss_train_cross_entropy", "train_cross_entropy", "cross_entropy", "train_ce",
    "ce", "train_xent", "xent", "train_logloss", "logloss", "train_mlogloss", "nll_loss", "train_nll_loss",
    "train_nll", "nll", "loss_avg", "avg_loss", "average_loss", "loss_mean", "mean_loss", "train_avg_loss",
    "avg_train_loss", "average_train_loss", "train_loss_avg", "train_mean_loss", "mean_train_loss", "running_loss",
    "train_running_loss", "smooth_loss", "smoothed_loss", "train_loss_smooth", "raw_loss", "global_avg_loss",
    "loss_metrics_global_avg_loss", "loss_metrics_global_avg", "train_loss_epoch", "training_loss_epoch",
    "train_epoch_loss", "epoch_train_loss", "epoch_loss", "loss_epoch", "train_objective", "objective", "train_cost",
    "cost", "train", "value",
)  # fmt: skip
VALIDATIONS = (
    "val_loss", "valid_loss", "validation_loss", "eval_loss", "loss_val", "loss_valid", "loss_validation", "loss_eval",
    "val_loss_epoch", "validation_loss_epoch", "epoch_val_loss", "dev_loss", "loss_dev", "test_loss", "loss_test",
)  # fmt: skip
GRADIENTS = (
    "grad_norm", "train_grad_norm", "gradient_norm", "train_gradient_norm", "optim_total_grad_norm", "optim_grad_norm",
    "total_grad_norm", "global_grad_norm", "grad_norm_total", "total_norm", "gnorm", "train_gnorm", "grad_global_norm",
    "global_gradient_norm", "optimizer_grad_norm", "l2_norm_grad_global", "grad_2_0_norm_total", "actor_grad_norm",
    "train_actor_grad_norm", "gradnorm", "norm", "train_grad", "grad",
)  # fmt: skip
RATES = (
    "lr", "learning_rate", "train_lr", "train_learning_rate", "optim_lr", "optim_learning_rate", "optimizer_lr",
    "current_lr", "learning_rate_current", "optim_learning_rate_group0", "learning_rate_group0", "lr_group0",
)  # fmt: skip
HELD_OUT = frozenset((
    "val", "valid", "validation", "eval", "evaluation", "evaluator", "test", "testing", "dev", "holdout", "heldout",
))  # fmt: skip
OTHER = frozenset(("scale", "time", "runtime", "best", "min", "minimum", "lowest", "improved", "previous", "weight"))
TRAINING = frozenset(("train", "training", "trn", "fit"))
ENTROPIES = frozenset(("loss", "nll", "xent", "ce", "entropy", "logloss", "mlogloss"))
PLURAL = {
    "losses": "loss", "steps": "step", "iters": "iter", "iterations": "iteration", "updates": "update",
    "epochs": "epoch", "gradients": "gradient", "grads": "grad", "norms": "norm", "rates": "rate", "batches": "batch",
    "timesteps": "timestep", "lrs": "lr", "costs": "cost", "values": "value",
}  # fmt: skip
LAST_PLURAL = {"samples": "sample", "tokens": "token", "examples": "example"}  # but `samples_count`
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
UNIT = re.compile(r"\s*[(\[](?:nats?|bits?|s|secs?|ms|mean|avg|raw|%|k|M|B|iters?)[)\]]$")
UNUSED = ("__MIN", "__MAX")  # of a panel exported from W&B


@lru_cache(65536)
def plain(name: str) -> str:
    """The plain form of a name. `run - name`, as W&B writes it, is `name`."""
    name = name.strip()
    if name in ("[n]", "n/m"):
        return name
    name = CAMEL.sub("_", UNIT.sub("", name.rsplit(" - ", 1)[-1]))
    words = [PLURAL.get(word, word) for word in re.split(r"[\W_]+", name.lower()) if word]
    if words:
        words[-1] = LAST_PLURAL.get(words[-1], words[-1])
    return "_".join(words)


@lru_cache(65536)
def role(name: str) -> str | None:
    """What a column holds by its usual name, or None."""
    low = plain(name)
    if low in STEPS or low in COARSE:
        return CLOCK
    if low in GRADIENTS:
        return GRADIENT
    if is_rate(low):
        return RATE
    if is_validation(name):
        return VALIDATION
    return LOSS if low in LOSSES else None


def is_rate(low: str) -> bool:
    return low in RATES or low.startswith(("lr_", "learning_rate_", "train_lr_"))


@lru_cache(65536)
def is_validation(name: str) -> bool:
    """Whether a name is that of a loss on held-out data."""
    words = set(plain(name).split("_"))
    return bool(words & HELD_OUT and words & ENTROPIES and not words & OTHER)


@lru_cache(65536)
def is_part(name: str) -> bool:
    """Whether a name is that of some training loss, such as `train/box_loss`."""
    words = plain(name).split("_")
    return (
        words[-1] in ("loss", "logloss")
        and not set(words) & HELD_OUT
        and words[0] not in ("best", "min", "max", "final")
    )


def rank(name: str, usual: tuple[str, ...]) -> int:
    """The place of a name among the usual ones; their number if it is none of them."""
    low = plain(name)
    return usual.index(low) if low in usual else len(usual)


def says_training(name: str) -> bool:
    return bool(TRAINING & set(plain(name).split("_")))


def is_training_loss(name: str) -> bool:
    return role(name) == LOSS or is_part(name)
