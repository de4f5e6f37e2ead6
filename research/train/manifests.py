"""Manifests: the SHA-256 of every file of a folder, written last; a folder without a valid one does not count as
written.

Files that a manifest does not name are none of its concern: file managers and network file systems leave theirs
anywhere.
"""

import fnmatch
import hashlib
from collections.abc import Iterable
from pathlib import Path

from research.errors import UserError
from research.files import printable, read_json, write_json

MANIFEST = "nestax_manifest.json"
STRAYS = (".DS_Store", "._*", ".nfs*", ".fuse_hidden*", ".directory", ".AppleDouble", "Thumbs.db", "desktop.ini", "*~")
"""Names of files that others put into folders, which a manifest must not hold: they come and go."""


def file_hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Returns relative path -> SHA-256 of the files below a folder: those of `names` that are there, else all but the
    manifest and strays.

    Raises:
      OSError: a file cannot be read, or vanishes meanwhile.
    """
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    if names is None:
        wanted = {
            n
            for n, p in found.items()
            if p.name != MANIFEST and not any(fnmatch.fnmatch(p.name, stray) for stray in STRAYS)
        }
    else:
        wanted = found.keys() & set(names)
    hashes = {}
    for name in sorted(wanted):
        with found[name].open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def write_manifest(folder: Path, step: int) -> None:
    """Writes the manifest of a folder whose other files are written, and binds it to a step, whatever its name
    becomes."""
    write_json(folder / MANIFEST, {"step": step, "sha256": file_hashes(folder)})


def fault(folder: Path, step: int, only: str | None = None) -> str | None:
    """Returns what is wrong with the folder of a step, or None when every byte that was written is there.

    A manifest without a step, as earlier versions wrote it, is taken for any.

    Args:
      only: the one file that matters, which must then be named.
    """
    if folder.is_symlink():
        return "it is a link"
    if not (folder / MANIFEST).is_file():
        return "it has no manifest (the save did not finish)"
    try:
        data = read_json(folder / MANIFEST, ("sha256",))
    except UserError:
        return "its manifest is damaged"
    wanted = data["sha256"]
    if not isinstance(wanted, dict) or not wanted:
        return "its manifest is damaged"
    if data.get("step", step) != step:
        return f"it is that of step {printable(data['step'])}, renamed or copied"
    if only is not None:
        wanted = {only: wanted.get(only)}
    try:
        found = file_hashes(folder, wanted)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    for name, digest in wanted.items():
        if name not in found:
            return f"{printable(name)} is missing"
        if found[name] != digest:
            return f"{printable(name)} does not have the bytes that were written"
    return None
