"""The tables of switch values hold exactly what the schema allows."""

import pytest

from stabrun.config import ModelConfig, keys
from stabrun.model.init import SCHEMES
from stabrun.model.switches import ACTIVATIONS, NORMS, divisors, layers, linears
from stabrun.training.schedule import SHAPES

TABLES = {
    "model.mlp.activation": ACTIVATIONS,
    "model.norm.kind": NORMS,
    "model.init": SCHEMES,
    "schedule.kind": SHAPES,
}


@pytest.mark.parametrize("path", TABLES)
def test_a_table_holds_what_the_schema_allows(path):
    (allowed,) = (key.bounds["allowed"] for key in keys() if key.path == path)
    assert set(TABLES[path]) == set(allowed)


def test_layers_are_alike_by_default():
    model = ModelConfig(n_layer=3)
    assert layers(model) == [model] * 3


@pytest.mark.parametrize(("activation", "fc1"), [("relu2", 100), ("swiglu", 200), ("geglu", 200)])
def test_gated_activations_double_the_width_of_fc1(activation, fc1):
    model = ModelConfig(d_model=16)
    model.mlp.activation, model.mlp.width = activation, 100
    assert linears(model) == {"qkv": (16, 48), "proj": (16, 16), "fc1": (16, fc1), "fc2": (100, 16)}


def test_divisors():
    for number in range(1, 200):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
    assert divisors(2**31 - 1) == [1, 2**31 - 1]
