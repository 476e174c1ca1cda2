"""Results: semantic, instance and panoptic, where Hugging Face's post-processing does what the papers describe.

Its functions resize Mask2Former's masks to 384x384 first, hence images of that size; MaskFormer's stay at stride 4.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from huggingface_pairs import pair, predict_theirs, transformers

from mask2former_plugin.modeling.inference import (
    ImageMasks,
    InstanceTask,
    PanopticTask,
    SemanticTask,
    needed_queries,
    run_tasks,
)

SIDE = 384
QUERIES, CLASSES = 12, 6


def processor(name):
    project = "Mask2Former" if name.startswith("mask2former") else "MaskFormer"
    return getattr(transformers, f"{project}ImageProcessor")()


def as_outputs(classes, masks):
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def random_predictions(confidence):
    """Class logits and smooth mask logits of one image, ``[Q, K+1]`` and ``[Q, 96, 96]``."""
    classes = torch.randn(QUERIES, CLASSES + 1, dtype=torch.float64) * confidence
    masks = F.interpolate(torch.randn(1, QUERIES, 5, 5, dtype=torch.float64) * 4, size=(96, 96), mode="bicubic")[0]
    return classes, masks


def run_ours(name, classes, masks, make_task):
    """One task on predictions of one image, at the size at which Hugging Face's function works."""
    size = (SIDE, SIDE) if name.startswith("mask2former") else tuple(masks.shape[-2:])
    task = make_task(classes, size)
    image = ImageMasks(masks[task.queries], size, size)
    return run_tasks([task], needed_queries([task]), image)[task.name]


def assert_same_instances(ours, segmentation, segments):
    """As sets: either order is unspecified, and instances with empty masks exist in ours only (their score is 0)."""
    kept = [i for i in range(len(ours)) if ours.pred_masks[i].any()]
    assert len(kept) == len(segments) == len(segmentation) > 3
    for mask, segment in zip(segmentation.bool(), segments):
        same = [
            i
            for i in kept
            if ours.pred_classes[i] == segment["label_id"]
            and abs(ours.scores[i] - segment["score"]) < 1e-6  # theirs are rounded to six digits
            and torch.equal(ours.pred_masks[i], mask)
        ]
        assert len(same) == 1
        kept.remove(same[0])


def merged(segmentation, segments):
    """One row for each id: Hugging Face has one for each part of a fused segment."""
    rows = {s["id"]: s["label_id"] for s in segments}
    assert set(rows) == set(segmentation.unique().tolist()) - {0}
    return [{"id": i, "category_id": rows[i]} for i in sorted(rows)]


@pytest.mark.parametrize("name", ["mask2former", "maskformer"])
def test_semantic(name):
    classes, masks = random_predictions(2.0)
    scores = run_ours(name, classes, masks, SemanticTask)
    (theirs,) = processor(name).post_process_semantic_segmentation(
        as_outputs(classes[None], masks[None]), target_sizes=[tuple(scores.shape[1:])], return_segmentation_scores=True
    )
    torch.testing.assert_close(scores, theirs.segmentation_scores, rtol=0, atol=1e-6)
    assert torch.equal(scores.argmax(0), theirs.segmentation)


