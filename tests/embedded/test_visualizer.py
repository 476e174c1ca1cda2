"""Drawing: what colour which pixel gets, which text stands where, and which object keeps its colour in a video."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from PIL import Image

from detectron2.data import MetadataCatalog
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.colormap import colormap, random_color, random_colors
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, GenericMask, VisImage, Visualizer, _create_text_labels

pytestmark = pytest.mark.embedded_only

HEIGHT, WIDTH = 200, 300


@pytest.fixture
def metadata():
    name = "visualizer_test"
    yield MetadataCatalog.get(name).set(
        thing_classes=["dog", "cat"],
        thing_colors=[[200, 0, 0], [0, 200, 0]],
        stuff_classes=["sky", "sea", "sand"],
        stuff_colors=[[0, 0, 250], [0, 250, 250], [250, 250, 0]],
        thing_dataset_id_to_contiguous_id={5: 0, 6: 1},
        label_divisor=1000,
    )
    MetadataCatalog.remove(name)


@pytest.fixture
def image():
    return np.random.randint(0, 256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)


def box_mask(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def blended(image, color, alpha):
    """The colour (0..255) laid over the image."""
    return (1 - alpha) * image.astype(float) + alpha * np.asarray(color, dtype=float)


def assert_pixels(output, expected, region):
    y, x = region
    assert np.abs(output[y, x].astype(float) - expected[y, x]).max() <= 2  # opacity and colour have eight bits


def texts(visualizer):
    return [text.get_text() for text in visualizer.output.ax.texts]


def as_instances(masks, classes=None, scores=None, **fields):
    masks = torch.from_numpy(np.array(masks))
    instances = Instances((HEIGHT, WIDTH), pred_masks=masks, **fields)
    if classes is not None:
        instances.pred_classes = torch.tensor(classes)
    if scores is not None:
        instances.scores = torch.tensor(scores)
    return instances


# ---- colours ---------------------------------------------------------------------------------------------------------


def test_palette():
    colors = colormap(rgb=True, maximum=255)
    assert colors.shape == (74, 3) and colors.dtype == np.float32
    assert 0 <= colors.min() and colors.max() == 255
    assert (colormap() == colors[:, ::-1]).all()
    assert np.allclose(colormap(rgb=True, maximum=1) * 255, colors)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    assert distance[~np.eye(74, dtype=bool)].min() > 30
    assert distance[:10, :10][~np.eye(10, dtype=bool)].min() > 100  # the first ones are the most different
    with pytest.raises(ValueError, match="100"):
        colormap(maximum=100)


def test_random_colors():
    palette = {tuple(color) for color in colormap(rgb=True, maximum=1).tolist()}
    assert tuple(random_color(rgb=True, maximum=1).tolist()) in palette
    chosen = [tuple(color.tolist()) for color in random_colors(100, rgb=True, maximum=1)]
    assert set(chosen[:74]) == palette and len(chosen) == 100
    assert random_colors(0) == []


# ---- masks and texts -------------------------------------------------------------------------------------------------


def test_generic_mask_forms_agree():
    mask = box_mask(50, 20, 120, 90)
    code = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = np.diff(np.r_[0, np.flatnonzero(np.diff(mask.T.ravel().astype(int))) + 1, mask.size])
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": runs.tolist()}
    polygon = [50.0, 20.0, 120.0, 20.0, 120.0, 90.0, 50.0, 90.0]
    for form in (mask, mask.astype(np.uint8), code, uncompressed, [polygon]):
        generic = GenericMask(form, HEIGHT, WIDTH)
        assert (generic.mask == mask).all() and generic.mask.dtype == np.uint8
        assert generic.area() == 70 * 70 and not generic.has_holes
        assert generic.bbox().tolist() == [50, 20, 120, 90]
    assert GenericMask([polygon], HEIGHT, WIDTH).polygons[0].tolist() == polygon
    outline = GenericMask(mask, HEIGHT, WIDTH).polygons[0].reshape(-1, 2)
    assert outline.min(axis=0).tolist() == [50.5, 20.5] and outline.max(axis=0).tolist() == [119.5, 89.5]
    mask[40:50, 70:80] = False
    generic = GenericMask(mask, HEIGHT, WIDTH)
    assert generic.has_holes and len(generic.polygons) == 2
    empty = GenericMask(np.zeros((HEIGHT, WIDTH)), HEIGHT, WIDTH)
    assert empty.polygons == [] and empty.area() == 0 and empty.bbox().tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(200, 300\)"):
        GenericMask(np.zeros((3, 4)), HEIGHT, WIDTH)
    with pytest.raises(TypeError, match="str"):
        GenericMask("mask", HEIGHT, WIDTH)


def test_text_labels():
    assert _create_text_labels([0, 1], [0.5, 0.876], ["a", "b"]) == ["a 50%", "b 88%"]
    assert _create_text_labels([0, 7], None, ["a"], [0, 1]) == ["a", "7|crowd"]
    assert _create_text_labels(None, [0.25], ["a"]) == ["25%"]
    assert _create_text_labels([3], None, None) == ["3"]
    assert _create_text_labels(None, None, None) is None


def test_vis_image(image, tmp_path):
    assert (VisImage(image).get_image() == image).all()
    doubled = VisImage(image, scale=2).get_image()
    assert (doubled == image.repeat(2, axis=0).repeat(2, axis=1)).all()
    canvas = VisImage(image[:7, :11], scale=1.5)
    assert canvas.get_image().shape == (10, 16, 3) and (canvas.height, canvas.width) == (7, 11)
    canvas = VisImage(image)
    canvas.reset_image(255 - image)
    assert (canvas.get_image() == 255 - image).all()
    canvas.save(str(tmp_path / "out.png"))
    assert (np.array(Image.open(tmp_path / "out.png").convert("RGB")) == 255 - image).all()


# ---- single masks ----------------------------------------------------------------------------------------------------


def test_binary_mask_is_blended(image):
    mask = box_mask(60, 50, 160, 150)
    output = Visualizer(image).draw_binary_mask(mask, color=(1, 0, 0), alpha=0.4).get_image()
    assert_pixels(output, blended(image, (255, 0, 0), 0.4), np.s_[55:145, 65:155])
    outside = ~box_mask(58, 48, 162, 152)
    assert (output[outside] == image[outside]).all()


def test_mask_with_hole(image):
    mask = box_mask(60, 50, 160, 150) & ~box_mask(90, 80, 120, 110)
    output = Visualizer(image).draw_binary_mask(mask, color="blue", alpha=0.5).get_image()
    expected = np.where(mask[..., None], blended(image, (0, 0, 255), 0.5), image)
    assert np.abs(output - expected).max() <= 2  # to the pixel: without an outline
    outlined = Visualizer(image).draw_binary_mask(mask, color="blue", edge_color="white", alpha=0.5).get_image()
    changed = (outlined != output).any(axis=-1)
    assert changed[100, 55:65].any() and changed[100, 86:94].any() and not changed[100, 65:85].any()


def test_small_parts_and_tiny_masks(image):
    mask = box_mask(10, 10, 13, 12)  # six pixels
    assert (Visualizer(image).draw_binary_mask(mask, color="red").get_image() == image).all()
    for tiny in (mask, box_mask(10, 10, 11, 11), box_mask(10, 10, 12, 11)):
        output = Visualizer(image).draw_binary_mask(tiny, color="red", area_threshold=0).get_image()
        assert (output[10, 10] != image[10, 10]).any()
    assert (Visualizer(image).draw_binary_mask(np.zeros_like(mask), text="x").get_image() == image).all()


def test_soft_mask(image):
    soft = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    soft[50:150, 60:160] = np.linspace(0, 1, 100)[:, None]
    visualizer = Visualizer(image)
    output = visualizer.draw_soft_mask(soft, color="lime", text="soft", alpha=0.8).get_image()
    opacity = soft[..., None] * 0.8
    assert_pixels(output, (1 - opacity) * image + opacity * np.array([0, 255, 0]), np.s_[50:90, 60:160])
    x, y = visualizer.output.ax.texts[0].get_position()
    assert texts(visualizer) == ["soft"] and 60 < x < 160 and 100 < y < 150  # where the mask is strong


def test_later_masks_lie_above(image):
    ring = box_mask(60, 50, 160, 150) & ~box_mask(100, 90, 105, 95)
    for first, second in ((ring, box_mask(70, 60, 95, 85)), (box_mask(40, 40, 200, 180), ring)):
        visualizer = Visualizer(image)
        visualizer.draw_binary_mask(first, color="red", alpha=1)
        output = visualizer.draw_binary_mask(second, color="blue", alpha=1).get_image()
        assert output[72, 80].tolist() == [0, 0, 255]


# ---- whole results ---------------------------------------------------------------------------------------------------


def test_sem_seg(image, metadata):
    labels = np.full((HEIGHT, WIDTH), 255)
    labels[:90], labels[100:, :150], labels[100:, 160:] = 0, 2, 7  # 7: no such class
    visualizer = Visualizer(image, metadata)
    output = visualizer.draw_sem_seg(torch.from_numpy(labels)).get_image()
    assert texts(visualizer) == ["sky", "sand"]
    assert_pixels(output, blended(image, (0, 0, 250), 0.8), np.s_[3:30, 3:290])
    assert_pixels(output, blended(image, (250, 250, 0), 0.8), np.s_[105:130, 5:145])
    assert (output[102:, 162:] == image[102:, 162:]).all() and (output[93:97] == image[93:97]).all()
    silent = Visualizer(image, metadata)
    silent.draw_sem_seg(labels, draw_text=False)
    assert texts(silent) == []


def test_panoptic(image, metadata):
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    ids[:100], ids[120:190, 20:120], ids[120:190, 150:250] = 3, 8, 9
    infos = [
        {"id": 8, "category_id": 0, "isthing": True, "score": 0.9},
        {"id": 9, "category_id": 1, "isthing": True, "score": 0.8},
        {"id": 3, "category_id": 1, "isthing": False},
        {"id": 77, "category_id": 1, "isthing": True, "score": 0.8},  # no pixels
    ]
    visualizer = Visualizer(image, metadata)
    output = visualizer.draw_panoptic_seg(torch.from_numpy(ids), infos).get_image()
    assert texts(visualizer) == ["sea", "dog 90%", "cat 80%"]
    assert_pixels(output, blended(image, (0, 250, 250), 0.7), np.s_[5:30, 5:290])
    for (_, x, y), text in zip([(3, 150, 50), (8, 70, 155), (9, 200, 155)], visualizer.output.ax.texts):
        assert np.abs(np.array(text.get_position()) - (x, y)).max() <= 105
    # The colour of a thing is that of its class, moved by half a unit at most.
    seen = (output[125, 25].astype(float) - 0.3 * image[125, 25]) / 0.7 / 255
    assert np.linalg.norm(seen - np.array([200, 0, 0]) / 255) < 0.52
    assert (output[110, :] == image[110, :]).all()
    for text, number in zip(visualizer.output.ax.texts, (3, 8, 9)):
        x, y = text.get_position()
        assert ids[int(y), int(x)] == number
    assert Visualizer.draw_panoptic_seg_predictions is Visualizer.draw_panoptic_seg

    divided = np.full((HEIGHT, WIDTH), -1)
    divided[:100], divided[120:190, 20:120] = 2000, 1001  # stuff 2, thing 1
    visualizer = Visualizer(image, metadata)
    visualizer.draw_panoptic_seg(torch.from_numpy(divided), None)
    assert texts(visualizer) == ["sand", "cat"]


def test_instance_predictions(image, metadata):
    masks = [box_mask(20, 20, 60, 60), box_mask(100, 50, 280, 180)]
    boxes = BitMasks(torch.from_numpy(np.array(masks))).get_bounding_boxes()
    instances = as_instances(masks, [0, 1], [0.75, 0.5], pred_boxes=boxes)
    visualizer = Visualizer(image, metadata, instance_mode=ColorMode.SEGMENTATION)
    output = visualizer.draw_instance_predictions(instances, jittering=False).get_image()
    assert texts(visualizer) == ["cat 50%", "dog 75%"]  # the largest first
    assert_pixels(output, blended(image, (0, 200, 0), 0.8), np.s_[100:170, 110:270])
    visualizer = Visualizer(image, metadata, instance_mode=ColorMode.IMAGE_BW)
    output = visualizer.draw_instance_predictions(instances).get_image()
    gray = image.mean(axis=2).round()
    assert (output[190:, :, 0] == gray[190:]).all() and (output[190:, :, 2] == gray[190:]).all()
    palette = colormap(rgb=True)
    assert_pixels(output, blended(image, palette[1], 0.3), np.s_[100:170, 110:270])
    # Nothing predicted: the picture in grey, and no error.
    nothing = (
        Visualizer(image, metadata, instance_mode=ColorMode.IMAGE_BW)
        .draw_instance_predictions(instances[:0])
        .get_image()
    )
    assert (nothing == gray[..., None]).all()


def test_boxes_of_zeros_are_no_boxes(image, metadata):
    instances = as_instances([box_mask(20, 20, 60, 60)], [0], [0.75], pred_boxes=Boxes(torch.zeros(1, 4)))
    visualizer = Visualizer(image, metadata)
    visualizer.draw_instance_predictions(instances)
    assert 20 < visualizer.output.ax.texts[0].get_position()[0] < 60
    assert not any(type(patch).__name__ == "Rectangle" for patch in visualizer.output.ax.patches)


def test_without_metadata(image):
    instances = as_instances([box_mask(20, 20, 60, 60)], [4], [0.75])
    visualizer = Visualizer(image)
    visualizer.draw_instance_predictions(instances)
    visualizer.draw_sem_seg(np.full((HEIGHT, WIDTH), 5))
    visualizer.draw_panoptic_seg(np.full((HEIGHT, WIDTH), 5), [{"id": 5, "category_id": 90, "isthing": False}])
    assert texts(visualizer) == ["4 75%", "5", "90"]


@pytest.mark.parametrize("form", ["array", "tensor", "BitMasks", "PolygonMasks", "polygons", "codes"])
def test_overlay_takes_masks_of_any_kind(image, form):
    masks = np.array([box_mask(20, 30, 60, 90), box_mask(100, 50, 280, 180)])
    polygons = [
        [[20.5, 30.5, 59.5, 30.5, 59.5, 89.5, 20.5, 89.5]],
        [[100.5, 50.5, 279.5, 50.5, 279.5, 179.5, 100.5, 179.5]],
    ]
    given = {
        "array": lambda: masks,
        "tensor": lambda: torch.from_numpy(masks),
        "BitMasks": lambda: BitMasks(torch.from_numpy(masks)),
        "PolygonMasks": lambda: PolygonMasks(polygons),
        "polygons": lambda: polygons,
        "codes": lambda: [mask_util.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks],
    }[form]()
    output = Visualizer(image).overlay_instances(masks=given, assigned_colors=["red", (0, 0, 1)]).get_image()
    assert_pixels(output, blended(image, (255, 0, 0), 0.5), np.s_[35:85, 25:55])
    assert_pixels(output, blended(image, (0, 0, 255), 0.5), np.s_[55:175, 105:275])


def test_overlay_of_boxes(image):
    visualizer = Visualizer(image)
    boxes = [[10, 10, 290, 190], [20, 195, 30, 199], [100, 100, 110, 105]]
    visualizer.overlay_instances(boxes=np.array(boxes), labels=["big", "low", "small"])
    places = {text.get_text(): text.get_position() for text in visualizer.output.ax.texts}
    assert places == {"big": (10, 10), "low": (30, 195), "small": (100, 105)}  # beside what is small
    assert Visualizer(image).overlay_instances().get_image().shape == image.shape
    with pytest.raises(ValueError, match="different numbers"):
        visualizer.overlay_instances(boxes=np.array(boxes), labels=["one"])
    with pytest.raises(ValueError, match="boxes or masks"):
        visualizer.overlay_instances(labels=["one"])
    with pytest.raises(NotImplementedError, match="keypoints.*upstream"):
        visualizer.overlay_instances(keypoints=np.zeros((1, 17, 3)))
    with pytest.raises(NotImplementedError, match="upstream"):
        visualizer.overlay_instances(boxes=np.zeros((1, 5)))


def test_shapes(image):
    visualizer = Visualizer(np.zeros_like(image))
    visualizer.draw_box((50, 40, 150, 120), alpha=1, edge_color="red")
    visualizer.draw_circle((200, 100), "lime", radius=10)
    visualizer.draw_line([0, 300], [180, 180], "blue")
    visualizer.draw_polygon(np.array([[10, 10], [40, 10], [40, 30], [10, 30]]), "yellow", alpha=1)
    output = visualizer.get_output().get_image()
    assert output[40, 100].tolist() == [255, 0, 0] and output[80, 100].tolist() == [0, 0, 0]
    assert output[100, 200].tolist() == [0, 255, 0] and output[100, 215].tolist() == [0, 0, 0]
    assert output[180, 150, 2] > 200 and output[20, 25].tolist() == [255, 255, 0]


def test_dataset_dict(image, metadata, tmp_path):
    sem_seg = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    sem_seg[:50] = 1
    Image.fromarray(sem_seg).save(tmp_path / "sem.png")
    panoptic = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    panoptic[150:] = (1, 2, 0)  # id 513
    Image.fromarray(panoptic).save(tmp_path / "pan.png")
    mask = box_mask(200, 60, 280, 140)
    record = {
        "annotations": [
            {
                "bbox": [20, 60, 80, 80],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [[20, 60, 100, 60, 100, 140, 20, 140]],
            },
            {
                "bbox": [200, 60, 280, 140],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 1,
                "iscrowd": 1,
                "segmentation": mask_util.encode(np.asfortranarray(mask.astype(np.uint8))),
            },
        ],
        "sem_seg_file_name": str(tmp_path / "sem.png"),
        "pan_seg_file_name": str(tmp_path / "pan.png"),
        "segments_info": [{"id": 513, "category_id": 2, "isthing": False}],
    }
    visualizer = Visualizer(image, metadata)
    output = visualizer.draw_dataset_dict(record).get_image()
    assert texts(visualizer) == ["dog", "cat|crowd", "sea", "sand"]
    assert visualizer.output.ax.texts[0].get_position() == (20, 60)
    assert_pixels(output, blended(image, colormap(rgb=True)[0], 0.5), np.s_[100:130, 30:90])
    assert_pixels(output, blended(image, (250, 250, 0), 0.5), np.s_[190:197, 5:290])
    Visualizer(image, metadata).draw_dataset_dict({})


# ---- video -----------------------------------------------------------------------------------------------------------


def colors_of(visualizer, masks, classes):
    """The colours that the masks of one frame get, read from the picture."""
    output = visualizer.draw_instance_predictions(
        np.zeros((HEIGHT, WIDTH, 3)), as_instances(masks, classes)
    ).get_image()
    found = []
    for mask in masks:
        values, counts = np.unique(output[mask], axis=0, return_counts=True)
        found.append(tuple(values[counts.argmax()].tolist()))
    return found


def test_colours_follow_objects(metadata):
    visualizer = VideoVisualizer(metadata)
    left, right, new = box_mask(10, 100, 110, 195), box_mask(180, 100, 280, 195), box_mask(100, 5, 180, 80)
    first = colors_of(visualizer, [left, right], [0, 0])
    assert first[0] != first[1]
    moved = [np.roll(mask, 6, axis=1) for mask in (right, left)]
    assert colors_of(visualizer, moved, [0, 0]) == first[::-1]
    third = colors_of(visualizer, [left, new], [0, 0])
    assert third[0] == first[0] and third[1] not in first
    # Unseen for a while it is remembered, after eight frames it isn't; another class is another object.
    for _ in range(6):
        colors_of(visualizer, [left], [0])
    assert colors_of(visualizer, [right], [0]) == [first[1]]
    for _ in range(9):
        colors_of(visualizer, [left], [0])
    assert colors_of(visualizer, [right], [0]) != [first[1]]
    assert colors_of(visualizer, [left], [1]) != [first[0]]


def test_colours_by_box_id_and_field(metadata):
    frame = np.zeros((HEIGHT, WIDTH, 3))
    boxes = torch.tensor([[10.0, 10, 100, 100], [150, 10, 250, 100]])

    def edge_colors(visualizer, boxes, **fields):
        instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(boxes), pred_classes=torch.tensor([0, 0]), **fields)
        patches = visualizer.draw_instance_predictions(frame, instances).ax.patches
        order = np.argsort([patch.get_x() for patch in patches])
        return [patches[index].get_edgecolor()[:3] for index in order]

    visualizer = VideoVisualizer(metadata)
    first = edge_colors(visualizer, boxes)
    assert edge_colors(visualizer, boxes.flip(0) + 3) == first
    by_id = VideoVisualizer(metadata)
    first = edge_colors(by_id, boxes, ID=[7, 9])
    assert edge_colors(by_id, boxes, ID=[9, 7]) == first[::-1]
    assert edge_colors(by_id, boxes, COLOR=[(1, 0, 0), (0, 0, 1)]) == [(1, 0, 0), (0, 0, 1)]
    assert (
        by_id.draw_instance_predictions(frame, as_instances(np.zeros((0, HEIGHT, WIDTH), bool), [])).get_image() == 0
    ).all()


def test_video_panoptic_and_semantic(metadata, image):
    visualizer = VideoVisualizer(metadata, ColorMode.IMAGE_BW)
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    ids[:50], ids[80:180, 50:150] = 4, 5
    infos = [{"id": 4, "category_id": 0, "isthing": False}, {"id": 5, "category_id": 1, "isthing": True, "score": 0.5}]
    colors = []
    for shift in (0, 5):
        output = visualizer.draw_panoptic_seg_predictions(image, torch.from_numpy(np.roll(ids, shift, axis=1)), infos)
        assert [text.get_text() for text in output.ax.texts] == ["sky", "cat 50%"]
        colors.append(output.ax.patches[-1].get_facecolor())
        pixels = output.get_image()
        assert (pixels[190:, :, 0] == image[190:].mean(axis=2).round()).all()
    assert colors[0] == colors[1]
    output = VideoVisualizer(metadata).draw_sem_seg(image, torch.full((HEIGHT, WIDTH), 2)).get_image()
    assert_pixels(output, blended(image, (250, 250, 0), 0.8), np.s_[5:40, 5:290])
    with pytest.raises(ValueError, match="SEGMENTATION"):
        VideoVisualizer(metadata, ColorMode.SEGMENTATION)
