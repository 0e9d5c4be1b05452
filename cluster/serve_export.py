"""The export that a replica serves, and the one that takes its place without a request lost.

A folder is watched: when its content changes (a symbolic link turned to another folder, a folder
renamed into its place), the new model is loaded beside the old one and tried, then takes over.
Requests that have begun end on the model they began with. An export that cannot be loaded is
refused with one line, and the old one goes on.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.serve_catalogue import Catalogue
from torchrec_pt import checkpoint
from torchrec_pt.recommender import Recommender
from torchrec_pt.runs import finished_stages, load_result, load_run_config

Retrieval = Literal["exact", "hnsw"]  # as Recommender.load takes it

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, eq=False)
class Export:
    """A model that answers.

    Attributes:
        digest: names its content: the same for the same model and data, wherever the folder lies.
    """

    folder: Path
    digest: str
    recommender: Recommender
    catalogue: Catalogue


def load_export(folder: Path, retrieval: Retrieval = "exact") -> Export:
    """Load it whole and try it, so that what is returned answers, whatever becomes of the folder.

    Raises:
        ValueError: nothing to serve there, something damaged, or replaced while it was read.
    """
    folder = folder.resolve()  # a link may turn to another folder meanwhile
    digest = digest_of(folder)
    recommender = Recommender.from_pretrained(folder, retrieval=retrieval)
    catalogue = Catalogue(recommender.dataset, recommender.ranks)
    _try(recommender, finished_stages(load_run_config(folder), recommender.dataset))
    if digest_of(folder) != digest:
        raise ValueError(f"{folder}: changed while it was read; replace it as a whole, by a rename")
    return Export(folder, digest, recommender, catalogue)


def _try(recommender: Recommender, stages: Container[str]) -> None:
    """Ask for one of each, which also loads what is loaded when it is first asked for."""
    user = recommender.first_user
    (best,) = recommender.recommend(user, k=1, exclude_seen=False)
    recommender.score([best.item], user=user)
    if "finetune/rating/pretrained" in stages:
        recommender.predict_rating([best.item], user=user)


def digest_of(folder: Path) -> str:
    """16 hexadecimal digits of the data and of the checkpoints of all stages that may be asked.

    Raises:
        ValueError: no finished run or package there.
    """
    digest = hashlib.sha256()
    files = [load_run_config(folder).prepared_dir / "manifest.json"]
    for stage in (folder / "pretrain", *sorted(folder.glob("finetune/*/pretrained"))):
        result = load_result(stage)
        if result is not None:
            digest.update(result.fingerprint.encode())
            files.append(result.checkpoint / checkpoint.MARK)  # has the hash of every file
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise ValueError(f"{file}: cannot be read, {error.strerror}") from None
    return digest.hexdigest()[:16]


def stamp_of(folder: Path) -> str:
    """Changes whenever a file of the folder does, at the cost of looking at each."""
    folder = folder.resolve()
    seen = [str(folder)]
    for file in sorted(folder.rglob("*")):
        try:
            found = file.stat()
        except OSError:  # removed meanwhile
            continue
        seen.append(f"{file} {found.st_ino} {found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()


class ServedExport:
    """The current export of a folder; a thread of its own looks for a newer one.

    Attributes:
        current: the export that answers. Whoever answers a request takes it once.
        refused: why the folder's present content is not the current export, or None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interval_s: float,
        retrieval: Retrieval = "exact",
        report: Callable[[str, bool], None] = lambda digest, is_served: None,
    ) -> None:
        """
        Args:
            interval_s: between two looks at the folder; 0: it is never looked at again.
            report: told of each export that is taken over (True) or refused (False).
        Raises:
            ValueError: nothing to serve there.
        """
        self._folder = folder
        self._report = report
        self._stamp = stamp_of(folder)
        self._retrieval = retrieval
        self.current = load_export(folder, retrieval)
        self.refused: str | None = None
        self._report(self.current.digest, True)
        self._ended = threading.Event()
        if interval_s:
            watch = threading.Thread(target=self._watch, args=(interval_s,), daemon=True)
            watch.start()

    def close(self) -> None:
        """No more looks at the folder."""
        self._ended.set()

    def look(self) -> None:
        """Take over what is in the folder if it is another export and a good one."""
        try:
            stamp = stamp_of(self._folder)
            if stamp == self._stamp:
                return
            self._stamp = stamp  # what is refused is not read again until it changes
            if digest_of(self._folder.resolve()) != self.current.digest:
                self.current = load_export(self._folder, self._retrieval)
                logger.info("serve: %s is served now", self.current.digest)
                self._report(self.current.digest, True)
            self.refused = None
        except Exception as error:  # whatever is wrong with it, the old one serves
            self.refused = " ".join(str(error).split()) or type(error).__name__
            logger.warning("serve: %s; %s goes on being served", self.refused, self.current.digest)
            self._report(self.current.digest, False)

    def _watch(self, interval_s: float) -> None:
        while not self._ended.wait(interval_s):
            self.look()
