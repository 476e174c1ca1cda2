"""Parameter groups, the default optimizer and gradient clipping."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import nn


class Net(nn.Module):
    """Linear, batch norm, embedding, layer norm; one frozen and one shared parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.bn = nn.BatchNorm1d(3)
        self.embed = nn.Embedding(3, 3)
        self.ln = nn.LayerNorm(3)
        self.again = self.linear
        self.ln.weight.requires_grad = False


def named_groups(model, groups):
    """Groups as {frozenset of parameter names: options}; each parameter must be in one group only."""
    names = {id(p): n for n, p in model.named_parameters()}
    result = {}
    for group in groups:
        members = [names[id(p)] for p in group["params"]]
        assert len(set(members)) == len(members)
        result[frozenset(members)] = {k: v for k, v in group.items() if k != "params"}
    assert sum(len(k) for k in result) == len(frozenset().union(*result))
    return result


def test_without_options_there_is_one_group():
    model = Net()
    groups = named_groups(model, get_default_optimizer_params(model))
    trained = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    assert groups == {trained: {}}


def test_norm_layers_have_their_own_decay():
    model = Net()
    params = get_default_optimizer_params(model, base_lr=0.1, weight_decay=0.3, weight_decay_norm=0.0)
    groups = named_groups(model, params)
    assert groups == {
        frozenset(["linear.weight", "linear.bias", "embed.weight"]): {"lr": 0.1, "weight_decay": 0.3},
        frozenset(["bn.weight", "bn.bias", "ln.bias"]): {"lr": 0.1, "weight_decay": 0.0},
    }


def test_overrides_win_over_norm_decay_and_factor():
    model = Net()
    groups = named_groups(
        model,
        get_default_optimizer_params(
            model,
            base_lr=0.1,
            weight_decay=0.3,
            weight_decay_norm=0.0,
            bias_lr_factor=2.0,
            weight_decay_bias=0.7,
            lr_factor_func=lambda name: 10.0 if name.startswith("embed") else 1.0,
            overrides={"weight": {"weight_decay": 0.9}},
        ),
    )
    assert groups == {
        frozenset(["linear.weight", "bn.weight"]): {"lr": 0.1, "weight_decay": 0.9},
        frozenset(["embed.weight"]): {"lr": 1.0, "weight_decay": 0.9},
        frozenset(["linear.bias", "bn.bias", "ln.bias"]): {"lr": 0.2, "weight_decay": 0.7},
    }


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bias_lr_factor": 2.0}, "bias_lr_factor requires base_lr"),
        ({"lr_factor_func": lambda name: 1.0}, "lr_factor_func requires base_lr"),
        ({"weight_decay_bias": 0.0, "overrides": {"bias": {"lr": 1.0}}}, "'bias'"),
    ],
)
def test_contradicting_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        get_default_optimizer_params(Net(), **options)


def test_reduce_keeps_order_and_lets_the_later_option_win():
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = reduce_param_groups(
        [
            {"params": [a, b], "lr": 1.0, "betas": (0.9, 0.99)},
            {"params": [c], "lr": 2.0, "betas": (0.9, 0.99)},
            {"params": [a], "lr": 2.0},
        ]
    )
    assert [(g["lr"], [id(p) for p in g["params"]]) for g in groups] == [(2.0, [id(a), id(c)]), (1.0, [id(b)])]


def test_default_optimizer_follows_the_config():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 0.5
    cfg.SOLVER.MOMENTUM = 0.8
    cfg.SOLVER.NESTEROV = True
    cfg.SOLVER.WEIGHT_DECAY = 0.25
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.125
    model = Net()
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.SGD
    groups = named_groups(model, optimizer.param_groups)
    for names, options in groups.items():
        norm = any(n.startswith(("bn", "ln")) for n in names)
        assert (options["lr"], options["momentum"], options["nesterov"]) == (0.5, 0.8, True)
        assert options["weight_decay"] == (0.125 if norm else 0.25)


def clipped_step(clip_type, value, as_instance, norm_type=2.0):
    """Updates of two parameters with fixed gradients by plain SGD (learning rate 1) with clipping."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = value
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = norm_type
    grads = [torch.tensor([3.0, -4.0]), torch.tensor([0.1, 0.2])]
    params = [nn.Parameter(torch.zeros(2)) for _ in grads]
    if as_instance:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(params, lr=1.0))
    else:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(params, lr=1.0)
    assert isinstance(optimizer, torch.optim.SGD)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return grads, [-p.detach() for p in params]


@pytest.mark.parametrize("as_instance", [True, False])
@pytest.mark.parametrize("kind", ["value", "norm2", "norm1"])
def test_each_parameter_is_clipped_on_its_own(kind, as_instance):
    if kind == "value":
        grads, updates = clipped_step("value", 1.0, as_instance)
        expected = [g.clamp(-1, 1) for g in grads]
    else:
        norm_type = float(kind[-1])
        grads, updates = clipped_step("norm", 1.0, as_instance, norm_type)
        expected = [g / max(1.0, float(g.abs().pow(norm_type).sum() ** (1 / norm_type))) for g in grads]
    for update, reference in zip(updates, expected, strict=True):
        torch.testing.assert_close(update, reference, rtol=1e-5, atol=1e-6)


def test_no_clipping_leaves_the_class_alone():
    assert maybe_add_gradient_clipping(get_cfg(), torch.optim.AdamW) is torch.optim.AdamW


def test_unknown_clip_type_is_refused():
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    with pytest.raises(ValueError, match="full_model"):
        maybe_add_gradient_clipping(cfg, torch.optim.SGD)
