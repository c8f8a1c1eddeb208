"""`stabrun eval`: the loss of a checkpoint on its validation split, and on other text."""

import json
import math

import helpers
import pytest
import torch
from helpers import tiny

import stabrun
from stabrun.config import UserError
from stabrun.model import switches
from stabrun.model.gpt import GPT
from stabrun.training.evaluate import evaluate
from stabrun.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval") / "run"
    train(tiny(f"run_dir={directory}"))
    return stabrun.load_run(directory)


def surprise(model, tokens, length):
    """Mean −log p of each token but the first, in windows of `length`, by one forward pass for each token."""
    nats = []
    for place in range(1, len(tokens)):
        start = (place - 1) // length * length
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:place]]))[0, -1]
        nats.append(-float(logits.log_softmax(-1)[tokens[place]]))
    return sum(nats) / len(nats)


def test_the_own_validation_split_gives_the_recorded_loss(run):
    found = run.evaluate()
    assert found.loss == pytest.approx(run.summary["val_loss"], rel=1e-6)
    assert found.perplexity == pytest.approx(run.summary["val_perplexity"], rel=1e-6)
    assert found.tokens == 4 * 16
    assert run.evaluate(step=30) == found


@pytest.mark.parametrize("text", ["And God said, Let there be light: and there was light.", "Seventeen letters", "ab"])
def test_all_of_another_text_is_scored(run, tmp_path, text):
    (tmp_path / "other.txt").write_text(text)
    found = run.evaluate(["data=local", f"data.path={tmp_path / 'other.txt'}"])
    assert found.tokens == len(text) - 1
    assert found.loss == pytest.approx(surprise(run.model(), list(text.encode()), 16), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_documents_are_separated_as_in_training(run, tmp_path):
    documents = ["one and two", "three"]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    found = run.evaluate(["data=local", f"data.path={tmp_path / 'other.jsonl'}", r"data.separator='\n'"])
    tokens = list(b"one and two\nthree\n")
    assert found.loss == pytest.approx(surprise(run.model(), tokens, 16), rel=1e-5)


def test_a_bpe_run_is_scored_with_its_own_tokenizer(tmp_path):
    """A BPE that was trained on the other text would need fewer tokens."""
    train(tiny("data.tokenizer=bpe", "model.vocab_size=300", "train.steps=3", f"run_dir={tmp_path / 'run'}"))
    (tmp_path / "other.txt").write_text("zqx zqx " * 50)
    run = stabrun.load_run(tmp_path / "run")
    tokens = run.tokenizer().encode("zqx zqx " * 50).tolist()
    found = run.evaluate(["data=local", f"data.path={tmp_path / 'other.txt'}"])
    assert found.tokens == len(tokens) - 1
    assert found.loss == pytest.approx(surprise(run.model(), tokens, 16), rel=1e-5)


MISTAKES = [
    (["data=local", "data.path=nowhere"], "nowhere"),
    (["data.path=nowhere"], "data=local"),
    (["data=paper"], "data.name=paper"),
    (["data.seq_len=8"], "data.seq_len"),
    (["data.tokenizer=bpe"], "data.tokenizer"),
    (["optim.lr=1"], "optim.lr=1"),
    (["data.pth=x"], "data.path"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_user_errors_are_sentences(run, words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        run.evaluate(words)


def test_a_text_of_one_token_is_refused(run, tmp_path):
    (tmp_path / "other.txt").write_text("a")
    with pytest.raises(UserError, match="two tokens"):
        run.evaluate(["data=local", f"data.path={tmp_path / 'other.txt'}"])


def test_data_that_changed_since_training_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("What was and what will be. " * 100)
    train(tiny("data=local", f"data.path={tmp_path / 'text.txt'}", "train.steps=3", f"run_dir={tmp_path / 'run'}"))
    (tmp_path / "text.txt").write_text("What was and what is now. " * 100)
    with pytest.raises(UserError, match="other data"):
        stabrun.load_run(tmp_path / "run").evaluate()


def test_the_command_prints_loss_and_perplexity(run, tmp_path, capsys):
    status, out, _ = helpers.run(capsys, "eval", run.directory, "--step", "30")
    found = run.evaluate()
    assert status == 0
    assert out == f"validation loss {found.loss:.4f}, perplexity {found.perplexity:.2f} on 64 tokens\n"
    (tmp_path / "other.txt").write_text("abc")
    status, out, _ = helpers.run(capsys, "eval", run.directory, "data=local", f"data.path={tmp_path / 'other.txt'}")
    assert (status, out.split()[0]) == (0, "loss")
    status, out, err = helpers.run(capsys, "eval", run.directory, "--step", "7")
    assert (status, out) == (2, "")
    assert "step=7" in err


def test_a_long_output_is_computed_in_parts(monkeypatch):
    model, calls = GPT(tiny().model, 16), []
    model.head.register_forward_hook(lambda *_: calls.append(0))
    windows = [torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))]
    whole = evaluate(model, windows)
    assert len(calls) == 1
    monkeypatch.setattr(switches, "LOGITS", 4 * 4 * 256)
    assert evaluate(model, windows).loss == pytest.approx(whole.loss, rel=1e-6)
    assert len(calls) == 1 + 4
