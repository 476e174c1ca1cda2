"""Test-time augmentation: what commutes with flips and scales must not change, what disagrees must be averaged."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fvcore.transforms import HFlipTransform, NoOpTransform, TransformList
from PIL import Image
from torch import nn

from mask2former_plugin.config import load_config
from mask2former_plugin.modeling.inference.light_outputs import LabelMap
from mask2former_plugin.modeling.inference.query_fusion import FusedPasses, Pass, group_queries
from mask2former_plugin.modeling.inference.windows import WindowOptions
from mask2former_plugin.modeling.mask_logits import MaskLogits, MaskPrediction
from mask2former_plugin.modeling.meta_arch import MaskFormer
from mask2former_plugin.test_time_augmentation import (
    MaskClassificationWithTTA,
    SemanticSegmentorWithTTA,
    build_model_with_TTA,
)

CLASSES, QUERIES = 4, 6
THINGS = {5: 0, 6: 1}


def config(*sizes, flip):
    return load_config(opts=["TEST.AUG.MIN_SIZES", str(sizes), "TEST.AUG.FLIP", str(flip), "INPUT.FORMAT", "RGB"])


# ---------------------------------------------------------------------------------------------------------- semantic


class PixelwiseScores(nn.Module):
    """Scores that depend on a pixel's own colour, resized to the output size; counts calls."""

    def __init__(self):
        super().__init__()
        self.batch_sizes = []

    def forward(self, batched_inputs):
        self.batch_sizes.append(len(batched_inputs))
        results = []
        for x in batched_inputs:
            scores = torch.stack([x["image"][0].float(), 255 - x["image"][1].float()])
            results.append({"sem_seg": F.interpolate(scores[None], (x["height"], x["width"]), mode="bilinear")[0]})
        return results


def random_input(height=32, width=48, output=None):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    output = output or (height, width)
    return {"image": image, "height": output[0], "width": output[1]}


def test_flips_of_an_equivariant_model_change_nothing():
    x = random_input()
    model = PixelwiseScores()
    plain = model([x])[0]["sem_seg"]
    augmented = SemanticSegmentorWithTTA(config(32, flip=True), model)([x])[0]
    assert set(augmented) == {"sem_seg"}
    torch.testing.assert_close(augmented["sem_seg"], plain, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_that_of_the_model(training):
    model = PixelwiseScores().train(training)
    assert SemanticSegmentorWithTTA(config(32, flip=True), model).training == training
    assert model.training == training


def test_scales_are_averaged_at_the_output_size():
    x = random_input(output=(40, 60))
    model = PixelwiseScores()
    tta = SemanticSegmentorWithTTA(config(16, 32, 64, flip=True), model)
    expected = torch.stack(
        [
            result.flip(2) if index % 2 else result
            for index, result in enumerate(model([copy])[0]["sem_seg"] for copy in tta.tta_mapper(x))
        ]
    ).mean(0)
    torch.testing.assert_close(tta([x])[0]["sem_seg"], expected)


@pytest.mark.parametrize("batch_size, calls", [(1, [1] * 6), (4, [4, 2]), (8, [6])])
def test_batches_of_copies_give_the_same(batch_size, calls):
    x = random_input()
    model = PixelwiseScores()
    one_by_one = SemanticSegmentorWithTTA(config(16, 32, 48, flip=True), model)([x])[0]["sem_seg"]
    model.batch_sizes.clear()
    batched = SemanticSegmentorWithTTA(config(16, 32, 48, flip=True), model, batch_size=batch_size)([x])[0]["sem_seg"]
    torch.testing.assert_close(batched, one_by_one)
    assert model.batch_sizes == calls


def test_image_is_read_from_its_file(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "photo.png")
    tta = SemanticSegmentorWithTTA(config(16, flip=True), PixelwiseScores())
    from_file = tta([{"file_name": str(tmp_path / "photo.png")}])[0]["sem_seg"]
    image = torch.from_numpy(array).permute(2, 0, 1)
    torch.testing.assert_close(from_file, tta([{"image": image, "height": 16, "width": 24}])[0]["sem_seg"])


# ---------------------------------------------------------------------------------------------- instances and panoptic


class Pooled(nn.Module):
    """Backbone: means of 4x4 pixels, which commute with flips of images whose sides are multiples of 4."""

    size_divisibility = 32

    def forward(self, images):
        return F.avg_pool2d(images, 4)


class ColourHead(nn.Module):
    """Masks are fixed combinations of the colours, classes are fixed: equivariant under flips."""

    num_classes = CLASSES

    def __init__(self):
        super().__init__()
        self.class_logits = torch.randn(1, QUERIES, CLASSES + 1) * 3
        self.embed = torch.randn(1, QUERIES, 3) * 2

    def forward(self, features):
        masks = MaskLogits(self.embed, features)
        return MaskPrediction(pred_logits=self.class_logits, mask_logits=masks, aux_outputs=[])


class ShuffledHead(ColourHead):
    """The same with the queries in another order at every call."""

    def forward(self, features):
        order = torch.randperm(QUERIES)
        return MaskPrediction(
            pred_logits=self.class_logits[:, order],
            mask_logits=MaskLogits(self.embed[:, order], features),
            aux_outputs=[],
        )


def make_model(head, **options):
    arguments = {
        "backbone": Pooled(),
        "sem_seg_head": head,
        "criterion": nn.Identity(),
        "num_queries": QUERIES,
        "object_mask_threshold": 0.3,
        "overlap_threshold": 0.2,
        "metadata": SimpleNamespace(name="some_dataset", thing_dataset_id_to_contiguous_id=THINGS),
        "size_divisibility": 32,
        "sem_seg_postprocess_before_inference": False,
        "pixel_mean": (127.5,) * 3,
        "pixel_std": (60.0,) * 3,
        "panoptic_on": True,
        "instance_on": True,
        "test_topk_per_image": 10,
        **options,
    }
    return MaskFormer(**arguments).eval()


def smooth_input(height=64, width=96, output=None):
    """Colours that vary slowly, so that masks are regions."""
    coarse = torch.rand(1, 3, 5, 6) * 255
    image = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).round().to(torch.uint8)[0]
    output = output or (height, width)
    return {"image": image, "height": output[0], "width": output[1]}


