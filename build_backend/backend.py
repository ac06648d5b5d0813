"""The build backend: setuptools', made to see the torch of the environment it installs into.

pip builds in an isolated environment. A build that asked for torch there would compile against
whatever release the index offers, and the library would not load with the user's. So the folders
that isolation hides are appended to ``sys.path``, and torch is asked for only if they hold none.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta

SUPPORTED_TORCH = "torch>=2.11,<2.15"

_Settings = dict[str, Any] | None


def _show_environment() -> None:
    """Append the environment's own folders, after those of the isolated build."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # With --system-site-packages, site knows the base installation's folders too.
    folders += site.getsitepackages()
    if sys.base_prefix in site.PREFIXES:
        folders.append(site.getusersitepackages())
    for folder in folders:
        if os.path.isdir(folder) and folder not in sys.path:
            # Unlike sys.path.append, this reads .pth files: torch may be a link to another folder.
            site.addsitedir(folder)


def _requirements() -> list[str]:
    """Return what the build of the library needs and the environment lacks."""
    if os.environ.get("CNNKERNELS_BUILD", "").strip() == "0":
        return []
    requirements = []
    try:
        release = importlib.metadata.version("torch").split(".")
        usable = (2, 11) <= (int(release[0]), int(release[1])) < (2, 15)
    except importlib.metadata.PackageNotFoundError:
        usable = False
    if not usable:
        requirements.append(SUPPORTED_TORCH)
    if not (shutil.which("ninja") or Path(sysconfig.get_path("scripts"), "ninja").exists()):
        requirements.append("ninja")
    return requirements


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    """PEP 517: what a wheel's build needs beside ``build-system.requires``."""
    return _requirements()


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    """PEP 660: what an editable build needs beside ``build-system.requires``."""
    return _requirements()


def get_requires_for_build_sdist(config_settings: _Settings = None) -> list[str]:
    """PEP 517: nothing, a source archive compiles nothing."""
    return []


def build_sdist(sdist_directory: str, config_settings: _Settings = None) -> str:
    """PEP 517: the archive, whose metadata must not depend on the torch of who makes it."""
    os.environ["CNNKERNELS_BUILD"] = "0"
    return build_meta.build_sdist(sdist_directory, config_settings)


build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable

_show_environment()
