"""What numbers were measured with: device, clocks, versions, commit."""
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch

from ops.device import device_name, triton

# What nvidia-smi is asked for.
CLOCKS = ("power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "driver_version")


def environment(device: torch.device) -> dict[str, str]:
    """What determines speed besides the command line: device, clocks of this moment, versions. All values are texts."""
    found = {"device": device_name(device)}
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        values = output("nvidia-smi", "-i", gpu, "--format=csv,noheader", "--query-gpu=" + ",".join(CLOCKS)).split(", ")
        if len(values) == len(CLOCKS):  # else it said why it cannot, such as "No devices were found"
            found |= zip(CLOCKS, values)
    return found | {"torch": torch.__version__, "triton": getattr(triton, "__version__", "absent"),
                    "cuda": torch.version.cuda or "none", "python": platform.python_version(),
                    "commit": commit_of(Path(__file__).parent.parent), "date": time.strftime("%Y-%m-%d")}


def commit_of(folder: Path) -> str:
    """The commit of the code in this folder. Measured results are tracked too, but a new one does not change the code.
    """
    git = ("git", "-C", str(folder))
    commit = output(*git, "rev-parse", "--short", "HEAD") or "unknown"
    if output(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"):
        commit += " and uncommitted changes"
    return commit


def output(*command: str) -> str:
    """What a program prints to stdout; "" if it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def describe(found: dict[str, str]) -> str:
    """One line for people. found: what `environment` returned."""
    clocks = "power limit {}, SM clock {} of {}, memory {}, {} °C, driver {}"
    device = found["device"]
    if CLOCKS[-1] in found:
        device += f" ({clocks.format(*(found[name] for name in CLOCKS))})"
    return f"{device}, torch {found['torch']}, triton {found['triton']}, commit {found['commit']}, {found['date']}"
