"""Joules that the processor's packages have used, as Linux counts them (RAPL)."""

from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """The counters of all packages at one time: microjoules, and where each begins at 0 again."""

    microjoules: tuple[int, ...]
    ranges: tuple[int, ...]

    def joules_since(self, earlier: "Counter") -> float:
        """Joules used since `earlier`. A counter that is lower than it was has begun again once."""
        pairs = zip(self.microjoules, earlier.microjoules, self.ranges, strict=True)
        return sum((now - then) % (size + 1) for now, then, size in pairs) / 1e6


def read(root: Path = _ROOT) -> Counter | None:
    """The counters now; None where there are none, or this user may not read them."""
    try:
        # A package is `intel-rapl:N` (AMD's too); its parts, `intel-rapl:N:M`, are counted in it.
        packages = sorted(folder for folder in root.glob("intel-rapl:*") if folder.name.count(":") == 1)
        values = [[int((folder / name).read_text()) for folder in packages] for name in ("energy_uj", "max_energy_range_uj")]
    except (OSError, ValueError):
        return None
    return Counter(tuple(values[0]), tuple(values[1])) if packages else None
