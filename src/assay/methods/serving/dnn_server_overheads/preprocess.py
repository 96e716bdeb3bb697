"""From a JPEG to what a network is given: decode, resize, normalise, in each of the ways whose costs differ.

`Preprocess(draft=False, precision="float32")` is the plain way: the whole image is decoded, its central square is resized with
antialiasing, and float32 numbers, channels first, are handed on. With `draft` the decoder itself makes an image of a half, a quarter or
an eighth of the sides where that is still large enough (libjpeg's scaled inverse transform), and with "uint8" the bytes
are handed on as they are, a quarter of the size, and normalised in the batch (`normalised`). Both kinds of normalising are the same to
the bit; draft decoding is another resize kernel, and changes pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from assay import checks
from assay.methods.serving.dnn_server_overheads.profiler import UNSEEN, Lifetime

if TYPE_CHECKING:
    import torch

PIXELS = 50_000_000
"""Of an image at most, by its header; what decodes to more is refused before it is decoded. Our choice."""
KERNELS = ("nearest", "box", "bilinear", "bicubic")
PRECISIONS = ("float32", "float16", "uint8")


@dataclass(frozen=True)
class Preprocess:
    """How images become inputs: `size` pixels a side, the central square, by `kernel`; see the module for `draft` and `precision`.

    `mean` and `std` are those of the channels, of numbers from 0 to 1.
    Calling it with a JPEG's bytes gives (3, size, size) float32 or float16, or (size, size, 3) uint8. Raises ValueError for what is no
    JPEG, is cut off, or has more than `PIXELS` pixels. A camera's note of how it was held (EXIF orientation) is not applied.
    """

    size: int = 224
    draft: bool = False
    precision: str = "float32"
    kernel: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        checks.whole("size", self.size, low=1, high=4096)
        checks.flag("draft", self.draft)
        checks.choice("precision", self.precision, PRECISIONS)
        checks.choice("kernel", self.kernel, KERNELS)
        for name, values, above in (("mean", self.mean, None), ("std", self.std, 0.0)):
            if len(values) != 3:
                raise ValueError(f"{name} must have three numbers, got {checks.shown(values)}")
            for value in values:
                checks.number(name, value, above=above)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an input."""
        return (self.size, self.size, 3) if self.precision == "uint8" else (3, self.size, self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of an input: what has to be handed on for each image."""
        return 3 * self.size**2 * np.dtype(self.precision).itemsize

    def __call__(self, data: bytes, life: Lifetime = UNSEEN) -> np.ndarray:
        picture = self._decoded(data)
        life.mark("decode")
        pixels = self._resized(picture)
        life.mark("resize")
        found = self._as_input(pixels)
        life.mark("normalise")
        return found

    def _decoded(self, data: bytes) -> Any:
        from PIL import Image, UnidentifiedImageError

        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be a JPEG's bytes, got {type(data).__name__}")
        try:
            picture = Image.open(io.BytesIO(data), formats=("JPEG",))
            width, height = picture.size
            if width * height > PIXELS:
                raise ValueError(f"data must have at most {PIXELS} pixels, got {width} x {height}")
            if self.draft:
                picture.draft("RGB", (self.size, self.size))
            return picture.convert("RGB")  # decodes
        except UnidentifiedImageError:  # whose text has an address in memory
            raise ValueError(f"data must be a JPEG, got {len(data)} bytes that are none") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises for broken files
            raise ValueError(f"data must be a JPEG: {str(error)[:100]}") from None

    def _resized(self, picture: Any) -> np.ndarray:
        from PIL import Image

        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        kernel = getattr(Image.Resampling, self.kernel.upper())
        square = picture.resize((self.size, self.size), kernel, box=(left, top, left + side, top + side))
        return np.array(square)

    def _as_input(self, pixels: np.ndarray) -> np.ndarray:
        if self.precision == "uint8":
            return pixels
        scale, shift = self.affine()
        found = pixels.astype(np.float32)
        found *= scale
        found -= shift
        return np.ascontiguousarray(found.transpose(2, 0, 1)).astype(self.precision, copy=False)

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """What bytes are multiplied by, and what is taken off, to normalise them: float32, three each."""
        std = np.asarray(self.std, np.float64)
        return (1 / (255 * std)).astype(np.float32), (np.asarray(self.mean, np.float64) / std).astype(np.float32)

    def normalised(self, batch: np.ndarray | torch.Tensor) -> torch.Tensor:
        """A batch of inputs as the network's float32 tensor (n, 3, size, size), channels last in memory; uint8 is normalised here.

        Equal to the bit to what precision "float32" makes. Raises TypeError or ValueError for another dtype or shape.
        """
        import torch

        if isinstance(batch, np.ndarray) and not batch.flags.writeable:
            batch = batch.copy()  # torch has no tensors that cannot be written
        given = torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch
        dtype = getattr(torch, self.precision)
        checks.tensor("batch", given, shape=("n", *self.shape), dtype=dtype)
        if self.precision != "uint8":
            return given.float().contiguous(memory_format=torch.channels_last)
        scale, shift = (torch.from_numpy(part).to(given.device) for part in self.affine())
        return given.float().mul_(scale).sub_(shift).permute(0, 3, 1, 2)
