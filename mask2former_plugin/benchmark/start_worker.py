"""Starts a worker; a plain script, because the process of the original must not hold what we register.

Both register the same names. So there the package is a bare module with a path: its modules can be imported, its
``__init__``, which registers everything, does not run.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path[0] = str(PACKAGE.parent)  # was the folder of this file
    if settings["bare"]:
        package = ModuleType(PACKAGE.name)
        package.__path__ = [str(PACKAGE)]
        sys.modules[PACKAGE.name] = package
        spec = importlib.util.spec_from_file_location("runtime", PACKAGE / "detectron2_runtime.py")
        runtime = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(runtime)
        runtime.ensure_detectron2()
    else:
        importlib.import_module(PACKAGE.name)
    importlib.import_module(f"{PACKAGE.name}.benchmark.worker").serve(settings)


if __name__ == "__main__":
    main()
