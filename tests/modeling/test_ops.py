"""Multi-scale deformable attention: every implementation against the definition, written as loops."""

import itertools
import math
import shutil

import pytest
import torch

from mask2former_plugin.modeling.layers.deformable_attention import MSDeformAttn, reference_points
from mask2former_plugin.modeling.ops import (
    cpu,
    implementation_for,
    ms_deform_attn,
    ms_deform_attn_cpu,
    ms_deform_attn_from_logits,
    ms_deform_attn_from_logits_cpu,
    ms_deform_attn_reference,
)

SHAPES = [(3, 4), (5, 2), (1, 1)]
IMPLEMENTATIONS = [ms_deform_attn_reference, ms_deform_attn_cpu]


def arguments(dtype=torch.float64, batch=2, queries=3, heads=2, points=2, width=3, shapes=SHAPES):
    length = sum(h * w for h, w in shapes)
    value = torch.randn(batch, length, heads, width, dtype=dtype)
    # a good part outside of the maps, some of it far
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * 1.6 - 0.3
    locations[:, 0, 0, 0, 0] *= 50
    weights = torch.randn(batch, queries, heads, len(shapes), points, dtype=dtype)
    return value, locations, weights


def loops(value, shapes, locations, weights):
    """Equation 3 of Deformable DETR with bilinear interpolation written out."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = value.new_zeros(batch, queries, heads, value.shape[3])
    for b in range(batch):
        for q in range(queries):
            for h in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        x = float(locations[b, q, h, level, p, 0]) * width - 0.5
                        y = float(locations[b, q, h, level, p, 1]) * height - 0.5
                        for row in range(height):
                            for column in range(width):
                                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                                token = value[b, start + row * width + column, h]
                                output[b, q, h] += share * weights[b, q, h, level, p] * token
                    start += height * width
    return output.flatten(2)


@pytest.fixture(
    params=["queries one by one", "a head in several chunks", "two heads at a time", "all heads at once"]
)
def chunks(request, monkeypatch):
    """Runs a test with each way in which the work may be cut; the last head or chunk is a smaller one."""
    whole = cpu._Work

    class Work(whole):
        def __init__(self, value, points, places, weights, sizes):
            head = weights[0, :, 0].numel()
            limit = {
                "queries one by one": 1,
                "a head in several chunks": head * 2 // 3,
                "two heads at a time": 2 * head,
                "all heads at once": 10**6,
            }
            monkeypatch.setattr(cpu, "SAMPLES", limit[request.param])
            monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
            super().__init__(value, points, places, weights, sizes)
            assert (self.group > 1) == (request.param in ("two heads at a time", "all heads at once"))
            assert (self.chunk < self.length) == (request.param in ("queries one by one", "a head in several chunks"))

    monkeypatch.setattr(cpu, "_Work", Work)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(implementation, chunks):
    value, locations, weights = arguments()
    expected = loops(value, SHAPES, locations, weights)
    assert expected.abs().max() > 0.1  # the points hit something
    torch.testing.assert_close(implementation(value, SHAPES, locations, weights), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(implementation, chunks):
    inputs = [x.requires_grad_() for x in arguments(batch=1, queries=2)]
    assert torch.autograd.gradcheck(lambda v, l, w: implementation(v, SHAPES, l, w), inputs, eps=1e-7, atol=1e-5)


def gradients(implementation, shapes, value, locations, weights):
    inputs = [x.clone().requires_grad_() for x in (value, locations, weights)]
    output = implementation(
        value=inputs[0], spatial_shapes=shapes, sampling_locations=inputs[1], attention_weights=inputs[2]
    )
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return output, torch.autograd.grad(output, inputs, noise.to(output.dtype))


@pytest.mark.parametrize("shapes", [[(7, 9), (4, 5), (2, 3)], [(1, 6)], [(5, 1), (8, 8)]])
def test_cpu_equals_the_reference(shapes, chunks):
    inputs = arguments(queries=17, heads=3, points=4, width=5, shapes=shapes)
    output, found = gradients(ms_deform_attn_cpu, shapes, *inputs)
    expected, wanted = gradients(ms_deform_attn_reference, shapes, *inputs)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-11)


def test_from_logits(chunks):
    """Offsets in pixels and logits, against the definition: locations and softmax written out, sampled with loops."""
    value, offsets, logits = arguments(queries=5)
    offsets = (offsets * 5).requires_grad_()
    value.requires_grad_()
    logits = (logits * 3).requires_grad_()
    points = torch.rand(5, 2, dtype=torch.float64)
    sizes = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float64)
    locations = points[:, None, None, None] + offsets / sizes[:, None]
    weights = logits.flatten(3).softmax(3).view_as(logits)
    expected = ms_deform_attn_reference(value, SHAPES, locations, weights)
    by_hand = loops(value.detach(), SHAPES, locations.detach(), weights.detach())
    torch.testing.assert_close(expected, by_hand, rtol=0, atol=1e-12)
    output = ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, logits)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        ms_deform_attn_from_logits(value, SHAPES, points, offsets, logits), output, rtol=0, atol=0
    )
    leaves, noise = (value, offsets, logits), torch.randn(output.shape, dtype=torch.float64)
    for f, w in zip(torch.autograd.grad(output, leaves, noise), torch.autograd.grad(expected, leaves, noise)):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-12)


def test_gradcheck_from_logits():
    value, offsets, logits = (x.requires_grad_() for x in arguments(batch=1, queries=2))
    points = torch.rand(2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v, o, w: ms_deform_attn_from_logits_cpu(v, SHAPES, points, o, w), (value, offsets, logits), eps=1e-7
    )


def test_inputs_are_all_that_is_kept_for_the_backward_pass():
    value, offsets, logits = (x.requires_grad_() for x in arguments())
    points = torch.rand(3, 2, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        ms_deform_attn_from_logits(value, SHAPES, points, offsets, logits)
    assert set(kept) == {x.data_ptr() for x in (value, points, offsets, logits)}


def test_logits_of_any_size_and_in_half_precision():
    """Softmax must not overflow; what autocast predicts in half precision is summed up in the type of the points."""
    value, offsets, logits = arguments(torch.float32)
    points = torch.rand(3, 2)
    logits = logits * 300
    output = ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, logits)
    doubles = [x.double() for x in (value, points, offsets, logits)]
    exact = ms_deform_attn_from_logits_cpu(doubles[0], SHAPES, *doubles[1:])
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=1e-5)
    half = [x.bfloat16().requires_grad_() for x in (value, offsets, logits)]
    full = [x.detach().float().requires_grad_() for x in half]
    output = ms_deform_attn_from_logits_cpu(half[0], SHAPES, points, *half[1:])
    expected = ms_deform_attn_from_logits_cpu(full[0], SHAPES, points, *full[1:])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected.bfloat16(), rtol=2**-7, atol=1e-6)
    noise = torch.randn(2, 3, 6).bfloat16()
    for f, w in zip(torch.autograd.grad(output, half, noise), torch.autograd.grad(expected, full, noise.float())):
        torch.testing.assert_close(f, w.bfloat16(), rtol=2**-7, atol=1e-6)


def test_small_and_large_logits_together():
    """Those of a chunk decide how it is treated; a logit that is no number concerns its own token and head only."""
    torch.manual_seed(4)
    value, offsets, logits = arguments(queries=6)
    points = torch.rand(6, 2, dtype=torch.float64)
    small = ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, logits)
    for stray in (90.0, -2000.0, float("nan")):
        changed = logits.clone()
        changed[0, 2, 1, 0, 0] = stray
        output = ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, changed).unflatten(2, value.shape[2:])
        expected = small.unflatten(2, value.shape[2:]).clone()
        weights = changed[0, 2, 1].flatten().softmax(0).view_as(changed[0, 2, 1])
        places = points[2] + offsets[0, 2, 1] / torch.tensor([size[::-1] for size in SHAPES])[:, None]
        one_head = loops(value[:1, :, 1:2], SHAPES, places[None, None, None], weights[None, None, None])
        expected[0, 2, 1] = one_head
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12, equal_nan=True)
        assert expected[0, 2, 1].isnan().all() == math.isnan(stray)


@pytest.mark.parametrize("shift", [-1000.0, 1000.0, -60.0, 45.0])
def test_what_all_logits_have_in_common_changes_nothing(shift):
    value, offsets, logits = arguments(queries=6)
    points = torch.rand(6, 2, dtype=torch.float64)
    expected = ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, logits)
    shifted = ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, logits + shift)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-11)


def test_places_that_are_not_numbers(chunks):
    """They concern their own token and head, values and gradients; infinitely far away is outside."""
    value, offsets, logits = arguments(queries=6)
    points = torch.rand(6, 2, dtype=torch.float64)
    found = []
    for stray in (0.0, float("nan"), float("inf"), -float("inf")):
        changed = offsets.clone()
        changed[1, 2, 1, 0, 1, 0] = stray
        leaves = [x.clone().requires_grad_() for x in (value, changed, logits)]
        output = ms_deform_attn_from_logits_cpu(leaves[0], SHAPES, points, *leaves[1:])
        gradients = torch.autograd.grad(output.sum(), leaves)
        found.append([x.clone() for x in (output.detach().unflatten(2, value.shape[2:]), *gradients[1:])])
    usual, nowhere, *outside = found
    for x, same in zip(nowhere, usual):
        assert x[1, 2, 1].isnan().any()
        x[1, 2, 1] = same[1, 2, 1]
        torch.testing.assert_close(x, same, rtol=0, atol=1e-12)
    far = offsets.clone()
    far[1, 2, 1, 0, 1, 0] = 1e6
    expected = ms_deform_attn_from_logits_cpu(value, SHAPES, points, far, logits).unflatten(2, value.shape[2:])
    for output, of_offsets, _ in outside:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        assert not of_offsets[1, 2, 1, 0, 1].any()


def test_autocast_does_not_reach_inside():
    value, offsets, logits = arguments(torch.float32)
    points = torch.rand(offsets.shape[1], 2)
    expected = ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ms_deform_attn_from_logits_cpu(value, SHAPES, points, offsets, logits), expected)


def test_gradients_on_pixel_centres():
    """The derivative jumps there, and there all points are when training starts: both take the one to the right."""
    shapes = [(8, 8)]  # eighths are exact
    x, y = torch.meshgrid(torch.arange(-2, 10), torch.arange(-2, 10), indexing="xy")
    places = torch.stack((x.flatten() + 0.5, y.flatten() + 0.5), 1).double()
    value = torch.randn(1, 64, 1, 3, dtype=torch.float64)
    locations = (places / 8)[None, :, None, None, None]
    weights = torch.rand(1, len(places), 1, 1, 1, dtype=torch.float64)
    _, found = gradients(ms_deform_attn_cpu, shapes, value, locations, weights)
    _, wanted = gradients(ms_deform_attn_reference, shapes, value, locations, weights)
    assert wanted[1].abs().max() > 0.1
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:])
def test_only_the_gradients_that_are_needed(needed):
    inputs = arguments()
    noise = torch.randn(2, 3, 6, dtype=torch.float64)

    def found(implementation):
        leaves = [x.clone().requires_grad_(n) for x, n in zip(inputs, needed)]
        (implementation(leaves[0], SHAPES, *leaves[1:]) * noise).sum().backward()
        return [leaf.grad for leaf in leaves]

    for f, w, n in zip(found(ms_deform_attn_cpu), found(ms_deform_attn_reference), needed):
        assert (f is not None) == (w is not None) == n
        if n:
            torch.testing.assert_close(f, w, rtol=0, atol=1e-12)


def test_of_second_derivatives_there_are_none():
    inputs = [x.requires_grad_() for x in arguments()]
    output = ms_deform_attn_cpu(inputs[0], SHAPES, *inputs[1:])
    (gradient,) = torch.autograd.grad(output.sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        gradient.sum().backward()


def test_inputs_in_any_memory_layout():
    """Slices, transposed and expanded tensors, and an output gradient without strides."""
    value, locations, weights = arguments(heads=3, points=4, width=5)
    noise = torch.randn(2, 3, 15, dtype=torch.float64)
    value_leaf = value.permute(3, 2, 0, 1).contiguous().requires_grad_()
    locations_leaf = torch.cat((locations, locations), dim=5).requires_grad_()
    weights_leaf = weights[:, :, :, :, :1].clone().requires_grad_()
    inputs = (value_leaf.permute(2, 3, 1, 0), locations_leaf[..., 2:], weights_leaf.expand_as(weights))
    leaves = (value_leaf, locations_leaf, weights_leaf)
    for weight in (noise, torch.ones(1, 1, 1, dtype=torch.float64)):
        found, wanted = (
            torch.autograd.grad((f(inputs[0], SHAPES, *inputs[1:]) * weight).sum(), leaves)
            for f in (ms_deform_attn_cpu, ms_deform_attn_reference)
        )
        for f, w in zip(found, wanted):
            torch.testing.assert_close(f, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch, queries", [(2, 0), (0, 3)])
def test_nothing_to_do(batch, queries):
    inputs = [x.requires_grad_() for x in arguments(batch=max(batch, 1), queries=max(queries, 1))]
    value, locations, weights = (x[:batch] for x in inputs)
    output = ms_deform_attn_cpu(value, SHAPES, locations[:, :queries], weights[:, :queries])
    assert output.shape == (batch, queries, 6)
    output.sum().backward()
    for x in inputs:
        assert not x.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_values_are_sampled_in_float32(implementation):
    value, locations, weights = arguments(torch.float32)
    exact = implementation(value.bfloat16().float(), SHAPES, locations, weights)
    half = implementation(value.bfloat16(), SHAPES, locations, weights)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, exact.bfloat16(), rtol=2**-7, atol=1e-6)  # one rounding at the end


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 0), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_accuracy(dtype, rounding):
    """Against float64 at maps of real size: 1e-5 of the largest number, in half precision one rounding more.

    Places in a map of 134 columns are known to 2^-18 columns in float32, and values change by a few from one column to
    the next.
    """
    shapes = [(25, 34), (50, 67), (100, 134)]
    value, locations, weights = arguments(torch.float32, 1, queries=300, heads=2, points=4, width=8, shapes=shapes)
    weights = weights.flatten(3).softmax(3).view_as(weights)
    leaves = [x.requires_grad_() for x in (value.to(dtype), locations, weights)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    noise = torch.randn(1, 300, 16).to(dtype)
    output = ms_deform_attn_cpu(leaves[0], shapes, *leaves[1:])
    expected = ms_deform_attn_reference(exact[0], shapes, *exact[1:])
    found, wanted = torch.autograd.grad(output, leaves, noise), torch.autograd.grad(expected, exact, noise.double())
    assert output.dtype == found[0].dtype == dtype and found[1].dtype == found[2].dtype == torch.float32
    for f, w, unit in zip((output, *found), (expected, *wanted), (rounding, rounding, 0, 0)):
        assert (f - w).abs().max() < (1e-5 + unit) * w.abs().max()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_choice_of_the_implementation():
    assert implementation_for(torch.device("cpu")) is ms_deform_attn_cpu
    assert implementation_for(torch.device("meta")) is ms_deform_attn_reference
    value, locations, weights = arguments()
    torch.testing.assert_close(
        ms_deform_attn(value, SHAPES, locations, weights), loops(value, SHAPES, locations, weights)
    )
    traced = torch.jit.trace(lambda v, l, w: ms_deform_attn(v, SHAPES, l, w), (value, locations, weights))
    assert "grid_sampler" in str(traced.graph)


def test_the_operator_is_complete():
    """Schema, shapes without data, derivative, and that compilers may take it as it is."""
    value, places, weights = arguments()
    sizes = [extent for shape in SHAPES for extent in shape]
    for points in (None, torch.rand(3, 2, dtype=torch.float64)):
        inputs = [x.requires_grad_() for x in (value, places, weights)]
        torch.library.opcheck(cpu._attention, (inputs[0], points, *inputs[1:], sizes))
        inputs = [x.detach() for x in inputs]
        output = cpu._attention(inputs[0], points, *inputs[1:], sizes)
        torch.library.opcheck(cpu._attention_backward, (output, inputs[0], points, *inputs[1:], sizes, True, False))


def test_compiled_layer_with_gradients():
    """One graph with the operator in it, results as without a compiler, sizes of maps not baked in."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    layer = MSDeformAttn(8, 2, 2, 2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for shapes in ([(3, 4), (5, 2)], [(2, 3), (4, 6)], [(4, 7), (3, 5)]):
        points = reference_points(shapes, device=torch.device("cpu"), dtype=torch.float64)
        tokens = torch.randn(2, len(points), 8, dtype=torch.float64, requires_grad=True)
        noise = torch.randn(2, len(points), 8, dtype=torch.float64)
        results = []
        for module in (layer, compiled):
            output = module(tokens, tokens, shapes, points)
            results.append((output, *torch.autograd.grad((output * noise).sum(), (tokens, *layer.parameters()))))
        for found, wanted in zip(results[1], results[0]):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert len(graphs) <= 2
    for names in graphs:
        assert any("ms_deform_attn_cpu" in name for name in names) and not any("grid_sample" in name for name in names)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@torch.no_grad()
