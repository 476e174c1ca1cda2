"""Semantic datasets that are two folders: images, and label maps of the same names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mask2former_plugin.data.names import some

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".jp2")
LABEL_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")


def load_semantic_folder(
    name: str, image_root: Path, label_root: Path, image_extensions: Collection[str] = IMAGE_EXTENSIONS
) -> list[dict[str, str]]:
    """Dataset dicts with ``file_name`` and ``sem_seg_file_name``, sorted.

    Images and labels belong together if their paths below their folders are equal up to the extension.

    Raises:
        ValueError: a file has no partner, two files of a folder differ in the extension only, or there are no files.
    """
    images = _by_stem(name, image_root, image_extensions)
    labels = _by_stem(name, label_root, LABEL_EXTENSIONS)
    if not images:
        raise ValueError(f"Dataset {name!r}: no images ({', '.join(image_extensions)}) in {image_root}")
    problems = []
    for what, lonely in (
        ("images without a label map", images.keys() - labels),
        ("label maps without an image", labels.keys() - images),
    ):
        if lonely:
            problems.append(f"{len(lonely)} {what} ({some(lonely)})")
    if problems:
        raise ValueError(f"Dataset {name!r}: {' and '.join(problems)}; images in {image_root}, labels in {label_root}")
    return [{"file_name": str(images[stem]), "sem_seg_file_name": str(labels[stem])} for stem in sorted(images)]


def _by_stem(name: str, root: Path, extensions: Collection[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in extensions or path.name.startswith(".") or not path.is_file():
            continue
        stem = path.relative_to(root).with_suffix("").as_posix()
        if stem in files:
            raise ValueError(
                f"Dataset {name!r}: {files[stem]} and {path} have the same name; set IMAGE_EXTENSIONS or remove one"
            )
        files[stem] = path
    return files
