"""`stabrun.watch` on two ranks, with DDP and FSDP2: the record is that of one process with the whole batch."""

import math
import threading
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_watch import VOCAB, Model, rows_of
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import stabrun
from stabrun.record.metrics import METRICS, STEP

RANKS, STEPS, CLIP = 2, 3, 0.1
SHARES = (3, 6), (2, 9)  # sequences and tokens of each rank's part of a batch: the parts are not equal


def a_model(recompute=None):
    """Every weight that learns is used, as DDP demands."""
    torch.manual_seed(0)
    model = Model(recompute, twice=False)
    for layer in model.layers:
        layer.unused.requires_grad_(False)
    return model


def shares(step, part):
    """The parts of a micro-batch."""
    generator = torch.Generator().manual_seed(100 * step + part)
    return [torch.randint(VOCAB, shape, generator=generator) for shape in SHARES]


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def trained(model, watch=None, rank=None, accumulate=1, clip=CLIP, defer=None, as_loss=lambda loss: loss):
    """The losses of a loop on a rank's part of the batches, or if that is None on the whole batch.

    The loss of a batch is the mean of those of its parts. In the context `defer` ranks do not exchange gradients.
    """
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for step in range(STEPS):
        losses.append(torch.zeros(()))
        for part in range(accumulate):
            own = shares(step, part)
            own = own if rank is None else own[rank : rank + 1]
            for tokens in own:
                with nullcontext() if defer is None or part == accumulate - 1 else defer():
                    loss = loss_of(model, tokens) / (accumulate * len(own))
                    loss.backward()
                losses[-1] += loss.detach()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if watch:
            watch.step(loss=as_loss(losses[-1]))
        optimizer.zero_grad()
    return [float(loss) for loss in losses]


def a_watch(model, directory=None, every=1, **options):
    return stabrun.watch(model, directory, every, slow_every=options.pop("slow_every", 1), quiet=True, **options)


# What each rank runs. A function is a case; what it returns is saved for each rank.


def sharded(model):
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model):
    """FSDP2 on a mesh of two dimensions (HSDP), of which one repeats the weights."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard")))


def watched(place, rank, wrap, first, recompute=None, **options):
    """Losses and weights without and with watching; `first`: the model is watched before it is wrapped."""
    ends = []
    for watching in (False, True):
        model = a_model(recompute)
        watch = a_watch(model, place) if watching and first else None
        model = wrap(model)
        watch = a_watch(model, place) if watching and not first else watch
        defer = model.no_sync if wrap is DistributedDataParallel else None
        if wrap is sharded and options.get("accumulate", 1) > 1:
            defer = Deferred(model)
        losses = trained(model, watch, rank, defer=defer, **options)
        if watch:
            watch.close()
        ends.append((losses, [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]))
    return ends


class Deferred:
    """`no_sync` of FSDP2."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        return self

    def __enter__(self):
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_):
        self.model.set_requires_gradient_sync(True)


def case(wrap, **options):
    return lambda place, rank: watched(place, rank, wrap, **options)


EQUAL = {  # name of a case → it, and the run of one process that it is equal to
    "ddp": (case(DistributedDataParallel, first=True), {}),
    "ddp, no_sync": (case(DistributedDataParallel, first=False, accumulate=2), {"accumulate": 2}),
    "ddp, not clipped, loss as number": (
        case(DistributedDataParallel, first=True, clip=None, as_loss=float),
        {"clip": None},
    ),
    "fsdp2": (case(sharded, first=True), {}),
    "fsdp2, no_sync": (case(sharded, first=False, accumulate=2), {"accumulate": 2}),
    "fsdp2, not clipped, recomputed": (case(sharded, first=False, recompute=False, clip=None), {"clip": None}),
    "fsdp2, recomputed by reentrant": (case(sharded, first=True, recompute=True), {}),
    "hsdp": (case(replicated, first=False), {}),
}


