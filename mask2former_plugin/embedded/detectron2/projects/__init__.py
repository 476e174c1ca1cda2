"""Parts of Detectron2's projects that other projects build on."""
