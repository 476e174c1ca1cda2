"""Every file of ``configs/``: it reads, it names what exists, its model has the known size, trains and predicts."""

import copy
import math
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Instances

from mask2former_plugin.config import add_maskformer2_config, differing_keys, load_config
from mask2former_plugin.data.datasets.custom import check_num_classes
from mask2former_plugin.data.mappers import build_mapper
from mask2former_plugin.solver import build_optimizer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
MODELS = [name for name in FILES if not name.startswith("common/") and "/Base-" not in name]
PUBLISHED = [name for name in MODELS if name.startswith(("mask2former/", "maskformer/"))]

# Parameters of the original models: (pixel decoder or head, backbone) -> total, classes, queries.
MASK2FORMER, FPN, FPN_ENCODER = "MSDeformAttnPixelDecoder", "BasePixelDecoder", "TransformerEncoderPixelDecoder"
BASELINE, BASELINE_PLUS = "PerPixelBaselineHead", "PerPixelBaselinePlusHead"
TOTALS = {
    (MASK2FORMER, "R50"): (43_983_878, 133, 100),
    (MASK2FORMER, "R101"): (62_923_782, 133, 100),
    (MASK2FORMER, "Swin-T"): (47_435_264, 133, 100),
    (MASK2FORMER, "Swin-S"): (68_753_168, 133, 100),
    (MASK2FORMER, "Swin-B"): (106_917_822, 133, 100),
    (MASK2FORMER, "Swin-L"): (215_535_610, 133, 200),
    (FPN, "R50"): (41_254_743, 150, 100),
    (FPN, "R101"): (41_254_743 + 62_923_782 - 43_983_878, 150, 100),
    (FPN, "R101c"): (60_318_039, 150, 100),
    (FPN, "Swin-T"): (41_757_009, 150, 100),
    (FPN, "Swin-S"): (63_070_544, 133, 100),
    (FPN, "Swin-B"): (101_825_022, 133, 100),
    (FPN, "Swin-L"): (211_575_627, 150, 100),
    (FPN_ENCODER, "R50"): (45_012_038, 133, 100),
    (FPN_ENCODER, "R101"): (63_951_942, 133, 100),
    (BASELINE, "R50"): (31_033_942, 150, 0),
    (BASELINE_PLUS, "R50"): (41_228_736, 150, 150),
}
SWIN_NAMES = {(96, 6): "Swin-T", (96, 18): "Swin-S", (128, 18): "Swin-B", (192, 18): "Swin-L"}
# the same for other numbers of classes, as the original repositories count them
OTHER_TOTALS = {
    "mask2former/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml": 43_970_257,
    "mask2former/ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml": 43_988_247,
    "mask2former/cityscapes/semantic-segmentation/maskformer2_R50_bs16_90k.yaml": 44_007_700,
    "mask2former/mapillary-vistas/semantic-segmentation/maskformer2_R50_bs16_300k.yaml": 43_966_402,
    "maskformer/ade20k-150-panoptic/maskformer_panoptic_R50_bs16_720k.yaml": 45_016_407,
    "maskformer/coco-panoptic/swin/maskformer_panoptic_swin_tiny_bs64_554k.yaml": 41_752_640,
    "maskformer/coco-panoptic/swin/maskformer_panoptic_swin_large_IN21k_384_bs64_554k.yaml": 211_571_258,
}
# training and test set, mapper, classes, crop, padding, short and long side in tests, tasks, iterations
TASK_VALUES = {
    "mask2former/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep": (
        "coco_2017_train_panoptic", "coco_2017_val_panoptic_with_sem_seg",
        "coco_panoptic_lsj", 133, None, -1, 800, 1333, "SIP", 368_750),
    "mask2former/coco/instance-segmentation/maskformer2_R50_bs16_50ep": (
        "coco_2017_train", "coco_2017_val", "coco_instance_lsj", 80, None, -1, 800, 1333, "I", 368_750),
    "mask2former/cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k": (
        "cityscapes_fine_panoptic_train", "cityscapes_fine_panoptic_val",
        "mask_former_panoptic", 19, (512, 1024), -1, 1024, 2048, "SIP", 90_000),
    "mask2former/cityscapes/instance-segmentation/maskformer2_R50_bs16_90k": (
        "cityscapes_fine_instance_seg_train", "cityscapes_fine_instance_seg_val",
        "mask_former_instance", 8, (512, 1024), -1, 1024, 2048, "I", 90_000),
    "mask2former/cityscapes/semantic-segmentation/maskformer2_R50_bs16_90k": (
        "cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val",
        "mask_former_semantic", 19, (512, 1024), -1, 1024, 2048, "S", 90_000),
    "mask2former/ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k": (
        "ade20k_panoptic_train", "ade20k_panoptic_val",
        "mask_former_panoptic", 150, (640, 640), 640, 640, 2560, "SIP", 160_000),
    "mask2former/ade20k/instance-segmentation/maskformer2_R50_bs16_160k": (
        "ade20k_instance_train", "ade20k_instance_val",
        "mask_former_instance", 100, (640, 640), 640, 640, 2560, "SIP", 160_000),
    "mask2former/ade20k/semantic-segmentation/maskformer2_R50_bs16_160k": (
        "ade20k_sem_seg_train", "ade20k_sem_seg_val",
        "mask_former_semantic", 150, (512, 512), 512, 512, 2048, "S", 160_000),
    "mask2former/ade20k/semantic-segmentation/swin/maskformer2_swin_base_384_bs16_160k_res640": (
        "ade20k_sem_seg_train", "ade20k_sem_seg_val",
        "mask_former_semantic", 150, (640, 640), 640, 640, 2560, "S", 160_000),
    "mask2former/mapillary-vistas/panoptic-segmentation/maskformer_R50_bs16_300k": (
        "mapillary_vistas_panoptic_train", "mapillary_vistas_panoptic_val",
        "mask_former_panoptic", 65, (1024, 1024), 1024, 2048, 2048, "SP", 300_000),
    "mask2former/mapillary-vistas/semantic-segmentation/maskformer2_R50_bs16_300k": (
        "mapillary_vistas_sem_seg_train", "mapillary_vistas_sem_seg_val",
        "mask_former_semantic", 65, (1024, 1024), 1024, 2048, 2048, "S", 300_000),
    "maskformer/ade20k-150/maskformer_R50_bs16_160k": (
        "ade20k_sem_seg_train", "ade20k_sem_seg_val",
        "mask_former_semantic", 150, (512, 512), 512, 512, 2048, "S", 160_000),
    "maskformer/ade20k-150-panoptic/maskformer_panoptic_R50_bs16_720k": (
        "ade20k_panoptic_train", "ade20k_panoptic_val",
        "mask_former_panoptic", 150, (640, 640), 640, 640, 2560, "SP", 720_000),
    "maskformer/ade20k-full-847/maskformer_R50_bs16_200k": (
        "ade20k_full_sem_seg_train", "ade20k_full_sem_seg_val",
        "mask_former_semantic", 847, (512, 512), 512, 512, 2048, "S", 200_000),
    "maskformer/cityscapes-19/maskformer_R101_bs16_90k": (
        "cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val",
        "mask_former_semantic", 19, (512, 1024), -1, 1024, 2048, "S", 90_000),
    "maskformer/coco-panoptic/maskformer_panoptic_R50_bs64_554k": (
        "coco_2017_train_panoptic", "coco_2017_val_panoptic",
        "detr_panoptic", 133, (384, 600), -1, 800, 1333, "SP", 554_400),
    "maskformer/coco-stuff-10k-171/maskformer_R50_bs32_60k": (
        "coco_2017_train_stuff_10k_sem_seg", "coco_2017_test_stuff_10k_sem_seg",
        "mask_former_semantic", 171, (640, 640), 640, 640, 2560, "S", 60_000),
    "maskformer/mapillary-vistas-65/maskformer_R50_bs16_300k": (
        "mapillary_vistas_sem_seg_train", "mapillary_vistas_sem_seg_val",
        "mask_former_semantic", 65, (1280, 1280), 1280, 2048, 2048, "S", 300_000),
}  # fmt: skip
# run at their full size, too
REAL_SIZE = [
    "mask2former/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "maskformer/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml",
    "maskformer/ade20k-150/per_pixel_baseline_R50_bs16_160k.yaml",
]
ANY_THINGS = "configs_test_things"


