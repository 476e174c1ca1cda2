"""Parameter groups, whole-model clipping and the optimizers they belong to."""

import pytest
import torch
from torch import nn

from mask2former_plugin.config import load_config
from mask2former_plugin.solver import build_optimizer, parameter_groups


class TinyModel(nn.Module):
    """One parameter of each kind that the rules know."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv = nn.Conv2d(3, 4, 1)
        self.backbone.norm = nn.LayerNorm(4)
        self.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(4, 2)
        self.group_norm = nn.GroupNorm(2, 4)
        self.query = nn.Embedding(5, 4)
        self.level_embed = nn.Parameter(torch.zeros(3, 4))
        self.shared = self.head
        self.tied = nn.Linear(4, 2, bias=False)
        self.tied.weight = self.head.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def config(*opts):
    base = ["SOLVER.BASE_LR", "0.1", "SOLVER.WEIGHT_DECAY", "0.05", "SOLVER.WEIGHT_DECAY_NORM", "0.01", "SOLVER.WEIGHT_DECAY_EMBED", "0.02"]
    return load_config(opts=[*base, *opts])


def test_groups_follow_the_published_rules():
    model = TinyModel()
    groups = parameter_groups(model, config())
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    low = 0.1 * 0.1
    expected = {
        model.backbone.conv.weight: (low, 0.05),
        model.backbone.conv.bias: (low, 0.05),
        model.backbone.norm.weight: (low, 0.01),
        model.backbone.norm.bias: (low, 0.01),
        # a direct parameter of the module called backbone
        model.backbone.relative_position_bias_table: (low, 0.0),
        model.head.weight: (0.1, 0.05),
        model.head.bias: (0.1, 0.05),
        model.group_norm.weight: (0.1, 0.01),
        model.group_norm.bias: (0.1, 0.01),
        model.query.weight: (0.1, 0.02),
        model.level_embed: (0.1, 0.05),
    }
    assert found == {id(p): value for p, value in expected.items()}
    assert len(groups) == len(set(expected.values()))
    assert sum(len(g["params"]) for g in groups) == len(expected)


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_whole_model_clipping_equals_clipping_by_hand(name):
    opts = ["SOLVER.OPTIMIZER", name, "SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
    clipped, plain = TinyModel().double(), TinyModel().double()
    plain.load_state_dict(clipped.state_dict())
    first = build_optimizer(config(*opts, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.5"), clipped)
    second = build_optimizer(config("SOLVER.OPTIMIZER", name), plain)
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in clipped.parameters() if p.requires_grad]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.5
        for model, factor in ((clipped, 1.0), (plain, 0.5 / (norm + 1e-6))):
            for p, g in zip((p for p in model.parameters() if p.requires_grad), gradients):
                p.grad = g * factor
        first.step()
        second.step()
    # float64; only the order of multiplications differs
    for p, q in zip(clipped.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER.*ADAMW, SGD.*'LION'"):
        build_optimizer(config("SOLVER.OPTIMIZER", "LION"), TinyModel())


@pytest.mark.parametrize(("enabled", "value"), [("True", "0.0"), ("False", "0.5")])
def test_full_model_clipping_of_zero_means_none(enabled, value):
    opts = ["SOLVER.CLIP_GRADIENTS.ENABLED", enabled, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", value]
    assert type(build_optimizer(config(*opts), TinyModel())) is torch.optim.AdamW


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_fused_steps_are_those_of_an_optimizer_per_parameter(name, dtype, tolerance):
    opts = ["SOLVER.OPTIMIZER", name, "SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
    model, plain = TinyModel().to(dtype), TinyModel().to(dtype)
    plain.load_state_dict(model.state_dict())
    cfg = config(*opts)
    fused = build_optimizer(cfg, model)
    assert all(group["fused"] for group in fused.param_groups)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in parameter_groups(plain, cfg) for p in g["params"]}
    trained = [p for p in plain.parameters() if p.requires_grad]
    slow = []
    for p in trained:
        lr, decay = settings[id(p)]
        if name == "ADAMW":
            slow.append(torch.optim.AdamW([p], lr=lr, weight_decay=decay, foreach=False))
        else:
            momentum = {"momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV}
            slow.append(torch.optim.SGD([p], lr=lr, weight_decay=decay, foreach=False, **momentum))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for ours, theirs in zip((p for p in model.parameters() if p.requires_grad), trained):
            ours.grad = torch.randn(ours.shape, dtype=dtype, generator=generator)
            theirs.grad = ours.grad.clone()
        fused.step()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in trained))
        for p in trained:
            p.grad *= (cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE / (norm + 1e-6)).clamp(max=1)
        for optimizer in slow:
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_fused_step_with_a_gradient_scaler_clips_unscaled_gradients():
    opts = ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = build_optimizer(config("SOLVER.OPTIMIZER", "SGD", *opts), layer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        scaler.scale(layer(torch.ones(1, 3)).square().sum()).backward()
        scaler.step(optimizer)
        found.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_no_fused_step_where_the_device_has_none():
    with torch.device("meta"):
        optimizer = build_optimizer(config(), TinyModel())
    assert not any(group.get("fused") for group in optimizer.param_groups)


def test_fused_can_be_switched_off():
    optimizer = build_optimizer(config("SOLVER.FUSED", "False"), TinyModel())
    assert not any(group.get("fused") for group in optimizer.param_groups)
