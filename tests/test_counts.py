"""What a training step does, in counts that do not depend on the machine: operators, tensors made, and their bytes.

The limits are the counts of today, so that a change that needs more has to say so here. Waits and graphs are counted in
test_synchronization.py and test_compilation.py; times are in docs/benchmarks.md.
"""

import pytest
import torch
from helpers import a_trainer, configured
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counts(TorchDispatchMode):
    """Operators, and tensors with memory of their own that they made."""

    def __init__(self):
        super().__init__()
        self.operators, self.tensors, self.bytes = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {memory._cdata for memory in memories((args, kwargs))}
        made = {memory._cdata: memory.nbytes() for memory in memories(result) if memory._cdata not in given}
        self.operators += not function.is_view
        self.tensors += len(made)
        self.bytes += sum(made.values())
        return result


def memories(values):
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def of_a_step(number, *words):
    """The counts of step `number` at nano, after two others."""
    trainer = a_trainer(configured("model=nano", "tracker=none", "train.threads=1", *words))
    for before in range(2):
        trainer.step(before).read()
    with Counts() as counts:
        trainer.step(number).read()
    return counts


def test_what_is_counted():
    with Counts() as counts:
        x = torch.zeros(8)
        (x.view(2, 4) + 1).add_(1).exp().sum()
    assert (counts.operators, counts.tensors, counts.bytes) == (5, 4, 3 * 32 + 4)


PLAIN, QUICK, SLOW = "observe.every=0", "observe.slow_every=0", "observe.slow_every=1"
LIMITS = {
    PLAIN: (243, 268, 66.4),
    QUICK: (341, 333, 66.7),
    SLOW: (652, 586, 77.4),
}
"""Operators that are not views, tensors made, and their MB: without, with quick, and with all statistics."""


@pytest.mark.parametrize(("words", "limits"), LIMITS.items())
def test_a_step_does_no_more_than_before(words, limits):
    counts = of_a_step(2, words)
    found = counts.operators, counts.tensors, counts.bytes / 1e6
    assert all(count <= limit for count, limit in zip(found, limits, strict=True)), found
