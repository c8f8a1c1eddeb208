"""The squared ReLU against autograd's own formula, and against finite differences."""

import pytest
import torch
import torch.utils.checkpoint

from stabrun.model.functional import relu2


def with_gradient(function, x, gradient):
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(gradient)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_squared_relu_is_autograds_to_the_bit(dtype):
    x, gradient = torch.randn(2, 33, 65, dtype=torch.float64, generator=torch.manual_seed(1)).to(dtype)
    expected = with_gradient(lambda x: torch.relu(x).square(), x, gradient)
    compiled = torch.compile(relu2, fullgraph=True, backend="aot_eager")
    for function in (relu2, compiled):
        assert all(map(torch.equal, with_gradient(function, x, gradient), expected))


def test_squared_relu_has_the_gradient_of_finite_differences():
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(relu2, x)
    assert torch.autograd.gradcheck(lambda x: torch.utils.checkpoint.checkpoint(relu2, x, use_reentrant=False), x)
