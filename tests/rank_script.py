"""Train with every number in fp64: `python rank_script.py OVERRIDE…`, or the same under torchrun.

fp32 is replaced under its own name, so that nothing in a step rounds to it. Ranks that are started by spawn import this
file as well.
"""

import sys

import torch

torch.set_default_dtype(torch.float64)
torch.float32 = torch.float64
torch.Tensor.float = torch.Tensor.double

from stabrun.composition import compose  # noqa: E402
from stabrun.training.run import train  # noqa: E402

if __name__ == "__main__":
    train(compose(sys.argv[1:]))
