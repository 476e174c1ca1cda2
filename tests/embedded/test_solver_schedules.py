"""Learning rate schedules against closed forms, at their ends and across a resume."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.projects.deeplab.build_solver import build_lr_scheduler as build_deeplab_scheduler
from detectron2.projects.deeplab.config import add_deeplab_config
from detectron2.projects.deeplab.lr_scheduler import WarmupPolyLR
from detectron2.solver import LRMultiplier, WarmupCosineLR, WarmupMultiStepLR, WarmupParamScheduler, build_lr_scheduler
from fvcore.common.param_scheduler import ConstantParamScheduler, CosineParamScheduler
from torch import nn

BASE = 0.5


def new_optimizer(groups=1):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=BASE)


def rates(optimizer, scheduler, steps):
    """The rate of the iterations 0 ... steps."""
    result = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        result.append(optimizer.param_groups[0]["lr"])
    return result


def solver_config(name, **solver):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.SOLVER.LR_SCHEDULER_NAME = name
    cfg.SOLVER.BASE_LR = BASE
    cfg.SOLVER.STEPS = ()
    for key, value in solver.items():
        setattr(cfg.SOLVER, key, value)
    return cfg


def linear_warmup(iteration, length=5, factor=0.001):
    return factor + (1 - factor) * iteration / length if iteration < length else 1.0


def test_poly_formula():
    cfg = solver_config("WarmupPolyLR", MAX_ITER=40, WARMUP_ITERS=5)
    optimizer = new_optimizer()
    values = rates(optimizer, build_deeplab_scheduler(cfg, optimizer), 40)
    assert values == pytest.approx([BASE * linear_warmup(i) * (1 - i / 40) ** 0.9 for i in range(41)])


def test_poly_constant_warmup_and_constant_ending():
    optimizer = new_optimizer()
    scheduler = WarmupPolyLR(optimizer, 20, 0.01, 3, "constant", power=2.0, constant_ending=0.3)
    expected = [BASE * (0.01 * (1 - i / 20) ** 2 if i < 3 else max((1 - i / 20) ** 2, 0.3)) for i in range(21)]
    assert rates(optimizer, scheduler, 20) == pytest.approx(expected)


@pytest.mark.embedded_only
def test_poly_stays_at_zero_past_the_end():
    optimizer = new_optimizer()
    assert rates(optimizer, WarmupPolyLR(optimizer, 4, warmup_iters=0), 8)[4:] == [0.0] * 5


@pytest.mark.embedded_only
def test_poly_state_is_the_position_and_the_new_length_holds_after_a_resume():
    optimizer = new_optimizer()
    short = WarmupPolyLR(optimizer, 10, warmup_iters=0)
    rates(optimizer, short, 10)
    state = short.state_dict()
    assert state == {"base_lrs": [BASE], "last_epoch": 10}

    optimizer = new_optimizer()
    longer = WarmupPolyLR(optimizer, 40, warmup_iters=0)
    longer.load_state_dict(state)
    optimizer.step()
    longer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(BASE * (1 - 11 / 40) ** 0.9)


@pytest.mark.embedded_only
def test_poly_reads_states_that_hold_the_whole_schedule(caplog):
    """The form that other implementations write; its max_iters and power must not win over the config."""
    old = {
        "max_iters": 10,
        "warmup_factor": 0.001,
        "warmup_iters": 3,
        "warmup_method": "linear",
        "power": 0.5,
        "constant_ending": 0.2,
        "base_lrs": [0.25],
        "last_epoch": 10,
        "_step_count": 11,
        "_last_lr": [0.0],
    }
    optimizer = new_optimizer()
    scheduler = WarmupPolyLR(optimizer, 20, warmup_iters=0)
    with caplog.at_level("WARNING", logger="detectron2.solver.lr_scheduler"):
        scheduler.load_state_dict(old)
    assert "keeps its base learning rate 0.25; 0.5 of the config (SOLVER.BASE_LR) has no effect" in caplog.text
    caplog.clear()
    scheduler.load_state_dict(old)
    assert not caplog.text  # they agree now
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * (1 - 11 / 20) ** 0.9)


@pytest.mark.embedded_only
def test_state_of_another_number_of_groups_is_refused():
    state = WarmupPolyLR(new_optimizer(groups=2), 10).state_dict()
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer has 1"):
        WarmupPolyLR(new_optimizer(), 10).load_state_dict(state)


def test_multi_step():
    cfg = solver_config("WarmupMultiStepLR", MAX_ITER=40, WARMUP_ITERS=5, STEPS=(20, 30), GAMMA=0.5)
    optimizer = new_optimizer()
    values = rates(optimizer, build_deeplab_scheduler(cfg, optimizer), 40)
    assert values == pytest.approx([BASE * linear_warmup(i) * 0.5 ** ((i >= 20) + (i >= 30)) for i in range(41)])


@pytest.mark.embedded_only
def test_steps_from_the_end_on_are_ignored_with_a_warning(caplog):
    cfg = solver_config("WarmupMultiStepLR", MAX_ITER=10, WARMUP_ITERS=0, STEPS=(10, 20))
    optimizer = new_optimizer()
    with caplog.at_level("WARNING", logger="detectron2.solver.build"):
        scheduler = build_lr_scheduler(cfg, optimizer)
    assert "have no effect" in caplog.text
    assert rates(optimizer, scheduler, 10) == pytest.approx([BASE] * 11)


@pytest.mark.parametrize("rescale", [False, True])
def test_cosine(rescale):
    end = 0.1
    cfg = solver_config("WarmupCosineLR", MAX_ITER=40, WARMUP_ITERS=5, BASE_LR_END=end * BASE, RESCALE_INTERVAL=rescale)
    optimizer = new_optimizer()
    values = rates(optimizer, build_lr_scheduler(cfg, optimizer), 40)

    def cosine(where):
        return end + (1 - end) * (1 + math.cos(math.pi * where)) / 2

    top = 1.0 if rescale else cosine(5 / 40)  # where the warm-up leads
    expected = [0.001 + (top - 0.001) * i / 5 for i in range(5)]
    expected += [cosine((i - 5) / 35 if rescale else i / 40) for i in range(5, 41)]
    assert values == pytest.approx([BASE * value for value in expected])


def test_step_with_fixed_gamma():
    cfg = solver_config("WarmupStepWithFixedGammaLR", MAX_ITER=40, WARMUP_ITERS=5, NUM_DECAYS=3, GAMMA=0.1)
    optimizer = new_optimizer()
    values = rates(optimizer, build_lr_scheduler(cfg, optimizer), 39)
    assert values == pytest.approx([BASE * linear_warmup(i) * 0.1 ** (i // 10) for i in range(40)])


@pytest.mark.embedded_only
@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupPolyLR"])
@pytest.mark.parametrize("rescale", [False, True])
def test_every_schedule_can_be_stepped_at_and_past_the_end(name, rescale):
    """A trainer steps the schedule after its last iteration too."""
    cfg = solver_config(name, MAX_ITER=8, WARMUP_ITERS=2, STEPS=(4,), RESCALE_INTERVAL=rescale)
    optimizer = new_optimizer()
    values = rates(optimizer, build_deeplab_scheduler(cfg, optimizer), 10)
    assert values[8] == values[9] == values[10] <= values[7]


@pytest.mark.embedded_only
def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="WarmupMultiStepLR, WarmupCosineLR"):
        build_deeplab_scheduler(solver_config("WarmupFooLR"), new_optimizer())
    with pytest.raises(ValueError, match="BASE_LR_END"):
        build_lr_scheduler(solver_config("WarmupCosineLR", BASE_LR_END=2 * BASE), new_optimizer())
    with pytest.raises(ValueError, match="RESCALE_INTERVAL needs WARMUP_ITERS"):
        cfg = solver_config("WarmupCosineLR", RESCALE_INTERVAL=True, MAX_ITER=10, WARMUP_ITERS=10)
        build_lr_scheduler(cfg, new_optimizer())
    with pytest.raises(ValueError, match="warm-up method 'quadratic'"):
        WarmupParamScheduler(CosineParamScheduler(1, 0), 0.1, 0.1, "quadratic")
    with pytest.raises(ValueError, match="ParamScheduler"):
        LRMultiplier(new_optimizer(), 0.5, 10)


def test_multiplier_keeps_the_ratio_of_the_groups_and_its_state_is_the_position():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)], lr=1.0)
    scheduler = LRMultiplier(optimizer, CosineParamScheduler(1, 0), 10)
    rates(optimizer, scheduler, 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])
    assert scheduler.state_dict() == {"base_lrs": [1.0, 0.1], "last_epoch": 5}


def test_constant_warmup_of_the_param_scheduler():
    scheduler = WarmupParamScheduler(ConstantParamScheduler(2.0), 0.25, 0.5, "constant")
    assert [scheduler(where) for where in (0.0, 0.4, 0.6)] == [0.5, 0.5, 2.0]


def test_older_classes():
    optimizer = new_optimizer()
    values = rates(optimizer, WarmupMultiStepLR(optimizer, [8, 12], 0.1, 0.2, 4), 15)
    expected = [BASE * linear_warmup(i, 4, 0.2) * 0.1 ** ((i >= 8) + (i >= 12)) for i in range(16)]
    assert values == pytest.approx(expected)
    optimizer = new_optimizer()
    values = rates(optimizer, WarmupCosineLR(optimizer, 16, 0.2, 4), 16)
    expected = [BASE * linear_warmup(i, 4, 0.2) * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(17)]
    assert values == pytest.approx(expected)
    with pytest.raises(ValueError, match="increasing"):
        WarmupMultiStepLR(new_optimizer(), [12, 8])
