"""A whole Mask2Former on a GPU: half precision against float32, float32 against the CPU."""

from contextlib import nullcontext

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

DEVICE = "cuda"
# shares of the norm that tens of roundings in a row may change, and with them a few pixels of the attention masks; on a
# CPU 0.03 and 0.002
TOLERANCES = {torch.bfloat16: 0.1, torch.float16: 0.02}

pytestmark = pytest.mark.gpu


@pytest.fixture
def model(small_config):
    cfg = small_config(
        "MODEL.META_ARCHITECTURE", "MaskFormer",
        "MODEL.BACKBONE.NAME", "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.BACKBONE.FREEZE_AT", 0,
        "MODEL.MASK_FORMER.MASK_LOSS", "dense",  # no random points: equal steps on every device
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True,
        "MODEL.DEVICE", DEVICE,
        "DATASETS.TRAIN", ("gpu_test",),
    )  # fmt: skip
    MetadataCatalog.pop("gpu_test", None)
    MetadataCatalog.get("gpu_test").set(thing_dataset_id_to_contiguous_id={7: 0, 9: 2})
    model = build_model(cfg)
    with torch.no_grad():  # the sampling offsets depend on the tokens
        for name, parameter in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                parameter.normal_(std=0.02)
    yield model
    MetadataCatalog.pop("gpu_test", None)


def batch():
    inputs = []
    for height, width, classes in ((96, 128, [0, 2, 4]), (80, 101, [1])):
        masks = torch.zeros(len(classes), height, width, dtype=torch.bool)
        for i, mask in enumerate(masks):
            mask[10 * i : 10 * i + 40, 20 * i : 20 * i + 50] = True
        instances = Instances((height, width), gt_classes=torch.tensor(classes), gt_masks=BitMasks(masks).tensor)
        image = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 11) * 255, (height, width), mode="bicubic")[0]
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def autocast(dtype):
    return nullcontext() if dtype is None else torch.autocast(DEVICE, dtype)


def step(model, inputs, dtype=None):
    """Losses, and the gradient of their sum in one vector."""
    model.train().zero_grad()
    with autocast(dtype):
        losses = model(inputs)
    sum(losses.values()).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {name: float(loss.detach()) for name, loss in losses.items()}, torch.cat(gradients).double()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_predictions_in_half_precision(model, dtype):
    model.eval()
    images = model.preprocess(batch()).tensor
    predictions = []
    with torch.no_grad():
        for precision in (None, dtype):
            with autocast(precision):
                outputs = model.sem_seg_head(model.backbone(images))
            predictions.append([outputs[name].float() for name in ("pred_logits", "pred_masks")])
    for exact, found in zip(*predictions):
        assert (found - exact).norm() < TOLERANCES[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_training_step_in_half_precision(model, dtype):
    inputs = batch()
    exact, direction = step(model, inputs)
    losses, gradient = step(model, inputs, dtype)
    assert losses.keys() == exact.keys()
    assert sum(losses.values()) == pytest.approx(sum(exact.values()), rel=TOLERANCES[dtype])
    assert gradient.isfinite().all()
    cosine = torch.nn.functional.cosine_similarity(gradient, direction, dim=0)
    assert cosine > 1 - TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [None, *TOLERANCES], ids=str)
def test_results(model, dtype):
    with torch.no_grad(), autocast(dtype):
        results = model.eval()(batch())
    for result, inputs in zip(results, batch()):
        size = inputs["height"], inputs["width"]
        assert result["sem_seg"].shape == (5, *size) and result["sem_seg"].isfinite().all()
        assert result["panoptic_seg"][0].shape == size
        assert result["instances"].pred_masks.shape[1:] == size


def test_training_step_equals_the_cpu(model):
    """Convolutions and products without TF32 on both sides; sums in another order."""
    inputs = batch()
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        losses, gradient = step(model, inputs)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags
    expected, wanted = step(model.to("cpu"), inputs)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert (gradient.cpu() - wanted).norm() < 1e-2 * wanted.norm()
