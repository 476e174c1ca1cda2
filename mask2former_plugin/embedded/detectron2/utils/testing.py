"""Helpers of tests."""

from __future__ import annotations

import io
from typing import Any

import torch

from detectron2.utils.missing import needs_upstream


def random_boxes(num_boxes: int, max_coord: float = 100, device: str | torch.device = "cpu") -> torch.Tensor:
    """Random boxes (num_boxes, 4), XYXY, inside ``[0, max_coord]`` and at least one unit wide and high."""
    corners = torch.rand(num_boxes, 2, device=device) * (max_coord / 2)
    sizes = (torch.rand(num_boxes, 2, device=device) * (max_coord / 2)).clamp(min=1.0)
    return torch.cat([corners, corners + sizes], dim=1)


def reload_script_model(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Save a scripted module and load it again."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def assert_instances_allclose(
    input: Any, other: Any, *, rtol: float = 1e-5, msg: str = "", size_as_tensor: bool = False
) -> None:
    """Check that two ``Instances`` have the same fields with close values.

    Raises:
        AssertionError: with the first difference.
    """
    size, other_size = (torch.as_tensor(instances.image_size) for instances in (input, other))
    assert torch.equal(size, other_size) if size_as_tensor else input.image_size == other.image_size, (
        f"{msg}image sizes differ: {input.image_size} and {other.image_size}"
    )
    fields, other_fields = input.get_fields(), other.get_fields()
    assert sorted(fields) == sorted(other_fields), f"{msg}fields differ: {sorted(fields)} and {sorted(other_fields)}"
    for name, value in fields.items():
        if hasattr(value, "tensor"):
            same = torch.allclose(value.tensor.double(), other_fields[name].tensor.double(), rtol=rtol)
        elif isinstance(value, torch.Tensor):
            same = torch.allclose(value.double(), other_fields[name].double(), rtol=rtol)
        else:
            same = value == other_fields[name]
        assert same, f"{msg}field {name!r} differs: {value} and {other_fields[name]}"


def reload_lazy_config(cfg: Any) -> Any:
    """Save a LazyConfig and load it again."""
    needs_upstream("LazyConfig")


def get_model_no_weights(config_path: str) -> torch.nn.Module:
    """Build a model of the zoo."""
    needs_upstream(f"the model zoo (model of {config_path!r})")