def number_or_tensor(place, rank):
    """One rank gives its losses as numbers, and the validation loss is known to the other one alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stabrun.watching.watch.on_host", lambda tensor: False)  # tensors stay, as on a GPU
        watch = a_watch(a_model(), place, every=3, slow_every=3)
        for step in range(5):
            loss = 1.0 + step + 2 * rank
            facts = {} if rank else {"val_loss": torch.tensor(0.5 + step)}
            watch.step(loss=loss if rank else torch.tensor(loss), **facts)
        watch.close()
    return watch.verdict


def rising():
    """The losses of a run that diverges."""
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    return [3 + 3 * math.exp(-n / 20) + 0.01 * x + max(0, n - 120) / 20 for n, x in enumerate(noise)]


def judged(place, rank, parts=((0, 110), (110, 200))):
    """A run that is continued from a record that the first rank alone has. The ranks' losses differ."""
    stopped, change = [], {None: 0.0, 0: -0.5, 1: 0.5}[rank]
    for first, last in parts:
        watch = a_watch(a_model(), place, every=10, slow_every=0, first_step=first, on_verdict="stop")
        for step in range(first, last):
            watch.step(loss=rising()[step] + change, lr=0.1)
            if watch.stopped:
                stopped.append(step)
                break
        watch.close()
    return stopped, watch.verdict


class WithLoss(nn.Module):
    """A model that returns its loss; the output of one of its modules is multiplied by a factor."""

    def __init__(self):
        super().__init__()
        self.model, self.factor = a_model(), 1.0
        self.model.layers[1].up.register_forward_hook(lambda module, args, output: output * self.factor)

    def forward(self, tokens):
        return {"loss": loss_of(self.model, tokens)}


def located(place, rank, wrap):
    """The output of a module is not finite in step 2, on the second rank."""
    model = WithLoss()
    watch = a_watch(model, place, every=2, slow_every=2, on_nonfinite="locate")
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-3)
    watch.guard(optimizer)
    for step in range(4):
        model.factor = math.inf if rank == 1 and step == 2 else 1.0
        loss = wrapped(shares(step, 0)[rank])["loss"]
        loss.backward()
        optimizer.step()
        watch.step(loss=loss)
        optimizer.zero_grad()
    watch.close()
    finite = all(bool(getattr(p, "to_local", lambda p=p: p)().isfinite().all()) for p in wrapped.parameters())
    return watch.faults, finite, [guard.skipped for guard in watch.guards]


def located_by_loss(place, rank):
    """A loss of one rank alone is infinite, without an update: as if a scaler had left it out."""
    model = sharded(a_model())
    watch = a_watch(model, place, every=2, slow_every=2, on_nonfinite="locate", loss_of=lambda output: output.sum())
    for step in range(2):
        loss_of(model, shares(step, 0)[rank])
        watch.step(loss=math.inf if rank and step else 1.0)
    watch.close()
    return watch.faults


def refusal(make):
    try:
        make()
    except stabrun.UserError as error:
        return str(error)
    return None


def tensor_parallel(model):
    return parallelize_module(model, init_device_mesh("cpu", (RANKS,)), {"layers.*.up": ColwiseParallel()})


def tensor_parallel_and_sharded(model):
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"layers.*.up": ColwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def flat(model):
    return FullyShardedDataParallel(model.requires_grad_(), device_id=torch.device("cpu"))


