"""Noise of a camera: its variance grows with the light, and it is correlated over pixels and channels."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.imaging import seeded_normal

# How far around a pixel the brightness is averaged that its noise depends on.
LIGHT_REACH = 2


@dataclass(frozen=True, eq=False)
class NoiseModel:
    r"""Gaussian noise whose variance depends on the clean image x, correlated over pixels and channels.

    .. math:: y_c = x_c + \sqrt{a_c x_c + b_c}\; (h_c * w), \qquad w \sim \mathcal N(0, I)

    The variance is that of photons and of reading (Foi, Trimeche, Katkovnik & Egiazarian, IEEE TIP 17, 2008); a
    camera's tone curve can turn its slope a negative. The filter h, whose rows have the norm 1, is what demosaicking,
    sharpening and compression do to white noise. To operators it is an `operators.operator.NoiseDescription`.

    Attributes:
        slope: a, `[B, C]`: variance for each unit of light, where white is 1.
        intercept: b, `[B, C]`: variance at black.
        brightness: Mean of the images whose noise this is, `[B, C]`, for `level` and `distance_bias`.
        kernel: h, `[B, C, C, K, K]`, K odd: filter from white noise in each channel (second C) to each channel.

    Example:
        >>> noise = NoiseModel.white(torch.tensor([0.1]), channels=3)
        >>> noise.level, noise.distance_bias((0, 1)), noise.is_white
        (tensor([0.1000]), tensor([0.0200]), tensor([True]))
    """

    slope: Tensor
    intercept: Tensor
    brightness: Tensor
    kernel: Tensor

    @classmethod
    def white(cls, level: Tensor, channels: int) -> "NoiseModel":
        """White Gaussian noise.

        Args:
            level: Its standard deviation.
            channels: Channels of the images.

        Shape:
            - level: `[B]`
        """
        flat = level.new_zeros(len(level), channels)
        kernel = torch.eye(channels).to(level).view(1, channels, channels, 1, 1).expand(len(level), -1, -1, -1, -1)
        return cls(flat, flat + level.square()[:, None], flat + 0.5, kernel)

    @property
    def level(self) -> Tensor:
        """Root mean variance over channels and pixels of the images, `[B]`."""
        return self._mean_variance().mean(1).sqrt()

    @property
    def is_uncorrelated(self) -> Tensor:
        """Whether it is independent from pixel to pixel, `[B]`."""
        channels, side = self.kernel.shape[-3], self.kernel.shape[-1]
        others = self.kernel.clone()
        others[..., side // 2, side // 2] -= torch.eye(channels).to(others)
        return (others == 0).flatten(1).all(1)

    @property
    def is_white(self) -> Tensor:
        """Whether it is so, and as strong everywhere, `[B]`."""
        variances = torch.stack([self.intercept, self.slope + self.intercept], -1).flatten(1)
        return self.is_uncorrelated & (variances == variances[:, :1]).all(1)

    @property
    def neighbor_correlation(self) -> Tensor:
        """Correlation of neighboring pixels, mean over both directions and the channels, `[B]`."""
        middle = self.kernel.shape[-1] - 1
        if middle == 0:
            return self.kernel.new_zeros(len(self.kernel))
        same = self.correlation().diagonal(dim1=1, dim2=2)  # [B, 2K - 1, 2K - 1, C]
        return (same[:, middle, middle + 1] + same[:, middle + 1, middle]).mean(1) / 2

    @property
    def low_frequency_gain(self) -> Tensor:
        """Level of white noise that is as strong at the lower half of the frequencies, over this one's level, `[B]`.

        That much is what an operator made for white noise has to be told of it.
        """
        response = torch.fft.fft2(self.kernel, s=(32, 32))
        power = response.abs().square().sum(2).mean(1)
        low = torch.fft.fftfreq(32, device=power.device).abs() <= 0.25
        return power[:, low][..., low].mean((1, 2)).sqrt()

    def variance(self, images: Tensor) -> Tensor:
        """Noise variance of each pixel, before clipping.

        Args:
            images: Clean images, or what is known of them.

        Shape:
            - images: `[B, C, H, W]`
            - output: `[B, C, H, W]`
        """
        slope, intercept = (value.to(images)[..., None, None] for value in (self.slope, self.intercept))
        return (slope * images.clamp(0, 1) + intercept).clamp_min(0)

    def correlation(self) -> Tensor:
        r"""Correlation of the noise at two pixels, :math:`E[n_c(p)\, n_d(p + \delta)]` for noise of variance 1.

        Shape:
            - output: `[B, C, C, 2K - 1, 2K - 1]`, δ = 0 in the middle
        """
        around = self.kernel.shape[-1] - 1
        return torch.stack([F.conv2d(kernel, kernel, padding=around) for kernel in self.kernel])

    def distance_bias(self, offset: tuple[int, int]) -> Tensor:
        r"""What the noise adds to the squared difference of two pixels, mean over channels.

        .. math:: \frac2C \sum_c (a_c \bar x_c + b_c)\,(1 - R_{cc}(\delta))

        Args:
            offset: δ, rows and columns from one pixel to the other.

        Shape:
            - output: `[B]`
        """
        around = self.kernel.shape[-1] - 1
        variance = self._mean_variance()
        if max(map(abs, offset)) > around:
            return 2 * variance.mean(1)
        row, column = (around + step for step in offset)
        same = self.correlation()[..., row, column].diagonal(dim1=1, dim2=2)
        return 2 * (variance * (1 - same)).mean(1)

    def sample(self, clean: Tensor, key: Tensor, clip: bool = False) -> Tensor:
        """Noisy images; the noise is a function of each image's key.

        Args:
            clean: Clean images.
            key: One integer for each, as in `imaging.seeded_normal`.
            clip: Whether the result is clipped to [0, 1].

        Shape:
            - clean: `[B, C, H, W]`
            - key: `[B]`, int64
            - output: `[B, C, H, W]`
        """
        size, channels, height, width = clean.shape
        side = self.kernel.shape[-1]
        draws = seeded_normal(key, (channels, height + side - 1, width + side - 1)).to(clean)
        kernel = self.kernel.to(clean).expand(size, -1, -1, -1, -1).flatten(0, 1)
        noise = F.conv2d(draws.flatten(0, 1)[None], kernel, groups=size).view_as(clean)
        noisy = clean + self.variance(clean).sqrt() * noise
        return noisy.clamp(0, 1) if clip else noisy

    def whiten(self, noise: Tensor, clean: Tensor) -> Tensor:
        """White noise of variance 1, of which the filter makes this noise on a torus.

        Shape:
            - noise, clean: `[B, C, H, W]`
            - output: `[B, C, H, W]`
        """
        unit = noise / self.variance(clean).clamp_min(torch.finfo(noise.dtype).tiny).sqrt()
        spectrum = torch.fft.rfft2(unit).movedim(1, -1)[..., None]
        white = torch.linalg.solve(self._response(noise), spectrum)[..., 0].movedim(-1, 1)
        return torch.fft.irfft2(white, s=noise.shape[-2:])

    def log_likelihood(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Logarithm of the density of noisy images given the clean ones, continued periodically, for each number.

        Shape:
            - noisy, clean: `[B, C, H, W]`
            - output: `[B]`
        """
        variance = self.variance(clean).clamp_min(torch.finfo(noisy.dtype).tiny)
        square = self.whiten(noisy - clean, clean).square().mean((1, 2, 3))
        _, log_determinant = torch.linalg.slogdet(self._response(noisy, half=False))
        filtered = log_determinant.mean((1, 2)) / noisy.shape[1]
        return -0.5 * (math.log(2 * math.pi) + square + variance.log().mean((1, 2, 3))) - filtered

    def stabilize(self, images: Tensor) -> Tensor:
        r"""Images whose noise has the variance 1 everywhere, by the generalized Anscombe transform.

        .. math:: t(y) = \frac2a \left(\sqrt{a y + c} - \sqrt c\right), \qquad c = \tfrac38 a^2 + b

        Shape:
            - images: `[B, C, H, W]`
            - output: `[B, C, H, W]`
        """
        slope, constant = self._stabilizer(images)
        root = (slope * images + constant).clamp_min(0).sqrt()
        inside = torch.where(root > 0, images, -constant / torch.where(slope == 0, 1, slope))
        return 2 * inside / (root + constant.sqrt()).clamp_min(torch.finfo(images.dtype).tiny)

    def unstabilize(self, images: Tensor) -> Tensor:
        r"""Exact unbiased inverse of `stabilize`: the x of which the images are the mean of t(y).

        The closed form of Mäkitalo & Foi (IEEE TIP 22, 2013, eq. 10), with the mirror image of it for negative slopes.

        Shape:
            - images: `[B, C, H, W]`
            - output: `[B, C, H, W]`
        """
        slope, constant = self._stabilizer(images)
        root = (slope * images / 2 + constant.sqrt()).clamp_min(0)
        algebraic = images * (constant.sqrt() + slope * images / 4)
        algebraic = torch.where(root > 0, algebraic, -constant / torch.where(slope == 0, 1, slope))
        photons = 2 * root / slope.abs().clamp_min(torch.finfo(images.dtype).tiny)
        inverse = 1 / photons.clamp_min(2 * math.sqrt(3 / 8))
        series = 0.25 + math.sqrt(1.5) / 4 * inverse - 11 / 8 * inverse**2 + 5 / 8 * math.sqrt(1.5) * inverse**3
        return algebraic + slope * series

    def stable_range(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale by which what `stabilize` makes of [0, 1] is in [0, 1]: the noise then has the level scale.

        Shape:
            - images: `[C, H, W]`, for precision and device
            - output: `[C, 1, 1]` and `[]`
        """
        black = images.new_zeros(1, len(images), 1, 1)
        ends = self.stabilize(torch.cat([black, black + 1]))
        return ends[0], 1 / (ends[1] - ends[0]).amax()

    def level_map(self, noisy: Tensor) -> Tensor:
        """Standard deviation of the noise of each pixel, by the brightness of its neighborhood, which has less noise.

        Shape:
            - noisy: `[B, C, H, W]`
            - output: `[B, 1, H, W]`
        """
        light = F.avg_pool2d(noisy, 2 * LIGHT_REACH + 1, 1, LIGHT_REACH, count_include_pad=False)
        return self.variance(light).mean(1, keepdim=True).sqrt()

    def of(self, index: int) -> "NoiseModel":
        """That of one image of the batch."""
        return NoiseModel(
            *(value[index : index + 1] for value in (self.slope, self.intercept, self.brightness, self.kernel))
        )

    def to(self, images: Tensor) -> "NoiseModel":
        """The same in the precision and on the device of images.

        Shape:
            - images: `[...]`
        """
        return replace(self, **{name: value.to(images) for name, value in vars(self).items()})

    def _mean_variance(self) -> Tensor:
        return (self.slope * self.brightness + self.intercept).clamp_min(0)

    def _stabilizer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        slope, intercept = (value.to(images)[..., None, None] for value in (self.slope, self.intercept))
        return slope, (0.375 * slope.square() + intercept).clamp_min(0)

    def _response(self, images: Tensor, half: bool = True) -> Tensor:
        """Frequency response of the filter on the images' torus, `[B, H, W, C, C]`, W halved for real transforms."""
        height, width = images.shape[-2:]
        side = self.kernel.shape[-1]
        kernel = self.kernel.to(images)
        padded = images.new_zeros(*kernel.shape[:3], height, width)
        rows, columns = (torch.arange(side, device=images.device) - side // 2 for _ in range(2))
        # on a torus smaller than the filter its ends meet
        index = (rows % height)[:, None] * width + columns % width
        padded.flatten(3).index_add_(3, index.flatten(), kernel.flatten(3))
        transform = torch.fft.rfft2 if half else torch.fft.fft2
        return transform(padded).conj().movedim((1, 2), (3, 4))