def load(name):
    return load_config(CONFIGS / name)


def architecture(cfg):
    head = cfg.MODEL.SEM_SEG_HEAD
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        backbone = SWIN_NAMES[cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS[2]]
    else:
        resnet = cfg.MODEL.RESNETS
        backbone = f"R{resnet.DEPTH}" + ("c" if resnet.STEM_TYPE == "deeplab" else "")
    return (head.NAME if head.NAME.startswith("PerPixel") else head.PIXEL_DECODER_NAME), backbone


def expected_parameters(cfg):
    decoder, backbone = architecture(cfg)
    total, classes, queries = TOTALS[decoder, backbone]
    per_class = 0 if decoder == BASELINE_PLUS else 257  # one row of a linear layer from 256 channels
    per_query = {MASK2FORMER: 512, BASELINE: 0}.get(decoder, 256)  # position, and the masked decoder's content
    total += per_class * (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES - classes)
    total += per_query * (cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES - queries) if per_query else 0
    if cfg.MODEL.RESNETS.NORM == "SyncBN" and backbone.startswith("R"):  # frozen norms have no parameters
        blocks = (3, 4, 6, 3) if backbone == "R50" else (3, 4, 23, 3)
        channels = 64 + sum((2 * 64 + 256) * 2**i * n + 256 * 2**i for i, n in enumerate(blocks))
        total += 2 * channels
    return total


