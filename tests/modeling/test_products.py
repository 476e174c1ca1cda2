"""The product through oneDNN equals torch.mm."""

import pytest
import torch

from mask2former_plugin.modeling.layers import products
from mask2former_plugin.modeling.layers.products import product

needs_both = pytest.mark.skipif(not products._HAS_BOTH, reason="this torch has one of the two libraries only")


@pytest.fixture
def calls(monkeypatch):
    """Every product counts as large; how often oneDNN is asked."""
    seen = []
    uses = products._uses_onednn
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    monkeypatch.setattr(products, "_uses_onednn", lambda *factors: seen.append(uses(*factors)) or seen[-1])
    return seen


@needs_both
@pytest.mark.parametrize("shape", [(133, 100, 4096), (5, 7, 3), (1, 1, 1), (2, 300, 90), (0, 4, 5), (4, 5, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_exact_product(calls, shape, transposed):
    rows, common, columns = shape
    first, second = torch.rand(rows, common), torch.rand(common, columns)
    if transposed:  # as they lie in other layouts
        first, second = torch.rand(common, rows).T, torch.rand(columns, common).T
    found = product(first, second)
    assert calls == [True] and found.is_contiguous() and found.shape == (rows, columns)
    # of positive numbers: each of the sums is off by a few roundings of 6e-8
    torch.testing.assert_close(found.double(), first.double() @ second.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(calls, dtype):
    first, second = torch.rand(9, 4).to(dtype), torch.rand(4, 5).to(dtype)
    assert torch.equal(product(first, second), first @ second)
    assert calls == [False]


def test_gradients_are_not_lost(calls):
    first, second = torch.rand(9, 4, requires_grad=True), torch.rand(4, 5)
    product(first, second).sum().backward()
    torch.testing.assert_close(first.grad, second.sum(1).expand(9, -1))
    product(first.detach(), second.requires_grad_()).sum().backward()
    torch.testing.assert_close(second.grad, first.detach().sum(0)[:, None].expand(-1, 5))
    assert calls == [False, False]


def test_small_products_take_the_short_way():
    assert not products._uses_onednn(torch.rand(9, 4), torch.rand(4, 5))


@needs_both
def test_stays_in_float32_where_reduced_precision_is_off(calls):
    """The switch that inference sets, see ``full_precision``, reaches this way to oneDNN as well."""
    from mask2former_plugin.modeling.inference.tasks import full_precision

    first, second = torch.rand(64, 256), torch.rand(256, 64)
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(first.device):
            found = product(first, second)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(found.double(), first.double() @ second.double(), rtol=2e-6, atol=0)
    assert calls == [True]