@pytest.mark.parametrize("name", ["mask2former", "maskformer"])
def test_instances(name):
    classes, masks = random_predictions(2.0)
    ours = run_ours(name, classes, masks, lambda c, s: InstanceTask(c, s, top_k=QUERIES))
    (theirs,) = processor(name).post_process_instance_segmentation(
        as_outputs(classes[None], masks[None]), threshold=0.0, target_sizes=[ours.image_size], return_binary_maps=True
    )
    assert_same_instances(ours, theirs["segmentation"], theirs["segments_info"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mask2former", "maskformer"])
def test_panoptic(name, seed):
    # Where Hugging Face is right: class scores of practically 1, so that its product of class and mask probability is
    # the mask probability of the area rule (fact sheet 3.5); and MaskFormer's rule, which paints every argmax pixel.
    torch.manual_seed(seed)
    classes, masks = random_predictions(2.0)
    classes = F.one_hot(classes.argmax(-1), CLASSES + 1).to(classes) * 60
    ids, segments = run_ours(
        name,
        classes,
        masks,
        lambda c, s: PanopticTask(
            c,
            s,
            thing_classes=range(CLASSES),
            object_mask_threshold=0.8,
            overlap_threshold=0.1,
            require_mask=False,
        ),
    )
    (theirs,) = processor(name).post_process_panoptic_segmentation(
        as_outputs(classes[None], masks[None]),
        threshold=0.8,
        overlap_mask_area_threshold=0.1,
        label_ids_to_fuse=set(),
        target_sizes=[tuple(ids.shape)],
    )
    assert len(segments) > 2
    assert torch.equal(ids, theirs["segmentation"])
    assert [{"id": s["id"], "category_id": s["category_id"]} for s in segments] == merged(ids, theirs["segments_info"])


def test_networks_and_postprocessing():
    theirs, ours = pair("mask2former_r50", torch.float64)
    images = torch.randint(0, 256, (1, 3, SIDE, SIDE))
    ours.eval().test_topk_per_image = QUERIES
    ours.panoptic_on = False
    with torch.no_grad():
        outputs = theirs((images - ours.pixel_mean) / ours.pixel_std)
        (result,) = ours([{"image": images[0]}])
    theirs_processor = processor("mask2former")
    (semantic,) = theirs_processor.post_process_semantic_segmentation(
        outputs, target_sizes=[(SIDE, SIDE)], return_segmentation_scores=True
    )
    (instances,) = theirs_processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(SIDE, SIDE)], return_binary_maps=True
    )
    torch.testing.assert_close(result["sem_seg"], semantic.segmentation_scores, rtol=0, atol=1e-6)
    assert_same_instances(result["instances"], instances["segmentation"], instances["segments_info"])


def test_resized_class_scores():
    # Hugging Face resizes class scores to the target size, which is the originals' order for semantic results alone
    theirs, ours = pair(
        "mask2former_r50",
        torch.float64,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON", False,
    )  # fmt: skip
    images = torch.randint(0, 256, (1, 3, SIDE, SIDE))
    with torch.no_grad():
        outputs = theirs((images - ours.pixel_mean) / ours.pixel_std)
        (result,) = ours.eval()([{"image": images[0], "height": 300, "width": 500}])
    (expected,) = processor("mask2former").post_process_semantic_segmentation(
        outputs, target_sizes=[(300, 500)], return_segmentation_scores=True
    )
    torch.testing.assert_close(result["sem_seg"], expected.segmentation_scores, rtol=0, atol=1e-6)


def test_unequal_images():
    # Hugging Face stretches the padded canvas onto every image (fact sheet 3.1): the right result crops its logits
    theirs, ours = pair("mask2former_swin_t", torch.float64)
    sizes, output = [(61, 96), (90, 47)], (100, 80)
    inputs = [{"image": torch.randint(0, 256, (3, *size)), "height": output[0], "width": output[1]} for size in sizes]
    padded = torch.zeros(2, 3, 96, 96, dtype=torch.float64)
    for image, x, (height, width) in zip(padded, inputs, sizes):
        image[:, :height, :width] = (x["image"] - ours.pixel_mean) / ours.pixel_std
    ours.eval().panoptic_on = False
    with torch.no_grad():
        results = ours(inputs)
        classes, masks = predict_theirs(theirs, padded)[0]
    masks = F.interpolate(masks, size=(96, 96), mode="bilinear", align_corners=False)
    for result, size, image_classes, image_masks in zip(results, sizes, classes, masks):
        cropped = image_masks[None, :, : size[0], : size[1]]
        probability = F.interpolate(cropped, size=output, mode="bilinear", align_corners=False)[0].sigmoid()
        expected = torch.einsum("qc,qhw->chw", image_classes.softmax(-1)[:, :-1], probability)
        torch.testing.assert_close(result["sem_seg"], expected, rtol=0, atol=1e-6)


def test_normalised_pixels():
    # scales 0..1 and 0..255 with the statistics of either side, padded at the bottom and on the right
    _, ours = pair("mask2former_swin_t", torch.float32)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in [(61, 96), (90, 47)]]
    theirs = processor("mask2former")(
        [i.numpy() for i in images], do_resize=False, return_tensors="pt", input_data_format="channels_first"
    )
    padded = ImageList.from_tensors([(i - ours.pixel_mean) / ours.pixel_std for i in images])
    torch.testing.assert_close(padded.tensor, theirs["pixel_values"], rtol=0, atol=1e-5)
