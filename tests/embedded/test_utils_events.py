"""Event storage and its three writers."""

import json
import logging
import math

import numpy as np
import pytest
import torch

from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)


def read_lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_stack_of_storages():
    assert not has_event_storage()
    with pytest.raises(AssertionError):
        get_event_storage()
    with EventStorage(5) as outer:
        with pytest.raises(RuntimeError), EventStorage() as inner:
            assert get_event_storage() is inner
            raise RuntimeError
        assert get_event_storage() is outer and outer.iter == outer.iteration == 5
        outer.step()
        assert outer.iter == 6
        outer.iter = 9
        assert outer.iter == 9
    assert not has_event_storage()


def test_scalars_and_smoothing():
    values = np.random.rand(60)
    with EventStorage() as storage:
        for iteration, value in enumerate(values):
            storage.put_scalars(loss=value, raw=value, smoothing_hint=True) if iteration % 3 == 0 else None
            storage.put_scalar("last", torch.tensor(value), smoothing_hint=False)
            storage.step()
    assert storage.latest() == {
        "loss": (values[57], 57),
        "raw": (values[57], 57),
        "last": (pytest.approx(values[59]), 59),
    }
    window = [values[i] for i in range(0, 60, 3) if 57 - 20 < i <= 57]
    assert storage.count_samples("loss", 20) == len(window)
    smoothed = storage.latest_with_smoothing_hint(20)
    assert smoothed["loss"] == (pytest.approx(np.median(window)), 57)
    assert smoothed["last"] == storage.latest()["last"]
    assert storage.smoothing_hints() == {"loss": True, "raw": True, "last": False}
    assert [value for value, _ in storage.history("loss").values()] == list(values[::3])
    assert sorted(storage.histories()) == ["last", "loss", "raw"]
    with pytest.raises(KeyError):
        storage.history("nothing")


def test_the_hint_of_a_scalar_cannot_change():
    storage = EventStorage()
    storage.put_scalar("a", 1, smoothing_hint=True)
    with pytest.raises(AssertionError):
        storage.put_scalar("a", 1, smoothing_hint=False)


@pytest.mark.embedded_only
def test_name_scope_ends_after_an_error_too():
    storage = EventStorage()
    with pytest.raises(RuntimeError), storage.name_scope("val"):
        storage.put_scalar("a", 1)
        raise RuntimeError
    storage.put_scalar("b", 1, cur_iter=7)
    assert storage.latest() == {"val/a": (1.0, 0), "b": (1.0, 7)}


@pytest.mark.embedded_only
def test_json_has_one_line_per_iteration_and_null_for_what_json_lacks(tmp_path):
    path = tmp_path / "metrics.json"
    with EventStorage() as storage:
        writer = JSONWriter(str(path))
        for value, other in ((1.5, None), (math.nan, 2.0), (math.inf, None)):
            storage.put_scalar("value", value, smoothing_hint=False)
            if other is not None:
                storage.put_scalar("other", other, smoothing_hint=False)
            writer.write()
            writer.write()  # nothing new
            storage.step()
        storage.put_scalar("late", 3.0, smoothing_hint=False)
        writer.write()
        writer.close()
    assert read_lines(path) == [
        {"iteration": 0, "value": 1.5},
        {"iteration": 1, "other": 2.0, "value": None},
        {"iteration": 2, "value": None},
        {"iteration": 3, "late": 3.0},
    ]


@pytest.mark.embedded_only
def test_json_goes_on_after_an_interrupted_line(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0}\n{"iteration": 1, "los')
    with EventStorage(2) as storage:
        writer = JSONWriter(str(path))
        storage.put_scalar("loss", 1.0)
        writer.write()
        writer.close()
    lines = path.read_text().splitlines()
    assert lines == ['{"iteration": 0}', '{"iteration": 1, "los', '{"iteration": 2, "loss": 1.0}']


def test_tensorboard_writes_scalars_images_and_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = torch.randn(500)
    with EventStorage() as storage:
        writer = TensorboardXWriter(str(tmp_path))
        writer.close()
        assert list(tmp_path.iterdir()) == []
        for _ in range(3):
            storage.put_scalar("loss", 2.0)
            storage.step()
        storage.put_scalar("loss", 4.0)
        storage.put_image("picture", (torch.rand(3, 4, 5) * 255).to(torch.uint8))
        storage.put_histogram("weights", values, bins=10)
        writer.write()
        writer.write()
        writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "images": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.0)]  # the median
    (image,) = events.Images("picture")
    assert (image.height, image.width, image.step) == (4, 5, 3)
    (histogram,) = events.Histograms("weights")
    value = histogram.histogram_value
    assert value.num == 500 and value.min == pytest.approx(values.min().item())
    assert value.sum == pytest.approx(values.sum().item(), rel=1e-4)
    assert sum(value.bucket) == 500
    counts, _ = np.histogram(values.numpy(), bins=10)
    written = [round(count) for count in value.bucket if count]
    assert written == [count for count in counts if count]


def printed(**arguments):
    """Lines that the printer logs; listened to directly, whatever other tests have done to the handlers of its parents."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("detectron2.utils.events")
    level, disabled = logger.level, logger.manager.disable
    logger.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    logger.addHandler(handler)
    try:
        CommonMetricPrinter(**arguments).write()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logging.disable(disabled)
    return lines


def test_printer():
    with EventStorage() as storage:
        for loss, seconds in ((3.0, 1.0), (1.0, 2.0), (2.0, 9.0)):
            storage.put_scalars(total_loss=loss, loss_mask=loss / 2, time=seconds)
            storage.put_scalar("data_time", 0.5)
            storage.put_scalar("lr", 1e-4, smoothing_hint=False)
            storage.put_scalar("[metric]accuracy", 0.75)
            storage.step()
        storage.iter = 2
        (line,) = printed(max_iter=33)
        for field in (
            "eta: 0:01:00",  # 30 iterations of 2 s
            "iter: 2 ",
            "total_loss: 2 ",
            "loss_mask: 1 ",
            "[metric]accuracy: 0.75",
            " time: 4.0000",
            "last_time: 9.0000",
            "data_time: 0.5000",
            "lr: 0.0001",
        ):
            assert field in line, (field, line)
        assert storage.latest()["eta_seconds"] == (60.0, 2)
        (line,) = printed()
        assert "eta" not in line and "iter: 2" in line
        storage.iter = 33
        assert printed(max_iter=33) == []
