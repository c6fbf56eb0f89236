"""What a benchmark returns: rows of measure and target, and the machine that they were measured on."""

import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

import everlong


@dataclass(frozen=True)
class Row:
    """One measured figure. `value` is a ratio wherever something is compared; `raw` holds what it was made from."""

    measure: str
    value: float
    target: str | None = None  # such as "<= 1.1"; None: reported only
    peer: str | None = None  # what it was compared with
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None where there is none."""
        if self.target is None:
            return None
        relation, _, bound = self.target.partition(" ")
        assert relation in {"<=", ">="}
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def machine() -> dict[str, Any]:
    """Processor, memory, threads and versions."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "everlong": everlong.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in found.get("flags", "").split()]
    return f"{found['model name']} ({', '.join(flags)})"


def store(suite: str, rows: Sequence[Row], folder: Path, *, part: bool = False) -> Path:
    """Writes the result to `folder`; if it is a part, rows of other measures stay as they are.

    Raises:
        ValueError: it is a part, and the rest was measured on another machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, here = folder / f"{suite}.json", machine()
    measured = {row.measure: row.as_dict() for row in rows}
    if part and path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["machine"] != here:
            raise ValueError(f"{path} was measured on another machine or version: measure all of it, without --only")
        measured = {**{row["measure"]: row for row in earlier["rows"]}, **measured}
    result = {"suite": suite, "date": time.strftime("%Y-%m-%d"), "machine": here, "rows": list(measured.values())}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def draw(path: Path, picture: Callable[[list[dict[str, Any]]], str | None]) -> Path | None:
    """Writes the picture of a stored result beside it; None where its rows have nothing to draw."""
    drawing = picture(json.loads(path.read_text(encoding="utf-8"))["rows"])
    if drawing is None:
        return None
    drawn = path.with_suffix(".svg")
    drawn.write_text(drawing, encoding="utf-8")
    return drawn


def stored(suite: str) -> dict[str, Any] | None:
    """The result of a suite that came with everlong: in its checkout, or in what was installed; None without one."""
    package = Path(everlong.__file__).parent
    for folder in (package.parent / "benchmarks" / "results", package / "lab" / "bench" / "results"):
        if (path := folder / f"{suite}.json").is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    return None


def wanted(measures: Iterable[str], only: str | None) -> list[str]:
    """The measures whose name contains `only`; ValueError where none does."""
    listed = list(measures)
    found = [measure for measure in listed if only is None or only in measure]
    if not found:
        raise ValueError(f"no measure contains `{only}`. There is: {'; '.join(listed)}")
    return found


def milliseconds(times: Sequence[float]) -> float:
    """The median of times in seconds."""
    return round(median(times) * 1000, 4)