def parameters(cfg):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"  # shapes without memory
    with torch.device("meta"):
        model = build_model(cfg)
    return sum(parameter.numel() for parameter in model.parameters())


def scaled_down(cfg):
    """The same structure with fewer channels, layers, queries and points."""
    cfg = cfg.clone()
    model = cfg.MODEL
    model.RESNETS.merge_from_list(["DEPTH", 50, "WIDTH_PER_GROUP", 8, "STEM_OUT_CHANNELS", 8, "RES2_OUT_CHANNELS", 16])
    model.SWIN.merge_from_list(
        ["EMBED_DIM", 16, "DEPTHS", [2, 1, 2, 1], "NUM_HEADS", [1, 2, 2, 4], "WINDOW_SIZE", 4, "PRETRAIN_IMG_SIZE", 224]
    )
    head, options = model.SEM_SEG_HEAD, model.MASK_FORMER
    head.CONVS_DIM = head.MASK_DIM = options.HIDDEN_DIM = options.DIM_FEEDFORWARD = 32
    head.TRANSFORMER_ENC_LAYERS = min(head.TRANSFORMER_ENC_LAYERS, 1)
    options.NHEADS = 4
    options.DEC_LAYERS = 4 if head.PIXEL_DECODER_NAME == MASK2FORMER else 2  # three layers read all three levels
    options.TRAIN_NUM_POINTS = 64
    options.TEST.OBJECT_MASK_THRESHOLD = 0.0  # random scores reach no other
    if head.NAME != BASELINE_PLUS:
        options.NUM_OBJECT_QUERIES = 8
    return cfg


def what_matters(cfg):
    """The part of a config that decides how its model is built and stepped, as text."""
    solver = ("OPTIMIZER", "BASE_LR", "WEIGHT_DECAY", "BACKBONE_MULTIPLIER", "CLIP_GRADIENTS")
    part = CfgNode({"MODEL": cfg.MODEL.clone(), "SOLVER": CfgNode({key: cfg.SOLVER[key] for key in solver})})
    part.MODEL.merge_from_list(["DEVICE", "cpu", "WEIGHTS", ""])
    part.DATASETS = CfgNode({"TRAIN": (ANY_THINGS,) if cfg.DATASETS.CUSTOM else cfg.DATASETS.TRAIN})
    return part.dump()


