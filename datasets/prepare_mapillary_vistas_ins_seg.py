#!/usr/bin/env python
"""Make Mapillary Vistas' instance JSON (AP of mapillary_vistas_panoptic_*).

  python datasets/prepare_mapillary_vistas_ins_seg.py
  python datasets/prepare_mapillary_vistas_ins_seg.py --root /data --splits val --workers 8

Finished files are skipped, so an interrupted run goes on. Input and output: datasets/README.md
"""

from mask2former_plugin.data.preparation import mapillary_vistas
from mask2former_plugin.data.preparation.command_line import main

if __name__ == "__main__":
    main(__doc__, mapillary_vistas.prepare_instances, mapillary_vistas.SPLITS)
