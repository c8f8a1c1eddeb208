"""A process that prepares data, in a module that imports little."""

from stabrun.config import DataConfig, ModelConfig
from stabrun.data.shards import prepare


def prepare_at_barrier(path, cache, barrier, results):
    """Wait for the other processes, prepare, and report the hash of the data."""
    barrier.wait()
    data = DataConfig(name="local", path=path, tokenizer="bpe", cache_dir=cache)
    results.put(prepare(data, ModelConfig(vocab_size=400)).manifest["hash"])
