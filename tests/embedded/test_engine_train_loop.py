"""The loop and its hooks, the plain and the mixed-precision step, metrics, failures, states."""

import math

import pytest
import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, TrainerBase, hooks
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn

LR = 0.1


class Quadratic(nn.Module):
    """Losses ``near`` = |w - x|^2 and ``small`` = |w|^2 / 10, so that the steps have a closed form."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x):
        return {"near": (self.w - x).square().sum(), "small": self.w.square().sum() / 10}


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.rand(2, generator=generator)


def quadratic_reference(steps, seed=0):
    """Parameters after, and losses before each step."""
    w, data, losses = torch.tensor([1.0, -2.0]), batches(seed), []
    for _ in range(steps):
        x = next(data)
        losses.append(((w - x).square().sum().item(), w.square().sum().item() / 10))
        w = w - LR * (2 * (w - x) + w / 5)
    return w, losses


def new_trainer(cls=SimpleTrainer, model=None, data=None, **options):
    model = Quadratic() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), LR)
    return cls(model, batches() if data is None else data, optimizer, **options)


class Recorder(HookBase):
    def __init__(self):
        self.calls = []

    def _record(self, point):
        self.calls.append((point, self.trainer.iter, get_event_storage().iter))

    def before_train(self):
        self._record("before_train")

    def after_train(self):
        self._record("after_train")

    def before_step(self):
        self._record("before_step")

    def after_backward(self):
        self._record("after_backward")

    def after_step(self):
        self._record("after_step")


class FailsAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyError("broken")


def test_order_of_the_calls():
    trainer, recorder = new_trainer(), Recorder()
    trainer.register_hooks([None, recorder])
    trainer.train(3, 5)
    expected = [("before_train", 3, 3)]
    for i in (3, 4):
        expected += [("before_step", i, i), ("after_backward", i, i), ("after_step", i, i)]
    assert recorder.calls == [*expected, ("after_train", 5, 5)]
    assert (trainer.start_iter, trainer.iter, trainer.max_iter) == (3, 5, 5)


def test_after_train_runs_after_a_failure_and_can_tell():
    trainer, recorder = new_trainer(), Recorder()
    trainer.register_hooks([recorder, FailsAt(2)])
    with pytest.raises(KeyError, match="broken"):
        trainer.train(0, 5)
    assert recorder.calls[-1] == ("after_train", 2, 2)


@pytest.mark.embedded_only
def test_nothing_left_to_do():
    trainer, recorder = new_trainer(), Recorder()
    trainer.register_hooks([recorder])
    trainer.train(7, 5)
    assert recorder.calls == [("before_train", 7, 7), ("after_train", 7, 7)]
    assert torch.equal(trainer.model.w, Quadratic().w)


@pytest.mark.embedded_only
def test_a_hook_must_be_a_hook():
    with pytest.raises(TypeError, match="HookBase, got function"):
        new_trainer().register_hooks([lambda: None])


def test_trainer_is_freed_without_its_hooks_holding_it():
    import weakref

    trainer = new_trainer()
    trainer.register_hooks([Recorder()])
    alive = weakref.ref(trainer)
    del trainer
    assert alive() is None


def test_a_loop_without_a_step_is_refused():
    with pytest.raises(NotImplementedError):
        TrainerBase().train(0, 1)


@pytest.mark.parametrize("zero_grad_before_forward", [False, True])
def test_steps_are_those_of_gradient_descent(zero_grad_before_forward):
    trainer = new_trainer(zero_grad_before_forward=zero_grad_before_forward)
    trainer.train(0, 6)
    w, losses = quadratic_reference(6)
    torch.testing.assert_close(trainer.model.w.detach(), w)
    history = trainer.storage.history
    assert [i for _, i in history("near").values()] == list(range(6))
    assert [v for v, _ in history("near").values()] == pytest.approx([a for a, _ in losses])
    assert [v for v, _ in history("small").values()] == pytest.approx([b for _, b in losses])
    assert [v for v, _ in history("total_loss").values()] == pytest.approx([a + b for a, b in losses])
    assert all(v >= 0 for v, _ in history("data_time").values())


def test_a_single_loss_is_the_total_loss():
    class Single(Quadratic):
        def forward(self, x):
            return super().forward(x)["near"]

    trainer = new_trainer(model=Single())
    trainer.train(0, 1)
    w, losses = quadratic_reference(1)
    assert trainer.storage.latest()["total_loss"] == (pytest.approx(losses[0][0]), 0)
    assert "near" not in trainer.storage.latest()


def test_metrics_every_so_many_iterations():
    trainer = new_trainer(gather_metric_period=3)
    trainer.train(0, 8)
    _, losses = quadratic_reference(8)
    values = trainer.storage.history("total_loss").values()
    assert [i for _, i in values] == [2, 5]
    assert [v for v, _ in values] == pytest.approx([sum(losses[2]), sum(losses[5])])


def test_gradients_are_there_after_backward_and_the_step_is_not():
    class Look(HookBase):
        def after_backward(self):
            self.seen = self.trainer.model.w.detach().clone(), self.trainer.model.w.grad.clone()

    trainer, look = new_trainer(), Look()
    trainer.register_hooks([look])
    trainer.train(0, 1)
    start, x = torch.tensor([1.0, -2.0]), next(batches())
    torch.testing.assert_close(look.seen, (start, 2 * (start - x) + start / 5))


def test_write_metrics_with_a_prefix():
    trainer = new_trainer()

    class Extra(HookBase):
        def after_step(self):
            SimpleTrainer.write_metrics({"a": torch.tensor(1.5), "b": torch.tensor([2.0])}, 0.25, 4, "extra_")

    trainer.register_hooks([Extra()])
    trainer.train(0, 1)
    latest = trainer.storage.latest()
    expected = {"extra_total_loss": (3.5, 4), "a": (1.5, 4), "b": (2.0, 4), "data_time": (0.25, 4)}
    assert {name: latest[name] for name in expected} == expected


class Breaks(Quadratic):
    """``near`` becomes NaN in the third step."""

    def forward(self, x):
        losses = super().forward(x)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            losses["near"] = losses["near"] * math.nan
        return losses


def test_a_loss_that_is_not_finite_stops_the_training_before_the_step():
    trainer = new_trainer(model=Breaks())
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, 10)
    assert trainer.iter == 2
    torch.testing.assert_close(trainer.model.w.detach(), quadratic_reference(2)[0])
    assert "near" in str(error.value) and "nan" in str(error.value)


@pytest.mark.embedded_only
def test_the_error_names_the_losses_that_are_not_finite():
    losses = {"ce": torch.tensor(0.5), "mask": torch.tensor(math.nan), "dice": torch.tensor(math.inf)}
    trainer = new_trainer()

    class Extra(HookBase):
        def after_step(self):
            SimpleTrainer.write_metrics(losses, 0.0, 41)

    trainer.register_hooks([Extra()])
    with pytest.raises(FloatingPointError, match="iteration 41: mask = nan, dice = inf; the other losses: ce = 0.5"):
        trainer.train(0, 1)


class Collector(EventWriter):
    """Keeps what a writer would see of the total loss."""

    def __init__(self):
        self.seen = []

    def write(self):
        self.seen.append(get_event_storage().latest().get("total_loss"))


def test_late_metrics_are_the_same_metrics():
    on_time, late = new_trainer(), new_trainer(async_write_metrics=True)
    on_time.train(0, 7)
    late.train(0, 7)
    for name in ("near", "small", "total_loss"):
        assert late.storage.history(name).values() == on_time.storage.history(name).values()


@pytest.mark.embedded_only
def test_writers_see_late_metrics_of_their_own_iteration():
    trainer, collector = new_trainer(async_write_metrics=True), Collector()
    trainer.register_hooks([hooks.PeriodicWriter([collector], period=2)])
    trainer.train(0, 5)
    assert [iteration for _, iteration in collector.seen] == [1, 3, 4, 4]


@pytest.mark.embedded_only
def test_a_late_loss_that_is_not_finite_stops_the_training_too():
    trainer = new_trainer(model=Breaks(), async_write_metrics=True)
    with pytest.raises(FloatingPointError, match="iteration 2: near = nan"):
        trainer.train(0, 10)
    assert trainer.iter == 3
    trainer = new_trainer(model=Breaks(), async_write_metrics=True)
    with pytest.raises(FloatingPointError, match="iteration 2"):  # in the last iteration of all
        trainer.train(0, 3)


@pytest.mark.embedded_only
def test_a_data_loader_that_ends_is_named():
    with pytest.raises(RuntimeError, match="data loader ended at iteration 2"):
        new_trainer(data=[torch.rand(2), torch.rand(2)]).train(0, 5)


@pytest.mark.embedded_only
def test_a_model_without_losses_is_named():
    class Silent(Quadratic):
        def forward(self, x):
            return {}

    with pytest.raises(ValueError, match="Silent returned no losses"):
        new_trainer(model=Silent()).train(0, 1)


def test_a_model_in_eval_mode_is_refused():
    trainer = new_trainer()
    trainer.model.eval()
    with pytest.raises((RuntimeError, AssertionError), match="eval mode"):
        trainer.train(0, 1)


def test_reset_data_loader():
    trainer = new_trainer()
    trainer.train(0, 2)
    trainer.reset_data_loader(lambda: batches(seed=1))
    before = trainer.model.w.detach().clone()
    trainer.train(0, 1)
    x = next(batches(seed=1))
    torch.testing.assert_close(trainer.model.w.detach(), before - LR * (2 * (before - x) + before / 5))


class Counter(HookBase):
    """A hook with a state."""

    def __init__(self, count=0):
        self.count = count

    def after_step(self):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def momentum_trainer(*counters):
    model = Quadratic()
    trainer = SimpleTrainer(model, batches(), torch.optim.SGD(model.parameters(), LR, momentum=0.9))
    trainer.register_hooks(counters)
    return trainer


def test_state_has_iteration_optimizer_and_hooks():
    trainer = momentum_trainer(Counter(10))
    trainer.train(0, 3)
    state = trainer.state_dict()
    other = momentum_trainer(Counter())
    other.load_state_dict(state)
    assert other._hooks[0].count == 13
    assert other.iter == state["iteration"] == 3
    momenta = [t.optimizer.state[t.model.w]["momentum_buffer"] for t in (trainer, other)]
    assert torch.equal(*momenta)


@pytest.mark.embedded_only
def test_two_hooks_of_a_class_keep_their_states_apart():
    trainer = momentum_trainer(Counter(10), Counter(20))
    trainer.train(0, 1)
    other = momentum_trainer(Counter(), Counter())
    other.load_state_dict(trainer.state_dict())
    assert [hook.count for hook in other._hooks] == [11, 21]


def test_state_of_a_missing_hook_is_reported(caplog):
    trainer = momentum_trainer(Counter(10))
    with caplog.at_level("WARNING", logger="detectron2.engine.train_loop"):
        momentum_trainer().load_state_dict(trainer.state_dict())
    assert "Counter" in caplog.text


# ---- mixed precision -------------------------------------------------------------------------------------------------


class Product(nn.Module):
    """Keeps the type that its product came in."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        y = self.linear(x)
        self.seen = y.dtype
        return {"loss": y.float().square().mean()}


