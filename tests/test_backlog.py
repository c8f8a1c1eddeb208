"""A disk that fails while a model is watched: the training goes on, and is recorded once there is space."""

import pytest
import torch
from disks import PAGE, disk
from torch import nn

import stabrun
from stabrun.record.run_dir import RunDir
from stabrun.watching import backlog


def loop(watch, model, optimizer, steps):
    for _ in range(steps):
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss=loss)


def begun(out):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return stabrun.watch(model, out=out, every=1, quiet=True), model, optimizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    watch, model, optimizer = begun(out)
    loop(watch, model, optimizer, 60)
    watch.close()
    return (out / "metrics.jsonl").read_bytes(), model[0].weight


def test_training_goes_on_and_is_recorded_once_there_is_space(whole, capsys):
    with disk(6 * PAGE) as small:
        watch, model, optimizer = begun(small.path / "run")
        loop(watch, model, optimizer, 50)
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert f"{small.path}/run/metrics.jsonl: No space left on device. Training goes on" in err
        small.resize(1_000_000)
        loop(watch, model, optimizer, 10)
        assert (
            capsys.readouterr().err == f"stabrun: watch: {small.path}/run: all steps so far are recorded after all.\n"
        )
        assert watch.close()["status"] == "complete"
        assert (small.path / "run" / "metrics.jsonl").read_bytes() == whole[0]
        assert RunDir(small.path / "run").summary()["steps"] == 60
    assert torch.equal(model[0].weight, whole[1])


def test_a_disk_that_stays_full_ends_the_recording_and_not_the_training(whole, capsys, monkeypatch):
    monkeypatch.setattr(backlog, "KEPT", 20)
    with disk(6 * PAGE) as small:
        watch, model, optimizer = begun(small.path / "run")
        loop(watch, model, optimizer, 60)
        assert watch.close()["steps"] == 60
        first, second, last = capsys.readouterr().err.splitlines()
        assert "up to 20 steps are kept" in first
        assert second.endswith("recording has ended, because 20 steps could not be written.")
        assert "No space left on device. The end of the record" in last
        assert whole[0].startswith(b"".join((small.path / "run" / "metrics.jsonl").read_bytes().splitlines(True)[:-1]))
    assert torch.equal(model[0].weight, whole[1])
