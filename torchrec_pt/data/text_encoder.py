"""Sentence encoders that lie on this machine: found, named by their content, loaded.

sentence-transformers is imported here alone, and only by a `prepare` that has texts to encode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrec_pt.config import Feature
from torchrec_pt.data.errors import DataError
from torchrec_pt.files import sha256

# (N,) texts -> (N, dim) numbers
Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TextEncoder:
    """The encoder of a text feature.

    Attributes:
        sha256: names the content of its folder.
    """

    feature: Feature
    folder: Path
    sha256: str

    @property
    def where(self) -> str:
        return _where(self.feature)


def find_encoders(features: Sequence[Feature]) -> tuple[TextEncoder, ...]:
    """Those that the features name: by folder, or by name in Hugging Face's cache.

    Nothing is downloaded.

    Raises:
        DataError: one is neither.
    """
    encoders = []
    for feature in features:
        if feature.encoder is None:
            continue
        named = Path(feature.encoder)
        folder = named if named.is_dir() else _cached(feature.encoder)
        if folder is None:
            raise DataError(
                f"{_where(feature)}: the encoder must be the folder of a sentence-transformers "
                f'model or the name of one in the local cache, "{feature.encoder}" is neither; '
                "mend the path, or download the model"
            )
        encoders.append(TextEncoder(feature, folder, _digest(folder)))
    return tuple(encoders)


def _where(feature: Feature) -> str:
    return f"data.features: {feature.of} {feature.column}"


def _cached(name: str) -> Path | None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:  # then nothing of it was ever cached
        return None
    # As sentence-transformers does, a bare name is one of its own models.
    repository = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError):  # not cached; no name of a repository
        return None


def _digest(folder: Path) -> str:
    """Hexadecimal SHA-256 of the names and contents of the files in a folder, but hidden ones."""
    digest = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    for name in sorted(files):
        if files[name].is_file() and not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name}\0{sha256(files[name])}\n".encode())
    return digest.hexdigest()


def load_encoder(encoder: TextEncoder) -> Encode:
    """The model, on the GPU where there is one; a long text is cut to what the model reads.

    Raises:
        DataError: the package is not installed, or the folder holds no model of it.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise DataError(
            f"{encoder.where}: its encoder needs the package sentence-transformers, which is not "
            'installed; pip install "torchrec_pt[text]"'
        ) from None
    try:
        model = SentenceTransformer(str(encoder.folder), local_files_only=True)
    except Exception as error:  # whatever that package, transformers or safetensors raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{encoder.where}: {encoder.folder} cannot be loaded as a sentence-transformers model, "
            f"{reason}; mend the folder"
        ) from None

    def encode(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        found = model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    return encode
