"""Finds and loads the compiled library, or records why there is none.

The build writes ``_build_info.json`` beside the library. It is read first, because a library that
was compiled against another torch release may crash on import rather than fail.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_REBUILD = (
    "rebuild it with `pip install --force-reinstall --no-deps --no-build-isolation <source>`, "
    "where <source> is the source tree or archive of cnnkernels; or, if an installed copy has the "
    "library, leave the source tree, whose folder hides it"
)


def _release(version: str) -> tuple[str, ...]:
    """The part of a torch version on which binary compatibility depends: major and minor."""
    return tuple(re.findall(r"\d+", version)[:2])


def _read_build_info(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load(info: dict[str, Any]) -> tuple[ModuleType | None, str]:
    """The library and an empty reason, or None and the reason why it cannot be used."""
    if info.get("built") is False:
        return None, f"the library was not built: {info['reason']}"
    if importlib.util.find_spec("cnnkernels._C") is None:
        return None, f"there is no compiled library beside the package; {_REBUILD}"
    built_with = info.get("torch_version", torch.__version__)
    if _release(built_with) != _release(torch.__version__):
        return None, (
            f"the library was built for torch {built_with}, but this is torch "
            f"{torch.__version__}; {_REBUILD}"
        )
    try:
        return importlib.import_module("cnnkernels._C"), ""
    except (ImportError, OSError) as error:
        return None, f"the library could not be loaded ({error}); {_REBUILD}"


build_info = _read_build_info(Path(__file__).with_name("_build_info.json"))
library, reason = _load(build_info)
if library is not None:
    for note in library.config()["notes"]:
        warnings.warn(note, RuntimeWarning, stacklevel=2)


def is_native_available() -> bool:
    """Whether the compiled library is loaded; :func:`cnnkernels.show_config` says why not."""
    return library is not None