def product_trainer(device="cpu", **options):
    torch.manual_seed(3)
    model = Product().to(device)
    generator = torch.Generator().manual_seed(4)
    data = iter([torch.randn(16, 8, generator=generator).to(device) for _ in range(4)])
    return AMPTrainer(model, data, torch.optim.SGD(model.parameters(), LR), **options)


def product_reference(steps, dtype, device="cpu"):
    model, generator = product_trainer(device).model, torch.Generator().manual_seed(4)
    for _ in range(steps):
        x = torch.randn(16, 8, generator=generator).to(device)
        with torch.autocast(device, dtype=dtype):
            loss = model.linear(x).float().square().mean()
        (grad,) = torch.autograd.grad(loss, model.linear.weight)
        model.linear.weight.data -= LR * grad
    return model.linear.weight.detach()


@pytest.mark.embedded_only
def test_bfloat16_on_the_cpu():
    trainer = product_trainer()
    trainer.train(0, 3)
    assert trainer.precision == torch.bfloat16
    assert trainer.model.seen == torch.bfloat16 and trainer.model.linear.weight.dtype == torch.float32
    torch.testing.assert_close(trainer.model.linear.weight.detach(), product_reference(3, torch.bfloat16))
    assert not trainer.grad_scaler.is_enabled()


