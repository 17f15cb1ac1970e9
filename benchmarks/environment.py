"""What numbers were measured on: device, clocks, versions, commit."""
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

from ops.device import device_name, triton

CLOCKS = ("power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "driver_version")


def environment(device: torch.device) -> dict[str, str]:
    """What decides how long things take, and is not on the command line. Clocks are those of this moment."""
    folder, known = Path(__file__).parent.parent, {"device": device_name(device)}
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        known |= zip(CLOCKS, output("nvidia-smi", "-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}",
                                    "--format=csv,noheader", "--query-gpu=" + ",".join(CLOCKS)).split(", "))
    commit = output("git", "-C", str(folder), "rev-parse", "--short", "HEAD") or "unknown"
    changed = output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return known | {"torch": torch.__version__, "triton": getattr(triton, "__version__", "absent"),
                    "cuda": torch.version.cuda or "none", "python": platform.python_version(),
                    "commit": commit + (" and uncommitted changes" if changed else ""),
                    "date": time.strftime("%Y-%m-%d")}


def output(*command: str) -> str:
    """What a program writes; nothing, if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def describe(known: dict[str, str]) -> str:
    """`environment` in a line, for people."""
    clocks = "power limit {}, SM clock {} of {}, memory {}, {} °C, driver {}"
    device = known["device"]
    if CLOCKS[-1] in known:
        device += f" ({clocks.format(*(known[name] for name in CLOCKS))})"
    return f"{device}, torch {known['torch']}, triton {known['triton']}, commit {known['commit']}, {known['date']}"