def batch_of_two(num_classes, ignore):
    generator = torch.Generator().manual_seed(0)
    batch = []
    for (height, width), count in (((64, 75), 3), ((50, 64), 1)):
        labels = torch.randint(num_classes, (count,), generator=generator)
        masks = torch.zeros(count, height, width, dtype=torch.bool)
        sem_seg = torch.full((height, width), ignore)
        for index, label in enumerate(labels):
            masks[index, 12 * index : 12 * index + 16, 5:40] = True
            sem_seg[masks[index]] = label
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        instances = Instances((height, width), gt_classes=labels, gt_masks=masks)
        batch.append(dict(image=image, sem_seg=sem_seg, instances=instances, height=2 * height, width=2 * width))
    return batch


@lru_cache(maxsize=None)
def step_and_predict(text):
    """One training step and one inference of the model of a config, given as text so that equal models run once."""
    cfg = load_config()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
    if cfg.DATASETS.TRAIN == (ANY_THINGS,):
        MetadataCatalog.get(ANY_THINGS).set(thing_dataset_id_to_contiguous_id={0: 0, 1: 1})
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    head, options = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    batch = batch_of_two(head.NUM_CLASSES, head.IGNORE_VALUE)

    losses = model(copy.deepcopy(batch))
    layers = 1 if head.NAME == BASELINE else options.DEC_LAYERS
    names = ["loss_ce", "loss_mask", "loss_dice"] if cfg.MODEL.META_ARCHITECTURE == "MaskFormer" else ["loss_sem_seg"]
    suffixes = ["", *(f"_{i}" for i in range(layers - 1))]
    assert set(losses) == {name + suffix for name in names for suffix in suffixes}
    assert all(math.isfinite(value) and value > 0 for value in (loss.item() for loss in losses.values()))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    sum(losses.values()).backward()
    without = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not without
    optimizer.step()
    assert all(value.isfinite().all() for value in model.parameters())
    moved = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"backbone", "sem_seg_head"}

    model.eval()
    with torch.no_grad():
        results = model(batch)
    flags = options.TEST
    wanted = {"sem_seg"}
    if cfg.MODEL.META_ARCHITECTURE == "MaskFormer":
        tasks = {"sem_seg": flags.SEMANTIC_ON, "panoptic_seg": flags.PANOPTIC_ON, "instances": flags.INSTANCE_ON}
        wanted = {name for name, on in tasks.items() if on}
    for image, result in zip(batch, results):
        size = (image["height"], image["width"])
        assert set(result) == wanted
        if "sem_seg" in wanted:
            assert result["sem_seg"].shape == (head.NUM_CLASSES, *size) and result["sem_seg"].isfinite().all()
        if "panoptic_seg" in wanted:
            ids, segments = result["panoptic_seg"]
            assert ids.shape == size and set(ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
        if "instances" in wanted:
            assert result["instances"].image_size == size
            assert result["instances"].pred_masks.shape[1:] == size


def test_every_published_model_is_there():
    assert sum(name.startswith("mask2former/") for name in PUBLISHED) == 47
    assert sum(name.startswith("maskformer/") for name in PUBLISHED) == 30
    assert {architecture(load(name)) for name in PUBLISHED} == set(TOTALS)


@pytest.mark.parametrize("name", FILES)
def test_file_reads_without_unsafe_tags(name):
    assert isinstance(yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")), dict)
    load(name)


@pytest.mark.parametrize("name", MODELS)
def test_model_reads_alike_with_detectron2_alone(name):
    plain = get_cfg()
    add_deeplab_config(plain)
    add_maskformer2_config(plain)
    plain.merge_from_file(str(CONFIGS / name))
    assert differing_keys(plain, load(name)) == []


@pytest.mark.parametrize("stem", TASK_VALUES)
def test_task_is_the_published_one(stem):
    cfg = load(f"{stem}.yaml")
    crop, flags = cfg.INPUT.CROP, cfg.MODEL.MASK_FORMER.TEST
    tasks = {"S": flags.SEMANTIC_ON, "I": flags.INSTANCE_ON, "P": flags.PANOPTIC_ON}
    assert TASK_VALUES[stem] == (
        *cfg.DATASETS.TRAIN,
        *cfg.DATASETS.TEST,
        cfg.INPUT.DATASET_MAPPER_NAME,
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        tuple(crop.SIZE) if crop.ENABLED else None,
        cfg.INPUT.SIZE_DIVISIBILITY,
        cfg.INPUT.MIN_SIZE_TEST,
        cfg.INPUT.MAX_SIZE_TEST,
        "".join(letter for letter, on in tasks.items() if on),
        cfg.SOLVER.MAX_ITER,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_is_the_published_one(name):
    cfg = load(name)
    solver, options = cfg.SOLVER, cfg.MODEL.MASK_FORMER
    if name.startswith("mask2former/"):
        rates = (1e-4, 0.05, 0.1, 1.0, True)
        weights = ("point", 2.0, 5.0, 5.0, 0.1, 12544)
        assert options.DEC_LAYERS == 10 and options.DROPOUT == 0.0 and options.TEST.PANOPTIC_REQUIRE_MASK
    else:
        rates = (6e-5, 0.01, 1.0, 1e-6, False) if "/swin/" in name else (1e-4, 1e-4, 0.1, 1.0, False)
        weights = ("dense", 1.0, 20.0, 1.0, 0.1, 12544)
    multiplier, warmup = solver.BACKBONE_MULTIPLIER, solver.WARMUP_FACTOR
    assert rates == (solver.BASE_LR, solver.WEIGHT_DECAY, multiplier, warmup, solver.AMP.ENABLED)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == ("full_model", 0.01)
    if not cfg.MODEL.SEM_SEG_HEAD.NAME.startswith("PerPixel"):
        given = (options.CLASS_WEIGHT, options.MASK_WEIGHT, options.DICE_WEIGHT, options.NO_OBJECT_WEIGHT)
        assert weights == (options.MASK_LOSS, *given, options.TRAIN_NUM_POINTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_numbers_fit_the_datasets(name):
    cfg = load(name)
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= set(DatasetCatalog.list())
    check_num_classes(cfg)
    build_mapper(cfg)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_original(name):
    cfg = load(name)
    assert parameters(cfg) == expected_parameters(cfg) == OTHER_TOTALS.get(name, expected_parameters(cfg))


@pytest.mark.parametrize("name", MODELS)
def test_model_trains_and_predicts(name):
    step_and_predict(what_matters(scaled_down(load(name))))


@pytest.mark.parametrize("name", REAL_SIZE)
def test_model_of_real_size_trains_and_predicts(name):
    step_and_predict(what_matters(load(name)))


@pytest.mark.parametrize(
    "name, side, stop",
    [
        ("mask2former/ade20k/semantic-segmentation/Base-ADE20K-SemanticSegmentation.yaml", 512, 21),
        ("mask2former/ade20k/panoptic-segmentation/Base-ADE20K-PanopticSegmentation.yaml", 640, 21),
        ("mask2former/cityscapes/panoptic-segmentation/Base-Cityscapes-PanopticSegmentation.yaml", 1024, 21),
        ("maskformer/mapillary-vistas-65/Base-MapillaryVistas-65.yaml", 2048, 21),
        ("maskformer/coco-stuff-10k-171/Base-COCOStuff10K-171.yaml", 640, 16),
    ],
)
def test_sizes_are_what_published_arithmetic_gives(tmp_path, name, side, stop):
    expression = f"[int(x * 0.1 * {side}) for x in range(5, {stop})]"
    (tmp_path / "Base.yaml").write_text(f'INPUT:\n  MIN_SIZE_TRAIN: !!python/object/apply:eval ["{expression}"]\n')
    (tmp_path / "model.yaml").write_text("_BASE_: Base.yaml\nVERSION: 2\n")
    assert load_config(tmp_path / "model.yaml").INPUT.MIN_SIZE_TRAIN == load(name).INPUT.MIN_SIZE_TRAIN


def test_arithmetic_that_is_none_is_refused(tmp_path):
    victim = tmp_path / "victim"
    path = tmp_path / "model.yaml"
    path.write_text(f"""SEED: !!python/object/apply:eval ["open('{victim}', 'w').write('x')"]\n""")
    with pytest.raises(ValueError, match="model.yaml"):
        load_config(path)
    assert not victim.exists()
