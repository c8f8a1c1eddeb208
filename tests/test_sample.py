"""`stabrun sample`: text from a checkpoint."""

import shutil

import helpers
import pytest
import torch
from helpers import tiny

import stabrun
from stabrun.config import UserError
from stabrun.training.generate import generate
from stabrun.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on bytes, whose vocabulary is larger than its tokenizer's."""
    directory = tmp_path_factory.mktemp("sample") / "run"
    train(tiny("model.vocab_size=300", f"run_dir={directory}"))
    return stabrun.load_run(directory)


def test_greedy_text_is_the_likeliest_token_each_time(run):
    """Against a loop that asks the model for the whole context at every position."""
    model = run.model()
    tokens = list(b"In the beg")
    for _ in range(20):  # beyond the context of 16 tokens
        logits = model(torch.tensor([tokens[-16:]]))[0, -1]
        tokens.append(int(logits[:256].argmax()))
    assert run.sample("In the beg", tokens=20, temperature=0) == bytes(tokens).decode(errors="replace")


def test_a_seed_gives_the_same_text_and_another_seed_another(run):
    first, second, other = (run.sample("a", tokens=40, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    assert first.startswith("a")


def test_tokens_are_drawn_by_their_probabilities():
    """Frequencies of 4,000 draws against the softmax at that temperature, for a model of constant logits."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 9.0])  # the last token is outside the vocabulary

    def model(tokens):
        return logits.expand(1, tokens.shape[1], -1)

    for temperature, top_k, kept in ((1.0, None, 4), (0.5, None, 4), (1.0, 2, 2), (2.0, 9, 4)):
        drawn = generate(
            model, [0], 4000, context=8, vocabulary=4, temperature=temperature, top_k=top_k, seed=3
        )[1:]  # fmt: skip
        expected = (logits[:kept] / temperature).softmax(0)
        seen = torch.bincount(torch.tensor(drawn), minlength=4).double() / 4000
        assert seen[:kept].tolist() == pytest.approx(expected.tolist(), abs=0.03)
        assert seen[kept:].sum() == 0


def test_a_bpe_run_speaks_by_its_own_tokenizer(tmp_path):
    """The cache of prepared data is gone: the run directory is enough."""
    words = "data.tokenizer=bpe", "model.vocab_size=300", f"data.cache_dir={tmp_path / 'cache'}", "train.steps=3"
    train(tiny(*words, f"run_dir={tmp_path / 'run'}"))
    shutil.rmtree(tmp_path / "cache")
    text = stabrun.load_run(tmp_path / "run").sample("the Lord", tokens=10)
    assert text.startswith("the Lord")


MISTAKES = [
    ({"prompt": ""}, "at least one token"),
    ({"prompt": "x" * 17}, "17 tokens.*16.*data.seq_len"),
    ({"tokens": 0}, "tokens=0"),
    ({"temperature": -1.0}, "temperature=-1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": 0}, "top_k=0"),
    ({"seed": -1}, "seed=-1"),
    ({"step": 5}, "step=5"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[str(arguments) for arguments, _ in MISTAKES])
def test_user_errors_are_sentences(run, arguments, named):
    with pytest.raises(UserError, match=named):
        run.sample(**arguments)


def test_a_prompt_with_unknown_tokens_is_refused(run, tmp_path):
    from tokenizers import Tokenizer, models

    directory = shutil.copytree(run.directory, tmp_path / "run")
    Tokenizer(models.WordLevel({"word": 0}, unk_token="?")).save(str(directory / "tokenizer.json"))
    with pytest.raises(UserError, match="strange"):
        stabrun.load_run(directory).sample("strange")


def test_a_diverged_checkpoint_says_so(run):
    model = run.model()
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate(model, [1], 1, context=16, vocabulary=256)


def test_a_run_of_an_earlier_version_lacks_its_tokenizer(run, tmp_path):
    directory = shutil.copytree(run.directory, tmp_path / "run")
    (directory / "tokenizer.json").unlink()
    loaded = stabrun.load_run(directory)
    assert loaded.sample("a", tokens=5) == run.sample("a", tokens=5)
    _, config = (directory / "config.yaml").read_text().split("\n", 1)  # without its checksum
    (directory / "config.yaml").write_text(config.replace("tokenizer: bytes", "tokenizer: bpe"))
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        loaded.sample("a")


def test_the_command_prints_the_text(run, capsys):
    words = "--prompt", "ab", "--tokens", 9, "--temperature", 0.5, "--top-k", 4, "--seed", 3, "--step", 30
    status, out, _ = helpers.run(capsys, "sample", run.directory, *words)
    assert (status, out) == (0, run.sample("ab", 9, 0.5, 4, 3, 30) + "\n")
    status, out, err = helpers.run(capsys, "sample", run.directory, "--tokens", 0)
    assert (status, out) == (2, "")
    assert err == "stabrun: tokens=0: must be at least 1.\n"
