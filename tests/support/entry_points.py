"""The entry points that pyproject.toml declares, as an installed package has them."""

from __future__ import annotations

from pathlib import Path

from places import ROOT


def declare_entry_points(folder: Path, group: str = "vllm.endpoint_plugins") -> Path:
    """Make ``folder`` one that declares a group's entry points where it is on ``sys.path``."""
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        group
    ]
    info = folder / "declared-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in declared.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    return folder