def by_score(instances):
    order = instances.scores.argsort(descending=True)
    return instances.scores[order], instances.pred_classes[order], instances.pred_masks[order]


def assert_same_results(augmented, plain):
    torch.testing.assert_close(augmented["sem_seg"], plain["sem_seg"])
    assert torch.equal(augmented["panoptic_seg"][0], plain["panoptic_seg"][0])
    assert augmented["panoptic_seg"][1] == plain["panoptic_seg"][1]
    assert len(plain["panoptic_seg"][1]) > 0 and len(plain["instances"]) > 0
    scores, classes, masks = by_score(augmented["instances"])
    plain_scores, plain_classes, plain_masks = by_score(plain["instances"])
    torch.testing.assert_close(scores, plain_scores)
    assert torch.equal(classes, plain_classes) and torch.equal(masks, plain_masks)


@pytest.mark.parametrize("output", [None, (128, 192)])
def test_flips_of_an_equivariant_network_change_no_result(output):
    x = smooth_input(output=output)
    model = make_model(ColourHead())
    plain = model([x])[0]
    augmented = build_model_with_TTA(config(64, flip=True), model)([x])[0]
    assert set(augmented) == {"sem_seg", "panoptic_seg", "instances"}
    assert_same_results(augmented, plain)


def test_one_pass_alone_is_the_model():
    x = smooth_input(height=50, width=75, output=(61, 83))
    model = make_model(ColourHead())
    assert_same_results(MaskClassificationWithTTA(config(50, flip=False), model)([x])[0], model([x])[0])


