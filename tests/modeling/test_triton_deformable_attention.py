"""Deformable attention in Triton against the reference: on a GPU where there is one, else in Triton's interpreter.

Without a GPU the tests run in a process of their own, which ``test_in_the_interpreter`` starts: the interpreter has to be
chosen before Triton is imported. ``TRITON_INTERPRET=1 pytest <this file>`` does the same by hand.
"""

import importlib
import importlib.util
import inspect
import logging
import os
import subprocess
import sys

import pytest
import torch

from mask2former_plugin.modeling import ops
from mask2former_plugin.modeling.layers.deformable_attention import MSDeformAttn, reference_points
from mask2former_plugin.modeling.ops import ms_deform_attn_cpu, ms_deform_attn_reference

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(3, 4), (5, 2), (1, 1)]
# places of up to ten cells are rounded to 1e-6 cells, and gradients of locations are sums of products times ten
FLOAT32 = {"rtol": 1e-5, "atol": 1e-4}

if HAS_TRITON:
    from mask2former_plugin.modeling.ops import triton as ours


def on_device(test):
    """Runs on the GPU or in the interpreter."""
    test = pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device: runs within test_in_the_interpreter"
    )(test)
    return pytest.mark.skipif(not HAS_TRITON, reason="needs triton")(test)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", os.path.abspath(__file__)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def arguments(batch=2, queries=5, heads=2, points=2, width=8, shapes=SHAPES, dtype=torch.float64):
    """Value, points, offsets in pixels and logits; a good part of the samples lies outside, some far."""
    length = sum(h * w for h, w in shapes)
    value = torch.randn(batch, length, heads, width, dtype=dtype, device=DEVICE)
    centres = torch.rand(queries, 2, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    offsets = 2 * torch.randn(batch, queries, heads, len(shapes), points, 2, dtype=dtype, device=DEVICE)
    if offsets.numel():
        offsets[:, 0, 0, 0, 0] *= 1000
    logits = 2 * torch.randn(batch, queries, heads, len(shapes), points, dtype=dtype, device=DEVICE)
    return value, centres, offsets, logits


def locations_of(shapes, points, offsets):
    sizes = torch.tensor([[w, h] for h, w in shapes], dtype=points.dtype, device=points.device)
    return points[:, None, None, None] + offsets.to(points.dtype) / sizes[:, None]


def expected_from_logits(value, shapes, points, offsets, logits):
    weights = logits.to(points.dtype).flatten(3).softmax(3).view_as(logits)
    return ms_deform_attn_reference(value, shapes, locations_of(shapes, points, offsets), weights)


def compare(function, reference, leaves, **tolerance):
    """Outputs and gradients of both; the reference gets the same numbers in float64."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    output, expected = function(*leaves), reference(*exact)
    assert output.dtype == leaves[0].dtype and output.shape == expected.shape
    torch.testing.assert_close(output.double(), expected, **tolerance)
    noise = torch.randn_like(output)
    found = torch.autograd.grad(output, leaves, noise)
    wanted = torch.autograd.grad(expected, exact, noise.double())
    for leaf, f, w in zip(leaves, found, wanted):
        assert f.dtype == leaf.dtype
        torch.testing.assert_close(f.double(), w, **tolerance)
    return expected, wanted


def compare_from_logits(value, points, offsets, logits, shapes=SHAPES, **tolerance):
    return compare(
        lambda v, o, w: ours.ms_deform_attn_from_logits_triton(v, shapes, points, o, w),
        lambda v, o, w: expected_from_logits(v, shapes, points.double(), o, w),
        (value, offsets, logits),
        **tolerance,
    )


def compare_plain(value, points, offsets, logits, shapes=SHAPES, **tolerance):
    # locations are not rounded to half precision, as in the model
    locations = locations_of(shapes, points, offsets).to(torch.promote_types(value.dtype, torch.float32))
    return compare(
        lambda *x: ours.ms_deform_attn_triton(x[0], shapes, *x[1:]),
        lambda *x: ms_deform_attn_reference(x[0], shapes, *x[1:]),
        (value, locations, logits),
        **tolerance,
    )


BOTH = pytest.mark.parametrize("check", [compare_plain, compare_from_logits], ids=["plain", "from logits"])


@on_device
@BOTH
def test_float64(check):
    output, gradients = check(*arguments(), rtol=0, atol=1e-10)
    assert output.abs().max() > 0.1 and all(g.abs().max() > 0.1 for g in gradients)  # the samples hit something


@on_device
@pytest.mark.parametrize("width", [1, 8, 16, 24, 48, 64])
def test_head_widths(width):
    inputs = arguments(width=width, batch=1, queries=17, points=1, shapes=SHAPES[:2], dtype=torch.float32)
    compare_from_logits(*inputs, shapes=SHAPES[:2], **FLOAT32)


@on_device
@pytest.mark.parametrize("points", [1, 3, 4, 8])
def test_numbers_of_points(points):
    inputs = arguments(points=points, batch=1, queries=5, heads=1, shapes=SHAPES[:1], dtype=torch.float32)
    compare_from_logits(*inputs, shapes=SHAPES[:1], **FLOAT32)


@on_device
@BOTH
@pytest.mark.parametrize(
    "shapes, batch, queries, heads",
    [
        ([(7, 9)], 1, 1, 1),
        ([(1, 6), (5, 1)], 3, 33, 1),
        ([(2, 3)] * 5, 1, 16, 3),
        ([(h, 3) for h in range(1, 9)], 1, 2, 2),
    ],
)
def test_sizes(check, shapes, batch, queries, heads):
    inputs = arguments(batch=batch, queries=queries, heads=heads, points=1, shapes=shapes, dtype=torch.float32)
    check(*inputs, shapes=shapes, **FLOAT32)


@on_device
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(check, dtype):
    """Output and gradients are rounded once (the interpreter cuts bfloat16 off instead of rounding it)."""
    inputs = arguments(width=32, batch=1, queries=19, dtype=dtype)
    epsilon = torch.finfo(dtype).eps
    # softmax takes the mean gradient from the rounded output: 32 products of about 4 and a noise of about 1
    check(*inputs, rtol=epsilon, atol=epsilon * (10 if check is compare_from_logits else 1))


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_may_differ(dtype):
    """As under autocast when one layer is kept in float32."""
    value, points, offsets, logits = arguments(batch=1, dtype=torch.float32)
    epsilon = torch.finfo(dtype).eps
    compare_from_logits(value.to(dtype), points, offsets, logits, rtol=epsilon, atol=10 * epsilon)
    compare_from_logits(value, points, offsets.to(dtype), logits.to(dtype), rtol=epsilon, atol=epsilon)


@on_device
def test_gradcheck():
    value, points, offsets, logits = arguments(batch=1, queries=3, heads=1, width=3, shapes=[(3, 4), (2, 2)])
    leaves = [leaf.requires_grad_() for leaf in (value, offsets, logits)]

    def function(v, o, w):
        return ours.ms_deform_attn_from_logits_triton(v, [(3, 4), (2, 2)], points, o, w)

    assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-5, fast_mode=True)


@on_device
def test_gradients_on_pixel_centres():
    """The derivative jumps there, and there all points are when training starts: both take the one to the right."""
    x, y = torch.meshgrid(torch.arange(-2, 10), torch.arange(-2, 10), indexing="xy")
    points = (torch.stack((x.flatten(), y.flatten()), 1) + 0.5).double().to(DEVICE) / 8  # eighths are exact
    value = torch.randn(1, 64, 1, 3, dtype=torch.float64, device=DEVICE)
    offsets = torch.zeros(1, len(points), 1, 1, 1, 2, dtype=torch.float64, device=DEVICE)
    logits = torch.randn(1, len(points), 1, 1, 1, dtype=torch.float64, device=DEVICE)
    for check in (compare_plain, compare_from_logits):
        _, gradients = check(value, points, offsets, logits, shapes=[(8, 8)], rtol=0, atol=1e-12)
        assert gradients[1].abs().max() > 0.1


@on_device
@pytest.mark.parametrize("stray", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_stray_locations_do_not_become_indices(stray):
    value, points, offsets, logits = (x.float() for x in arguments())
    offsets[0, 1] = stray
    leaves = [leaf.requires_grad_() for leaf in (value, offsets, logits)]
    output = ours.ms_deform_attn_from_logits_triton(leaves[0], SHAPES, points, *leaves[1:])
    assert (output[0, 1] == 0).all()
    away = offsets.detach().clone()
    away[0, 1] = 1e6
    expected = expected_from_logits(value, SHAPES, points, away, logits)
    torch.testing.assert_close(output, expected, **FLOAT32)
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), leaves))


@on_device
def test_extreme_logits():
    value, points, offsets, logits = (x.float() for x in arguments())
    logits[0] *= 1000  # exponentials overflow without the shift
    logits[1, 0] = float("nan")
    output = ours.ms_deform_attn_from_logits_triton(value, SHAPES, points, offsets, logits)
    expected = expected_from_logits(value, SHAPES, points, offsets, logits)
    torch.testing.assert_close(output, expected, equal_nan=True, **FLOAT32)
    assert expected[1, 0].isnan().all() and expected[0].isfinite().all()


@on_device
@BOTH
@pytest.mark.parametrize("empty", [{"queries": 0}, {"batch": 0}])
def test_nothing_to_do(check, empty):
    check(*arguments(**empty), rtol=0, atol=0)


@on_device
def test_inputs_need_not_be_contiguous():
    value, points, offsets, logits = arguments(dtype=torch.float32)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, offsets, logits)]
    assert not any(x.is_contiguous() for x in strided)
    compare_from_logits(strided[0], points, *strided[1:], **FLOAT32)


@on_device
@pytest.mark.parametrize("batch, queries", [(1, 5), (2, 5), (2, 1)])
def test_parts_of_one_product_are_not_copied(batch, queries):
    value, points, offsets, logits = arguments(batch=batch, queries=queries, dtype=torch.float32)
    product = torch.cat((offsets.flatten(2), logits.flatten(2)), dim=2)
    parts = product.split((offsets[0, 0].numel(), logits[0, 0].numel()), dim=2)
    parts = [part.unflatten(2, x.shape[2:]) for part, x in zip(parts, (offsets, logits))]
    compare_from_logits(value, points, *parts, **FLOAT32)
    if queries > 1:
        assert ours._with_rows_at_one_distance(parts[1]).data_ptr() == parts[1].data_ptr()


@on_device
def test_only_the_gradients_that_are_needed():
    value, points, offsets, logits = arguments()
    offsets.requires_grad_()
    ours.ms_deform_attn_from_logits_triton(value, SHAPES, points, offsets, logits).sum().backward()
    assert offsets.grad is not None and value.grad is None and logits.grad is None


@on_device
def test_the_second_derivative_is_refused():
    value, points, offsets, logits = arguments(queries=2)
    value.requires_grad_()
    output = ours.ms_deform_attn_from_logits_triton(value, SHAPES, points, offsets, logits)
    (gradient,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@on_device
@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_algorithms(warn_only):
    value, points, offsets, logits = arguments(queries=2)
    offsets.requires_grad_()

    def run(value):
        return ours.ms_deform_attn_from_logits_triton(value, SHAPES, points, offsets, logits).sum()

    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        run(value).backward()  # forward and the other gradients are deterministic
        if warn_only:
            with pytest.warns(UserWarning, match="no deterministic implementation"):
                run(value.requires_grad_()).backward()
        else:
            with pytest.raises(RuntimeError, match="warn_only=True"):
                run(value.requires_grad_()).backward()
    finally:
        torch.use_deterministic_algorithms(False)


@on_device
def test_too_many_levels():
    value, points, offsets, logits = arguments(shapes=[(1, 1)] * 9, queries=1)
    with pytest.raises(ValueError, match="at most 8 levels, got 9"):
        ours.ms_deform_attn_from_logits_triton(value, [(1, 1)] * 9, points, offsets, logits)


@on_device
def test_operators_are_well_formed():
    """Schema, shapes without data, autograd, and tracing with symbolic sizes."""
    value, points, offsets, logits = arguments(queries=3, dtype=torch.float32)
    sizes = [number for shape in SHAPES for number in shape]
    leaves = [leaf.requires_grad_() for leaf in (value, offsets, logits)]
    torch.library.opcheck(ours._attention, (leaves[0], sizes, points, *leaves[1:]))


@on_device
def test_compiled():
    """The operator stays one node of the graph, sizes may change."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def function(value, shapes, points, offsets, logits):
        return ours.ms_deform_attn_from_logits_triton(value, shapes, points, offsets, 1.0 * logits)

    for shapes in ([(3, 4), (5, 2)], [(6, 7), (4, 3)], [(9, 5), (3, 8)]):
        value, points, offsets, logits = arguments(shapes=shapes, dtype=torch.float32)
        value.requires_grad_()
        output = function(value, shapes, points, offsets, logits)
        expected = expected_from_logits(value, shapes, points, offsets, logits)
        torch.testing.assert_close(output, expected, **FLOAT32)
        noise = torch.randn_like(output)
        found, wanted = (torch.autograd.grad(o, value, noise)[0] for o in (output, expected))
        torch.testing.assert_close(found, wanted, **FLOAT32)
    assert len(graphs) == 1 and "ms_deform_attn_triton" in str(graphs[0].graph)


@on_device
def test_traffic():
    value, points, offsets, logits = arguments(
        batch=1, queries=3, heads=2, points=4, width=8, shapes=[(2, 5)], dtype=torch.bfloat16
    )
    cells = 3 * 2 * 4 * 4 * 8
    inputs = 2 * (10 * 2 * 8 + 3 * 2 * 4 * 2 + 3 * 2 * 4) + 4 * 3 * 2
    output, logarithms, sums = 2 * 3 * 2 * 8, 4 * 3 * 2, 10 * 2 * 8
    assert ours.traffic(value, points, offsets, logits) == {
        "forward": inputs + output + logarithms,
        "backward": inputs + 2 * output + logarithms + (3 * 4 + 4 + 2) * sums + 2 * (3 * 2 * 4 * 2 + 3 * 2 * 4),
        "forward_samples": 2 * cells,
        "backward_samples": (2 + 4) * cells,
    }
    in_float32 = ours.traffic(*(x.float() for x in (value, points, offsets, logits)))
    assert in_float32["backward_samples"] == 8 * cells


# ---- the choice of Triton


@pytest.fixture
def chosen(monkeypatch):
    """The model chooses Triton on the device of these tests."""
    monkeypatch.setattr(ops, "TRITON_DEVICE_TYPE", DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ops._has_triton.cache_clear()
    yield
    ops._has_triton.cache_clear()


def layer_and_inputs(shapes, dtype=torch.float32):
    layer = MSDeformAttn(16, len(shapes), 2, 2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    points = reference_points(shapes, device=torch.device(DEVICE), dtype=torch.float32)
    query, value = torch.randn(2, 1, len(points), 16, device=DEVICE)
    return layer.to(DEVICE), (query.requires_grad_(), value.requires_grad_(), shapes, points)


def results(layer, inputs):
    output = layer(*inputs)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return output, *torch.autograd.grad(output, [*inputs[:2], *layer.parameters()], noise)


@on_device
def test_layer(chosen, monkeypatch):
    assert ops.implementation_for(torch.device(DEVICE)) is ours.ms_deform_attn_triton
    layer, inputs = layer_and_inputs(SHAPES)
    found = results(layer, inputs)
    monkeypatch.setattr(ops, "TRITON_DEVICE_TYPE", "none")
    wanted = results(layer, inputs)
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-4 * float(w.detach().abs().max()))


@on_device
def test_layer_under_autocast(chosen):
    """Linear layers give bfloat16, sampling happens in float32."""
    layer, inputs = layer_and_inputs(SHAPES)
    layer.sampling_offsets.weight.data /= 100  # steps of bfloat16 stay small against a pixel
    exact = results(layer, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(layer, inputs)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    # a few roundings of 2**-8 in a row, and sums over 16 channels
    assert (found[0] - exact[0]).norm() < 0.03 * exact[0].norm()


@on_device
def test_compiled_layer(chosen):
    """The choice is made while compiling; the graph holds the operator."""
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    layer, inputs = layer_and_inputs(SHAPES)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for f, w in zip(results(compiled, inputs), results(layer, inputs)):
        torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and "ms_deform_attn_triton" in graphs[0]


@on_device
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exported_and_traced_layers_have_plain_operators(chosen):
    layer, inputs = layer_and_inputs(SHAPES)
    if hasattr(torch.compiler, "is_exporting"):  # PyTorch 2.7
        graph = str(torch.export.export(layer, inputs).graph)
        assert "grid_sampler" in graph and "triton" not in graph
    layer.requires_grad_(False)
    traced = torch.jit.trace(lambda query, value: layer(query, value, *inputs[2:]), inputs[:2], check_trace=False)
    assert "grid_sampler" in str(traced.inlined_graph)


@pytest.mark.parametrize("reason", ["No module named 'triton'", "compute capability 6.1, Triton needs 7.0"])
def test_without_triton_the_log_says_why_once(monkeypatch, caplog, reason):
    def missing(name):
        raise ImportError("No module named 'triton'")

    capability = (6, 1) if "capability" in reason else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ops.importlib, "import_module", missing)
    ops._has_triton.cache_clear()
    with caplog.at_level(logging.INFO, logger=ops.__name__):
        for _ in range(2):
            assert ops.implementation_for(torch.device("cuda:0")) is ms_deform_attn_reference
    ops._has_triton.cache_clear()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert reason in caplog.text and "cuda:0" in caplog.text and "install triton" in caplog.text


def test_elsewhere_triton_is_not_imported():
    assert ops.implementation_for(torch.device("cpu")) is ms_deform_attn_cpu
    assert ops.implementation_for(torch.device("meta")) is ms_deform_attn_reference


# ---- compilation, for which Triton needs no GPU; the interpreter takes more than the compiler


def _described(signature, constants):
    """Signature, constants and alignment of the pointers as this version of Triton takes them."""
    pointers = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    descriptor = getattr(importlib.import_module("triton.compiler.compiler"), "AttrsDescriptor", None)
    if descriptor is None:
        return signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers}
    if "divisible_by_16" not in inspect.signature(descriptor).parameters:
        pytest.skip("this version of Triton describes pointers in another way")
    signature = {name: kind for name, kind in signature.items() if name not in constants}
    return signature, constants, descriptor(divisible_by_16=pointers, equal_to_1=[])


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_kernels_compile(kernel, capability):
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    function = {"forward": ours._forward_kernel, "backward": ours._backward_kernel}[kernel]
    constants = {
        "HEADS": 8, "WIDTH": 32, "LEVELS": 3, "POINTS": 4, "FUSED": True, "SUM": tl.float32, "BLOCK_WIDTH": 32,
        "BLOCK_SAMPLES": 16, "VECTOR": 4, "NEEDS_VALUE": True, "BLOCK": 16, "PLACES_STRIDE": 288, "WEIGHTS_STRIDE": 288,
    }  # fmt: skip
    float32 = ("points", "logarithms", "grad_value")
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ours.NUMBERS:
            signature[name] = "i64" if name in ("size0", "size1", "size2") else "i32"
        else:
            half = "*bf16" if capability >= 80 else "*fp16"
            signature[name] = "*fp32" if name in float32 else half
    constants = {name: constants[name] for name in signature if name in constants}
    source = ASTSource(function, *_described(signature, constants))
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 2})
    # rows of channels are read in vectors; where four are added at once, only sums over channels cross threads in a loop
    assert "ld.global.v2.b32" in compiled.asm["ptx"] or "ld.global.v4.b32" in compiled.asm["ptx"]
    if capability >= 90:
        assert compiled.asm["ttgir"].count("convert_layout") <= 2