@pytest.mark.embedded_only
def test_loss_scaling_does_not_change_the_step_and_its_state_is_restored():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    trainer = product_trainer(precision=torch.bfloat16, grad_scaler=scaler, log_grad_scaler=True)
    trainer.train(0, 3)
    torch.testing.assert_close(trainer.model.linear.weight.detach(), product_reference(3, torch.bfloat16))
    assert trainer.storage.history("[metric]grad_scaler").values() == [(64.0, 0), (64.0, 1), (128.0, 2)]

    other = product_trainer(precision=torch.bfloat16, grad_scaler=torch.amp.GradScaler("cpu"))
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.get_scale() == 128.0


@pytest.mark.embedded_only
def test_states_of_other_precisions_can_be_loaded(caplog):
    without_scale = product_trainer(precision=torch.bfloat16).state_dict()
    scaled = product_trainer(grad_scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    with caplog.at_level("INFO", logger="detectron2.engine.train_loop"):
        scaled.load_state_dict(without_scale)
    assert "no loss scale" in caplog.text and scaled.grad_scaler.get_scale() == 64.0
    product_trainer(precision=torch.bfloat16).load_state_dict(scaled.state_dict())


@pytest.mark.embedded_only
def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="on the CPU needs torch.bfloat16"):
        product_trainer(precision=torch.float16)
    with pytest.raises(ValueError, match="torch.float16 or torch.bfloat16, got torch.float64"):
        product_trainer(precision=torch.float64)
    with pytest.raises(ValueError, match="one device per process"):
        AMPTrainer(nn.DataParallel(Product()), [], torch.optim.SGD(Product().parameters(), LR))


@pytest.mark.gpu
@pytest.mark.parametrize("async_write_metrics", [False, True])
def test_float16_on_a_gpu(async_write_metrics):
    trainer = product_trainer("cuda", precision=torch.float16, async_write_metrics=async_write_metrics)
    trainer.train(0, 3)
    assert trainer.model.seen == torch.float16
    reference = product_reference(3, torch.float16, "cuda")
    torch.testing.assert_close(trainer.model.linear.weight.detach(), reference, rtol=1e-3, atol=1e-4)
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 2]
    assert trainer.state_dict()["grad_scaler"]["scale"] == 65536.0