def test_compiled_layer():
    torch._dynamo.reset()
    layer = MSDeformAttn(8, 2, 2, 2).double()
    points = reference_points(SHAPES[:2], device=torch.device("cpu"), dtype=torch.float64)
    tokens = torch.randn(2, len(points), 8, dtype=torch.float64)
    arguments = (tokens, tokens, SHAPES[:2], points)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*arguments), layer(*arguments), rtol=0, atol=1e-12)


def test_exported_layer_has_plain_operators():
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this PyTorch does not tell exporting from compiling")
    layer = MSDeformAttn(8, 2, 2, 2)
    points = reference_points(SHAPES[:2], device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randn(1, len(points), 8)

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, tokens, points):
            return self.layer(tokens, tokens, SHAPES[:2], points)

    for strict in (False, True):
        exported = torch.export.export(Fixed(), (tokens, points), strict=strict)
        names = [str(node.target) for node in exported.graph.nodes]
        assert any("grid_sampler" in name for name in names) and not any("mask2former" in name for name in names)
        torch.testing.assert_close(exported.module()(tokens, points), layer(tokens, tokens, SHAPES[:2], points))


def test_wrong_shapes_are_named():
    value, locations, weights = arguments()
    with pytest.raises(ValueError, match="23 tokens, but spatial_shapes"):
        ms_deform_attn(value, [(3, 4), (5, 2)], locations, weights)
    with pytest.raises(ValueError, match=r"attention_weights \[B, T, M, L, P\]"):
        ms_deform_attn(value, SHAPES, locations, weights[..., :1])
    with pytest.raises(ValueError, match=r"value must be \[B, S, M, D\], got \(23, 2, 3\)"):
        ms_deform_attn(value[0], SHAPES, locations, weights)
    with pytest.raises(ValueError, match=r"sampling_locations must be \[B, T, M, L, P, 2\]"):
        ms_deform_attn(value, SHAPES, locations[0, 0], weights)
    with pytest.raises(ValueError, match=r"of shape \(2, 3, 2, 3, 0, 2\): M, L and P must be at least 1"):
        ms_deform_attn(value, SHAPES, locations[:, :, :, :, :0], weights[..., :0])
    with pytest.raises(ValueError, match="M, L and P must be at least 1"):
        ms_deform_attn(value[:, :0], [], locations[:, :, :, :0], weights[:, :, :, :0])
    points = torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"points must be \[T, 2\] with T=3, got \(1, 2\)"):
        ms_deform_attn_from_logits(value, SHAPES, points[:1], locations, weights)
    with pytest.raises(ValueError, match="points must be constants"):
        ms_deform_attn_from_logits(value, SHAPES, points.requires_grad_(), locations, weights)