def test_the_order_of_the_queries_does_not_matter():
    x = smooth_input()
    head = ShuffledHead()
    plain_head = ColourHead()
    plain_head.class_logits, plain_head.embed = head.class_logits, head.embed
    plain = make_model(plain_head)([x])[0]
    augmented = MaskClassificationWithTTA(config(64, flip=True), make_model(head))([x])[0]
    scores, classes, masks = by_score(augmented["instances"])
    plain_scores, plain_classes, plain_masks = by_score(plain["instances"])
    torch.testing.assert_close(scores, plain_scores)
    assert torch.equal(classes, plain_classes) and torch.equal(masks, plain_masks)
    # numbers of segments follow the order of the queries, the regions do not
    for ours, theirs in ((augmented, plain), (plain, augmented)):
        for segment in ours["panoptic_seg"][1]:
            region = ours["panoptic_seg"][0] == segment["id"]
            (other,) = theirs["panoptic_seg"][0][region].unique().tolist()
            assert torch.equal(theirs["panoptic_seg"][0] == other, region)


def test_padding_and_scales_keep_the_regions():
    """Sides that are no multiples of anything, three scales: regions agree but for pixels near their contours."""
    x = smooth_input(height=90, width=130)
    model = make_model(ColourHead())
    plain = model([x])[0]["sem_seg"].argmax(0)
    augmented = MaskClassificationWithTTA(config(70, 90, 120, flip=True), model)([x])[0]
    assert (augmented["sem_seg"].argmax(0) == plain).float().mean() > 0.95
    panoptic = model([x])[0]["panoptic_seg"][0]
    same = (augmented["panoptic_seg"][0] > 0) == (panoptic > 0)
    assert same.float().mean() > 0.9


def one_hot_logits(labels, certainty):
    """Class logits whose softmax gives the label ``certainty`` and the rest of it to "no object"."""
    probability = torch.full((len(labels), CLASSES + 1), 1e-12)
    for row, label in zip(probability, labels):
        row[-1] = 1 - certainty
        row[label] = certainty
    return probability.log()


def box_masks(*boxes, size=(32, 32)):
    """Logits ±4 of boxes (y0, y1, x0, x1) as one-channel factors, one query each."""
    dense = torch.full((1, len(boxes), *size), -4.0)
    for mask, (y0, y1, x0, x1) in zip(dense[0], boxes):
        mask[y0:y1, x0:x1] = 4.0
    return MaskLogits(torch.eye(len(boxes))[None], dense)


def make_pass(labels, boxes, certainty=0.9, flipped=False):
    return Pass(one_hot_logits(labels, certainty), box_masks(*boxes), (32, 32), (32, 32), flipped)


LEFT, RIGHT, LEFT_SHIFTED = (4, 20, 2, 14), (4, 20, 18, 30), (4, 20, 4, 16)


def test_disagreeing_passes_are_averaged():
    passes = [make_pass([0, 1], [LEFT, RIGHT], 0.9), make_pass([1, 0], [RIGHT, LEFT_SHIFTED], 0.7)]
    fused = FusedPasses(passes)
    probability = fused.class_logits().softmax(1)
    torch.testing.assert_close(probability[0, 0], torch.tensor(0.8))
    torch.testing.assert_close(probability[1, 1], torch.tensor(0.8))
    rows = fused.masks(torch.tensor([0, 1]), (32, 32)).block((0, 32), (0, 32)).sigmoid()
    first = passes[0].masks.dense()[0].sigmoid()
    second = passes[1].masks.dense()[0].sigmoid()
    torch.testing.assert_close(rows[0], (first[0] + second[1]) / 2)
    torch.testing.assert_close(rows[1], (first[1] + second[0]) / 2)


def test_mirrored_pass_is_mirrored_back():
    mirrored = [(y0, y1, 32 - x1, 32 - x0) for y0, y1, x0, x1 in (LEFT, RIGHT)]
    fused = FusedPasses([make_pass([0, 1], [LEFT, RIGHT]), make_pass([0, 1], mirrored, flipped=True)])
    rows = fused.masks(torch.tensor([0, 1]), (32, 32)).block((0, 32), (0, 32))
    torch.testing.assert_close(rows, box_masks(LEFT, RIGHT).dense()[0])
    assert len(fused.class_logits()) == 2


