"""A guarded update is either the one without a guard, to the bit, or none."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import LBFGS, SGD, AdamW, SparseAdam
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from stabrun.watching.guard import Guard

OPTIMIZERS = {
    "fused": partial(AdamW, lr=0.1, fused=True),
    "foreach": partial(AdamW, lr=0.1, foreach=True),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.fixture(params=OPTIMIZERS)
def pair(request):
    """A model and its optimizer, and the same again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    return [(m, OPTIMIZERS[request.param](m.parameters())) for m in (model, twin)]


def loss_of(model, batch):
    return model(torch.randn(8, 3, generator=torch.Generator().manual_seed(batch))).square().mean()


def backward(model, optimizer, batch, bad=None):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    if bad is not None:
        list(model.parameters())[2].grad.view(-1)[5] = bad


def equal(first, second):
    """Whether two nested values are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def states(model, optimizer):
    return [model.state_dict(), optimizer.state_dict()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_update_is_left_out_and_no_other(pair, bad):
    """The twin does without the second and the third batch."""
    (model, optimizer), (twin, other) = pair
    guard = Guard(optimizer)
    for batch in range(5):
        backward(model, optimizer, batch, bad if batch in (1, 2) else None)
        optimizer.step()
        assert guard.last_skipped == (batch in (1, 2))
        if batch not in (1, 2):
            backward(twin, other, batch)
            other.step()
        assert equal(states(model, optimizer), states(twin, other))
    assert guard.skipped == 2


def test_the_first_update_creates_no_state(pair):
    (model, optimizer), _ = pair
    Guard(optimizer)
    backward(model, optimizer, 0, float("nan"))
    optimizer.step()
    assert not optimizer.state


def test_large_gradients_are_finite(pair):
    """Their L2 norm is not."""
    (model, optimizer), _ = pair
    guard = Guard(optimizer)
    backward(model, optimizer, 0, 3e38)
    optimizer.step()
    assert not guard.skipped


def test_parameters_without_gradients(pair):
    (model, optimizer), _ = pair
    guard = Guard(optimizer)
    optimizer.step()
    model[0].requires_grad_(False)
    backward(model, optimizer, 0, None)
    optimizer.step()
    assert not guard.skipped


@pytest.mark.parametrize("known", [True, False])
def test_a_norm_that_the_caller_has(pair, known):
    """It decides alone, unless the caller has none for this step."""
    (model, optimizer), _ = pair
    norm = torch.tensor(float("inf"))
    guard = Guard(optimizer, lambda: norm if known else None)
    backward(model, optimizer, 0)
    optimizer.step()
    assert guard.skipped == known


@pytest.mark.parametrize("bad", [1, 3])
def test_a_closure_is_evaluated_once_and_first(pair, bad):
    (model, optimizer), (twin, other) = pair
    guard, calls = Guard(optimizer), []
    for batch in range(4):

        def closure(batch=batch):
            calls.append(batch)
            backward(model, optimizer, batch, float("nan") if batch == bad else None)
            return batch

        assert optimizer.step(closure=closure) == batch
        if batch != bad:
            backward(twin, other, batch)
            other.step()
        assert equal(states(model, optimizer), states(twin, other))
    assert calls == [0, 1, 2, 3]
    assert guard.skipped == 1


def test_an_optimizer_that_evaluates_its_closure_often():
    """LBFGS gets each evaluation that it asks for."""
    ends, counts = [], []
    for guarded in (True, False):
        torch.manual_seed(0)
        model, calls = nn.Linear(3, 2), []
        optimizer = LBFGS(model.parameters(), max_iter=5)
        if guarded:
            Guard(optimizer)

        def closure(model=model, optimizer=optimizer, calls=calls):
            calls.append(None)
            backward(model, optimizer, 0)
            return loss_of(model, 0)

        optimizer.step(closure)
        ends.append(model.weight)
        counts.append(len(calls))
    assert torch.equal(*ends)
    assert counts[0] == counts[1] > 1


@pytest.mark.parametrize("guard_first", [True, False])
def test_schedulers_before_and_after(pair, guard_first):
    """Two schedulers: the second one looks at what the first one did. None of them warns that a step was missed."""
    (model, optimizer), _ = pair

    def schedulers():
        return LambdaLR(optimizer, lambda step: 1 / (1 + step)), ExponentialLR(optimizer, 0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if guard_first:
            guard, (first, second) = Guard(optimizer), schedulers()
        else:
            (first, second), guard = schedulers(), Guard(optimizer)
        for batch in range(3):
            backward(model, optimizer, batch, float("nan") if batch == 0 else None)
            optimizer.step()
            first.step()
            second.step()
    assert guard.skipped == 1
    guard.remove()
    backward(model, optimizer, 0, float("nan"))
    optimizer.step()
    assert model[2].weight.isnan().any()


def test_removal_restores_the_attribute(pair):
    (_, optimizer), _ = pair
    Guard(optimizer).remove()
    assert "step" not in vars(optimizer)
    LambdaLR(optimizer, lambda step: 1.0)
    before = optimizer.step
    Guard(optimizer).remove()
    assert optimizer.step is before


def test_with_a_scaler(pair):
    """It leaves out the update with infinity, lowers its scale, and goes on: as it does without a guard."""
    ends = []
    for (model, optimizer), guarded in zip(pair, (True, False), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        if guarded:
            Guard(optimizer)
        for batch in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if batch == 1:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        ends.append([model.state_dict(), scaler.get_scale()])
    assert equal(*ends)
    assert ends[0][1] == 512.0


def test_sparse_gradients():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = SparseAdam(model.parameters())
    guard = Guard(optimizer)
    for factor in (1.0, float("nan")):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        (model(torch.tensor([1, 1, 3])).sum() * factor).backward()
        optimizer.step()
        assert torch.equal(before, model.weight) == (factor != 1.0) == guard.last_skipped


def on_rank(rank, place):
    """One bad gradient, on the second rank: of a sharded parameter, and of one that is on both."""
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    decided = []
    for sharded in (True, False):
        weight, gradient = torch.ones(4, 2), torch.ones(4, 2)
        gradient[3, 1] = float("nan")  # in the half of the second rank
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            parameter = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        else:
            parameter = nn.Parameter(weight)
            parameter.grad = gradient if rank else torch.ones(4, 2)
        optimizer = SGD([parameter], lr=0.1)
        guard = Guard(optimizer, group=None if sharded else dist.group.WORLD)
        optimizer.step()
        kept = parameter.to_local() if sharded else parameter
        decided.append((guard.skipped, bool((kept == 1).all())))
    torch.save(decided, f"{place}/{rank}")
    dist.destroy_process_group()


def test_ranks_decide_alike(tmp_path):
    torch.multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / str(rank)) for rank in range(2)] == [[(1, True)] * 2] * 2