def flat_with_original_parameters(model):
    return FullyShardedDataParallel(model.requires_grad_(), device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS = {  # → a part of the sentence that refuses it
    flat: "wrapped in FullyShardedDataParallel, which hides its weights; use fully_shard",
    flat_with_original_parameters: "wrapped in FullyShardedDataParallel",
    tensor_parallel: "layers.0.up.weight is split over ranks by tensor parallelism",
    tensor_parallel_and_sharded: "layers.0.up.weight is split over ranks by tensor parallelism",
}


def wrapped_later(wrap):
    """Refused at the first update."""
    model = a_model()
    with a_watch(model):
        model = wrap(model)
        torch.optim.SGD(model.parameters(), 0.1).step()


def refused(place, rank):
    found = {}
    for wrap in WRAPPERS:
        found[wrap.__name__] = [
            refusal(lambda wrap=wrap: a_watch(wrap(a_model()))),
            refusal(lambda wrap=wrap: wrapped_later(wrap)),
        ]
    found["pipeline"] = refusal(lambda: a_watch(a_model().layers[0] if rank else a_model()))
    with pytest.MonkeyPatch.context() as patch:
        model = sharded(a_model())
        patch.setattr(DeviceMesh, "device_type", property(lambda mesh: "cuda"))  # as with CPUOffloadPolicy on a GPU
        found["offloaded"] = refusal(lambda: a_watch(model))
    place.mkdir(exist_ok=True)
    (place / "config.yaml").touch()
    found["record"] = refusal(lambda: a_watch(a_model(), place))
    return found


def resources(place, rank):
    """Threads and groups of processes before and while a model is watched."""

    def count():
        return threading.active_count(), len(dist.distributed_c10d._world.pg_map)

    before = count()
    watch = a_watch(a_model(), place, on_nonfinite="locate")
    watch.step(loss=1.0)
    during = count()
    watch.close()
    return before, during


def dying(place, rank):
    """The second rank fails in step 5; the last case, as it ends the group. Returns the error and the losses."""
    model, losses = a_model(), []

    def forbidden(*_, **__):
        raise AssertionError("an exchange with a rank that is somewhere else")

    with pytest.MonkeyPatch.context() as patch:
        try:
            with a_watch(model, place, every=3, slow_every=3) as watch:
                wrapped = DistributedDataParallel(model)
                optimizer = torch.optim.SGD(wrapped.parameters(), 1e-3)
                for step in range(8):
                    if step == 5:
                        patch.setattr(dist, "all_gather", forbidden)
                    if rank and step == 5:
                        raise ValueError("planted")
                    loss = loss_of(wrapped, shares(step, 0)[rank])
                    loss.backward()
                    optimizer.step()
                    watch.step(loss=loss)
                    losses.append(float(loss))
        except (ValueError, RuntimeError) as error:
            return type(error).__name__, losses
    return None


CASES = {name: run for name, (run, _) in EQUAL.items()} | {
    "number or tensor": number_or_tensor,
    "judged": judged,
    "located, ddp": lambda place, rank: located(place, rank, DistributedDataParallel),
    "located, fsdp2": lambda place, rank: located(
        place, rank, lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (2,)))
    ),
    "located by loss": located_by_loss,
    "refused": refused,
    "resources": resources,
    "dying": dying,
}


def on_rank(rank, place):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": RANKS, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", **options)
    results = {}
    for name, run in CASES.items():
        try:
            results[name] = run(place / name, rank)
        except Exception as error:
            raise RuntimeError(name) from error
    torch.save(results, place / str(rank))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_rank, (place,), nprocs=RANKS)
    return place


@pytest.fixture
def results(place):
    """Of each case on each rank."""
    ranks = [torch.load(place / str(rank), weights_only=False) for rank in range(RANKS)]
    return {name: [results[name] for results in ranks] for name in CASES}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", EQUAL)
def test_the_record_is_that_of_the_whole_batch(place, tmp_path, double, name):
    model = a_model()
    watch = a_watch(model, tmp_path)
    trained(model, watch, **EQUAL[name][1])
    watch.close()
    expected, rows = rows_of(tmp_path), rows_of(place / name)
    assert len(rows) == len(expected) == STEPS
    for got, row in zip(rows, expected, strict=True):
        assert got.keys() == row.keys()
        for key in row:
            assert got[key] == pytest.approx(row[key], rel=1e-5, abs=1e-12), key
    measured = {metric.key.split("{")[0] for metric in METRICS.values() if metric.source != STEP}
    assert all(any(key.startswith(start) for key in rows[0]) for start in measured)