def test_object_of_one_pass_keeps_its_mask_and_halves_its_score():
    no_object = CLASSES
    passes = [make_pass([0, no_object], [LEFT, LEFT]), make_pass([0, 1], [LEFT, RIGHT])]
    fused = FusedPasses(passes)
    probability = fused.class_logits().softmax(1)
    assert len(probability) == 3  # two queries of the first pass, and what only the second one found
    torch.testing.assert_close(probability[2, 1], torch.tensor(0.45))
    rows = fused.masks(torch.tensor([2]), (32, 32)).block((0, 32), (0, 32))
    torch.testing.assert_close(rows[0], box_masks(RIGHT).dense()[0, 0])


def test_classes_decide_between_equal_masks():
    probability = [one_hot_logits(labels, 0.9).softmax(1) for labels in ([0, 1], [1, 0])]
    masks = [box_masks(LEFT, LEFT).dense()[0].sigmoid().flatten(1)] * 2
    assert group_queries(probability, masks).tolist() == [[0, 1], [1, 0]]


def test_no_object_of_later_passes_starts_no_group():
    probability = [one_hot_logits([0], 0.9).softmax(1), one_hot_logits([CLASSES], 0.9).softmax(1)]
    masks = [box_masks(box).dense()[0].sigmoid().flatten(1) for box in (LEFT, RIGHT)]
    assert group_queries(probability, masks).tolist() == [[0, -1]]


def test_groups_follow_the_mean_of_earlier_passes():
    """An object of the third pass joins the group that the second one has started."""
    probability = [one_hot_logits([label], 0.9).softmax(1) for label in (0, 1, 1)]
    masks = [box_masks(box).dense()[0].sigmoid().flatten(1) for box in (LEFT, RIGHT, RIGHT)]
    assert group_queries(probability, masks).tolist() == [[0, -1, -1], [-1, 0, 0]]


def test_groups_follow_the_mean_of_earlier_classes():
    """The first pass is hardly sure of the classes, the second one is, and of others; the third has equal masks."""
    unsure = torch.zeros(2, CLASSES + 1)
    unsure[:, :2] = torch.tensor([[0.55, 0.45], [0.45, 0.55]])
    probability = [unsure, one_hot_logits([1, 0], 0.99).softmax(1), one_hot_logits([0, 1], 0.99).softmax(1)]
    between = (4, 20, 3, 15)
    boxes = [(LEFT, LEFT_SHIFTED)] * 2 + [(between, between)]
    masks = [box_masks(*pair).dense()[0].sigmoid().flatten(1) for pair in boxes]
    assert group_queries(probability, masks).tolist() == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("flipped", [(False, True), (True, True)])
def test_mirrored_passes_in_tiles(flipped):
    """Blocks and their bounds are those of the whole map, whatever side of it they are on."""
    strength = torch.linspace(0.1, 3, 24)  # of the right side more than of the left
    masks = [MaskLogits(torch.randn(1, 2, 4), torch.randn(1, 4, 16, 24) * strength) for _ in flipped]
    passes = [Pass(one_hot_logits([0, 1], 0.9), *one, (64, 96), (60, 90), mirror) for *one, mirror in zip(masks, flipped)]
    size, groups = (71, 101), torch.tensor([0, 1])
    masks = FusedPasses(passes).masks(groups, size)
    whole = masks.block((0, size[0]), (0, size[1]))
    assert (whole - whole.flip(2)).abs().mean() > 0.1
    rows, columns = [(0, 20), (20, 71)], [(0, 30), (30, 37), (37, 101)]
    low, high = (bound.unflatten(1, (2, 3)) for bound in masks.bounds(rows, columns))
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            block = whole[:, slice(*row), slice(*column)]
            torch.testing.assert_close(masks.block(row, column), block, atol=1e-5, rtol=0)
            assert (low[:, r, c] <= block.amin((1, 2)) + 1e-5).all()
            assert (block.amax((1, 2)) <= high[:, r, c] + 1e-5).all()
            torch.testing.assert_close(masks.block(row, column, torch.tensor([1])), block[1:], atol=1e-5, rtol=0)


