"""Folders that commands are asked to make: what cannot become one is told before the work."""

import os
from pathlib import Path

from everlong.data.packing import FILE as DATASET


def check_free(folder: Path) -> None:
    """Raises ValueError where `folder` cannot be made: a file stands there or above it, or nobody may write there."""
    for place in (folder, *folder.absolute().parents):
        if not os.path.lexists(place):
            continue
        if not place.is_dir() and place == folder:
            raise ValueError(f"`{folder}` is a file: name a folder that can be made")
        if not place.is_dir():
            raise ValueError(f"`{folder}` cannot be made, for `{place}` is a file: name another folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"`{folder}` cannot be written: `{place}` does not let you. Name another folder")
        return


def check_free_for_run(folder: Path) -> None:
    """Raises ValueError where a run cannot be made in `folder`, also because prepared data would be damaged."""
    check_free(folder)
    if (folder / DATASET).is_file():
        raise ValueError(f"`{folder}` holds prepared data: name another folder for the run")