@pytest.mark.parametrize("name", EQUAL)
def test_watching_changes_no_bit(results, name):
    for rank in results[name]:
        (losses, weights), (watched_losses, watched_weights) = rank
        assert losses == watched_losses
        assert all(map(torch.equal, weights, watched_weights))


def test_losses_are_averaged_over_the_ranks_that_give_them(place, results):
    rows = rows_of(place / "number or tensor")
    assert [row["train/loss"] for row in rows] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert [row["val/loss"] for row in rows] == [0.5, 1.5, 2.5, 3.5, 4.5]
    first, second = results["number or tensor"]
    assert first == second


def test_all_ranks_have_the_same_verdict_and_stop_at_the_same_step(results, tmp_path):
    first, second = results["judged"]
    stopped, verdict = judged(tmp_path, None, parts=((0, 200),))
    assert first == second
    assert first[0] == stopped != []
    assert (first[1].verdict, first[1].first_bad_step) == ("diverged", verdict.first_bad_step)


@pytest.mark.parametrize("name", ["located, ddp", "located, fsdp2"])
def test_ranks_locate_and_guard_together(place, results, name):
    """The first one tells what the second one has found."""
    assert results[name] == [(1, True, [1])] * RANKS
    events = {event["event"]: event for event in stabrun.load_run(place / name).events}
    assert events["nonfinite"]["step"] == events["skipped"]["step"] == 2
    assert events["nonfinite"]["fault"].startswith("on rank 1: The output of model.layers.1.up (Linear) was the first")


def test_ranks_locate_together_although_one_loss_alone_is_not_finite(results):
    assert results["located by loss"] == [1, 1]


def test_what_is_split_otherwise_is_refused_on_all_ranks(results):
    for found in results["refused"]:
        for wrap, text in WRAPPERS.items():
            assert all(text in sentence for sentence in found[wrap.__name__]), wrap
        assert "embed.weight is kept on cpu and used on cuda; do without CPUOffloadPolicy" in found["offloaded"]
        assert "the ranks have different modules" in found["pipeline"]
        assert "holds a run of `stabrun train`" in found["record"]


def test_no_thread_and_no_group_is_made(results):
    for before, during in results["resources"]:
        assert before == during


def test_a_rank_that_fails_does_not_wait_for_the_others(place, results):
    """Each ends with an error of its own: the second one with what was planted, the first one as its peer is gone.

    Nothing is exchanged after step 3: the loss of step 4 that is written is that of the first rank's part.
    """
    (first, own), (second, other) = results["dying"]
    assert (first, second) == ("RuntimeError", "ValueError")
    means = [(a + b) / 2 for a, b in zip(own, other, strict=True)]
    rows = rows_of(place / "dying")
    assert [row["train/loss"] for row in rows] == pytest.approx([*means[:4], own[4]], rel=1e-12)
    assert stabrun.load_run(place / "dying").events[-1]["event"] == "failed"


def test_models_without_values_or_on_several_devices_are_refused():
    with torch.device("meta"):
        model = Model()
    with pytest.raises(stabrun.UserError, match="parameters on the meta device; watch it after they have values"):
        a_watch(model)
    a_watch(model.to_empty(device="cpu")).close()
    with FakeTensorMode():
        spread = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        spread[1].weight = nn.Parameter(torch.empty(2, 2, device="cuda:1"))
        with pytest.raises(stabrun.UserError, match=r"lies on several devices \(cpu, cuda:1\); only one can be"):
            a_watch(spread)


def test_data_parallel_is_refused():
    with pytest.raises(stabrun.UserError, match="wrapped in DataParallel"):
        a_watch(nn.DataParallel(a_model()))