def test_choice_follows_the_tasks():
    cfg = config(64, flip=True)
    assert isinstance(build_model_with_TTA(cfg, make_model(ColourHead())), MaskClassificationWithTTA)
    semantic_only = make_model(ColourHead(), panoptic_on=False, instance_on=False)
    assert isinstance(build_model_with_TTA(cfg, semantic_only), SemanticSegmentorWithTTA)
    assert isinstance(build_model_with_TTA(cfg, PixelwiseScores()), SemanticSegmentorWithTTA)


def test_nothing_found_is_an_empty_result():
    head = ColourHead()
    head.class_logits = torch.zeros_like(head.class_logits)
    head.class_logits[..., -1] = 20.0
    x = smooth_input()
    result = MaskClassificationWithTTA(config(64, flip=True), make_model(head, instance_on=False))([x])[0]
    ids, segments = result["panoptic_seg"]
    assert segments == [] and not ids.any() and tuple(ids.shape) == (64, 96)


def test_flipped_copies_are_recognised_by_their_transforms():
    """A mapper of the user's own may order the copies as it likes."""
    x = smooth_input()

    def mapper(x):
        transforms = TransformList([NoOpTransform(), HFlipTransform(96)])
        mirrored = {**x, "image": x["image"].flip(2), "transforms": transforms}
        return [mirrored, {**x, "transforms": TransformList([NoOpTransform()])}]

    model = make_model(ColourHead())
    augmented = MaskClassificationWithTTA(config(64, flip=False), model, tta_mapper=mapper)([x])[0]
    assert_same_results(augmented, model([x])[0])


# ---------------------------------------------------------------------------------------------------------- in windows


def in_windows(head, **options):
    options = {"panoptic_on": False, "instance_on": False, "sem_seg_postprocess_before_inference": True, **options}
    return make_model(head, **{"windows": WindowOptions((32, 64), 16), **options})


@pytest.mark.parametrize("windows", [None, WindowOptions((32, 64), 16)])
@pytest.mark.parametrize("masks_first", [True, False])
@pytest.mark.parametrize("output", [(64, 96), (100, 151)])
def test_semantic_scores_are_averaged(windows, masks_first, output):
    """Flips and scales, whole or cut into windows of its own size: the mean of what the model gives of each copy."""
    x = smooth_input(output=output)
    model = in_windows(ColourHead(), windows=windows, sem_seg_postprocess_before_inference=masks_first)
    tta = build_model_with_TTA(config(64, 80, 128, flip=True), model)
    expected = torch.zeros(CLASSES, *output)
    copies = tta.tta_mapper(x)
    assert len(copies) == 6 and len({copy["image"].shape for copy in copies}) == 3
    for index, copy in enumerate(copies):
        scores = model([{key: copy[key] for key in ("image", "height", "width")}])[0]["sem_seg"]
        expected += (scores.flip(2) if index % 2 else scores) / 6
    torch.testing.assert_close(tta([x])[0]["sem_seg"], expected, rtol=1e-5, atol=1e-6)
    model.semantic_label_map = True
    labels = tta([x])[0]["sem_seg"]
    assert type(labels) is LabelMap and model.semantic_label_map
    chosen, best = expected.gather(0, labels.argmax(dim=0)[None])[0], expected.amax(0)
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=0)


def test_semantic_scores_in_windows_are_those_of_the_whole_image():
    """Apart from pixels near the borders of windows, which lack neighbours when masks are resized."""
    x, head = smooth_input(), ColourHead()
    windows, whole = (build_model_with_TTA(config(64, 128, flip=True), in_windows(head)) for _ in range(2))
    whole.model.windows = None
    found, expected = (tta([x])[0]["sem_seg"] for tta in (windows, whole))
    difference = (found - expected).abs().amax(0)
    assert 0 < difference.mean() < 0.005
    assert (found.argmax(0) == expected.argmax(0)).float().mean() > 0.99


def test_flips_in_windows_change_nothing():
    """Windows are spread evenly, so those of the mirror image are the mirror images of the windows."""
    x = smooth_input()
    model = in_windows(ColourHead())
    augmented = build_model_with_TTA(config(64, flip=True), model)([x])[0]["sem_seg"]
    torch.testing.assert_close(augmented, model([x])[0]["sem_seg"])
