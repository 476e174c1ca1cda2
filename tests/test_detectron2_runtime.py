"""Which Detectron2 is taken, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = "import mask2former_plugin, detectron2.config; print(detectron2.config.__file__)"


def test_a_folder_named_detectron2_is_no_detectron2(tmp_path):
    """A checkout of its repository in the working directory must not hide the package."""
    (tmp_path / "detectron2" / "tools").mkdir(parents=True)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[1])])}
    variables.pop("MASK2FORMER_DETECTRON2", None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not result.stdout.startswith(str(tmp_path))
