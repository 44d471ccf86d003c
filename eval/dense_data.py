"""Images with a map beside each: a mask of classes or a depth map, which is another member of the sample.

    0000007.jpg  0000007.mask.png     a PNG of class numbers, 8 or 16 bits (or .npy, integers [H, W])
    0000007.jpg  0000007.depth.png    a 16-bit PNG in units of `scale` metres (or .npy, floats [H, W] in metres)

Shapes: H × W pixels of an image, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from common.errors import Absent, Damaged, DataError
from data_pipeline.formats.image_formats import IMAGE_MEMBERS
from data_pipeline.formats.pixel_maps import read_map
from data_pipeline.shards.samples import Samples
from eval.feature_cache import read_batches
from eval.features import Encoder

DEPTHS = ("depth.png", "depth.npy")
IGNORED = -1  # class of pixels that are not scored
IMAGES = tuple(e for e in IMAGE_MEMBERS if e not in ("png", "npy"))


class Pairs:
    """The samples of shards that have an image and a map. `encoder`: None if they are only counted.

    `member`: the ending of the map; "": the first one of `endings`, or else png or npy beside an image of another
    format. `key`: of the option that names it. Raises DataError if no sample has both.
    """

    def __init__(self, encoder: Encoder | None, specs: Sequence[str], member: str, endings: Sequence[str], key: str):
        self.protocol = protocol = key.partition(".")[0]
        if not specs:
            raise DataError(f"no shards are named for {protocol}; write gallery=… and query=…")
        if encoder is not None:
            self.encoder = encoder
        self.samples = Samples(specs, further=[member] if member else endings)
        if encoder is not None:
            encoder.check_pixels(self.samples)
        present = self.samples.extensions
        others = [e for e in ("png", "npy") if e in present and set(IMAGES) & {*present}]
        found = [member] if member in present else [] if member else [e for e in (*endings, *others) if e in present]
        if not found:
            raise DataError(
                f"{self.samples.names}: holds {', '.join(f'.{e}' for e in present)}, and no map for {protocol}; put"
                f" NAME.{member or endings[0]} beside NAME.jpg, or write {key}=ENDING. Shards that have an index already"
                f" need `unlabeled shards index FOLDER --members {member or endings[0]}`"
            )
        self.member = found[0]
        self.images = [e for e in IMAGE_MEMBERS if e in present and e != self.member]
        self.numbers = self._numbers()
        if not len(self.numbers):
            raise DataError(f"{self.samples.names}: no sample holds both an image and a .{self.member}")
        self.passed_over = len(self.samples) - len(self.numbers)
        self.damaged: set[int] = set()  # numbers of the samples that could not be read

    def __len__(self) -> int:
        return len(self.numbers)

    def _numbers(self) -> np.ndarray:
        """The numbers of the samples that have both, by the index."""
        has_both = np.zeros(len(self.samples), bool)
        (map_column,), image_columns = self.samples.columns([self.member]), self.samples.columns(self.images)
        for piece in self.samples.pieces(0, len(self.samples)):
            there = piece.records["offset"] > 0  # [n, extensions]
            part = slice(piece.first, piece.first + len(there))
            has_both[part] = there[:, map_column] & there[:, image_columns].any(1)
        return np.flatnonzero(has_both)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(image [H, W, C] of the encoder's dtype, map [H, W]) of a sample. Raises Damaged."""
        members = self.samples.read(int(number), [*self.images, self.member])
        extension = next((e for e in self.images if e in members), None)
        if extension is None:
            raise Absent("holds no image")
        encoder = self.encoder
        encoded = self.samples.encoded(int(number), members[extension], extension, encoder.channels, encoder.dtype)
        with encoder.budget.lease() as take:
            encoded.reserve = take
            image = encoded.pixels()
        values = read_map(members[self.member], self.member)
        if values.shape != image.shape[:2]:
            raise Damaged(f"its .{self.member} has {values.shape} pixels, but its image {image.shape[:2]}")
        return image, values

    def read_all(
        self, numbers: Sequence[int] | np.ndarray, batch: int
    ) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
        """Consecutive batches of what `read` returns, without the damaged samples, which are recorded."""
        for of_batch, found in read_batches(self._read_or_reason, numbers, batch):  # type: ignore[arg-type]
            self.damaged |= {int(n) for n, one in zip(of_batch, found, strict=True) if isinstance(one, Damaged)}
            yield [one for one in found if not isinstance(one, Damaged)]

    def _read_or_reason(self, number: int) -> tuple[np.ndarray, np.ndarray] | Damaged:
        try:
            return self.read(number)
        except Damaged as reason:
            return reason


def whole_patches(size: int, patch: int, key: str) -> int:
    """`size`, if it is a multiple of the patch size. Raises DataError with the nearest one."""
    if size % patch:
        nearest = max(1, round(size / patch)) * patch
        raise DataError(f"{key} = {size}: must be a multiple of the model's patch size {patch}; write {key}={nearest}")
    return size
