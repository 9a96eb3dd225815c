"""Image restoration by a Gaussian mixture over patches: expected patch log-likelihood."""

from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.checkpoints.file import read_checkpoint

# Penalties of the half-quadratic steps in units of 1 / noise variance (Zoran and Weiss 2011).
_PENALTIES = (1.0, 4.0, 8.0, 16.0, 32.0, 64.0)
# Numbers that one chunk of patches may fill: a cache on the CPU, enough parallel work elsewhere.
_CHUNK_NUMBERS = {"cpu": 2**20}
_DEVICE_CHUNK_NUMBERS = 2**26


class PatchPrior(nn.Module):
    r"""Restores noisy images under a Gaussian mixture over their patches (EPLL; Zoran and Weiss 2011).

    Minimises :math:`\frac{1}{2\sigma^2}\|x - y\|^2 - \frac{1}{p^2}\sum_i \log p(P_i x)`-like energy by half-quadratic
    splitting: for growing :math:`\beta`, every overlapping patch becomes its Wiener estimate under the component that
    explains it best at noise :math:`1/\beta`, and the image the weighted mean of the noisy one and the folded patches,

    .. math:: x = (\lambda y + \beta \textstyle\sum_i P_i^\top z_i / p^2) / (\lambda + \beta), \ \lambda = \sigma^{-2}.

    Patches have their mean removed. Colours are first turned into three uncorrelated channels, each restored by the
    same prior. Nothing leaves the device between the steps.

    Args:
        weights: Weights of the mixture.
        means: Means of patches without their mean.
        covariances: Covariances.
        noise_std: Noise of the images where `forward` is not given it.
        stride: Distance between patches; 1 takes all.

    Shape:
        - weights: `[K]`
        - means: `[K, p²]`
        - covariances: `[K, p², p²]`

    Example:
        >>> prior = PatchPrior(torch.ones(1), torch.zeros(1, 16), 0.05 * torch.eye(16)[None], noise_std=0.1)
        >>> prior(torch.rand(2, 1, 12, 9)).shape
        torch.Size([2, 1, 12, 9])
    """

    log_weights: Tensor  # [K]
    means: Tensor  # [K, p²]
    vectors: Tensor  # eigenvectors of the covariances, in columns, [K, p², p²]
    values: Tensor  # eigenvalues of the covariances, [K, p²]

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        noise_std: float = 25 / 255,
        stride: int = 1,
    ) -> None:
        super().__init__()
        if (
            covariances.ndim != 3
            or covariances.shape[1] != covariances.shape[2]
            or means.shape != covariances.shape[:2]
        ):
            raise ValueError(
                f"covariances must be [K, D, D] and means [K, D], got {tuple(covariances.shape)} and "
                f"{tuple(means.shape)}"
            )
        self.patch_size = round(means.shape[1] ** 0.5)
        if self.patch_size**2 != means.shape[1]:
            raise ValueError(f"patches must be square and of one channel, got {means.shape[1]} features")
        for name, value in (("noise_std", noise_std), ("stride", stride)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if stride > self.patch_size:
            raise ValueError(f"stride must be at most the patch size {self.patch_size}, got {stride}")
        self.noise_std, self.stride = noise_std, stride
        values, vectors = torch.linalg.eigh(covariances.double())
        self.register_buffer("log_weights", weights.double().log())
        self.register_buffer("means", means.double())
        self.register_buffer("vectors", vectors)
        self.register_buffer("values", values.clamp(min=0.0))

    @classmethod
    def from_checkpoint(cls, path: str | Path, noise_std: float = 25 / 255) -> "PatchPrior":
        """Returns the prior in a checkpoint of `GaussianMixture` (full covariances).

        Args:
            path: The checkpoint.
            noise_std: Noise of the images where `forward` is not given it.
        """
        state = read_checkpoint(path)
        state = state.get("state_dict", state)
        try:
            best = int(state["model.best"])
            offset, scale = state["model.offset"], state["model.scale"]
            weights, means, covariances = (state[f"model.{n}"][best] for n in ("weights", "means", "covariances"))
        except KeyError as error:
            raise ValueError(
                f"{path} is not a checkpoint of lightning_modules.GaussianMixture: it lacks {error}"
            ) from None
        if covariances.ndim != 3:
            raise ValueError(f"{path} has a mixture without full covariances; learn it with covariance_type: full")
        covariances = covariances * (scale[:, None] * scale)
        return cls(weights, means * scale + offset, covariances, noise_std=noise_std)

    def forward(self, noisy: Tensor, noise_std: Tensor | float | None = None) -> Tensor:
        """Returns the restored images.

        Args:
            noisy: Images.
            noise_std: Standard deviation of their noise, a number or one for each image.

        Shape:
            - noisy: `[B, C, H, W]` in [0, 1]
            - noise_std: `[B]`, or a number
            - output: `[B, C, H, W]`
        """
        if min(noisy.shape[-2:]) < self.patch_size:
            raise ValueError(f"images of {tuple(noisy.shape[-2:])} are smaller than the patch size {self.patch_size}")
        levels = torch.as_tensor(self.noise_std if noise_std is None else noise_std, device=noisy.device)
        levels = levels.to(noisy).expand(noisy.shape[0])
        restored = [self._restore(image, level) for image, level in zip(noisy, levels, strict=True)]
        return torch.stack(restored)

    def _restore(self, noisy: Tensor, noise_std: Tensor) -> Tensor:
        """One image `[C, H, W]`, its channels decorrelated and restored together."""
        mix = _color_basis(noisy.shape[0]).to(noisy)
        observed = torch.einsum("cd,dhw->chw", mix, noisy)
        estimate = observed
        variance = noise_std.square().clamp(min=1e-8)
        for penalty in _PENALTIES:
            folded = self._fold_estimates(estimate, variance / penalty)
            estimate = (observed + penalty * folded) / (1 + penalty)
        return torch.einsum("cd,chw->dhw", mix, estimate)

    def _fold_estimates(self, image: Tensor, variance: Tensor) -> Tensor:
        """Every patch's Wiener estimate at noise `variance`, averaged where patches overlap."""
        # continued by its border pixels until patches at the stride cover it
        height, width = image.shape[-2:]
        extra = [-(side - self.patch_size) % self.stride for side in (height, width)]
        padded = F.pad(image[None], (0, extra[1], 0, extra[0]), mode="replicate")[0]
        size = {"kernel_size": self.patch_size, "stride": self.stride}
        patches = F.unfold(padded[:, None], **size).transpose(1, 2)
        shape = patches.shape
        patches = self._wiener(patches.reshape(-1, shape[-1]), variance).view(shape).transpose(1, 2)
        folded = F.fold(patches, padded.shape[-2:], **size)
        count = F.fold(torch.ones_like(patches[:1]), padded.shape[-2:], **size)
        return (folded / count)[:, 0, :height, :width]

    def _wiener(self, patches: Tensor, variance: Tensor) -> Tensor:
        r"""Estimate of each patch under its best component: :math:`\mu + \Sigma (\Sigma + v I)^{-1} (p - \mu)`.

        Shape:
            - patches: `[N, p²]`
            - output: `[N, p²]`
        """
        level = patches.mean(dim=1, keepdim=True)
        centered = patches - level
        dtype = centered.dtype
        noisy = self.values + variance.double()
        whitening = self.vectors * noisy.rsqrt()[:, None]
        constant = self.log_weights - 0.5 * noisy.log().sum(dim=1)
        labels = self._best_components(centered, whitening.to(dtype), constant.to(dtype))
        gain = (self.vectors * (self.values / noisy)[:, None]) @ self.vectors.mT
        order = labels.argsort()
        counts = torch.bincount(labels, minlength=len(self.values)).tolist()
        grouped, means = centered[order].split(counts), self.means.to(dtype)
        parts = [means[k] + (part - means[k]) @ gain[k].to(dtype) for k, part in enumerate(grouped) if len(part)]
        result = torch.empty_like(centered)
        result[order] = torch.cat(parts)
        return result + level

    def _best_components(self, patches: Tensor, whitening: Tensor, constant: Tensor) -> Tensor:
        r"""Component with the largest :math:`\log \pi_k N(p; \mu_k, \Sigma_k + v I)` for each patch, one matrix product
        a chunk.
        """
        width = self.means.shape[1]
        # the symmetric form needs half the products of the factors
        precision = whitening @ whitening.mT
        mean = self.means.to(patches.dtype)
        linear = torch.einsum("kde,ke->kd", precision, mean)
        shift = constant - 0.5 * (linear * mean).sum(dim=1)
        upper = torch.triu_indices(width, width, device=patches.device)
        factor = torch.where(upper[0] == upper[1], 0.5, 1.0).to(patches.dtype)
        quadratic = -precision[:, upper[0], upper[1]] * factor
        coefficients = torch.cat([quadratic, linear, shift[:, None]], dim=1)
        total = _CHUNK_NUMBERS.get(patches.device.type, _DEVICE_CHUNK_NUMBERS)
        step = max(256, total // coefficients.shape[1])
        labels = torch.empty(len(patches), dtype=torch.long, device=patches.device)
        starts = [0, *accumulate(range(width, 0, -1))]
        for begin in range(0, len(patches), step):
            columns = patches[begin : begin + step].T.contiguous()
            features = columns.new_empty(coefficients.shape[1], columns.shape[1])
            for first in range(width):
                torch.mul(columns[first], columns[first:], out=features[starts[first] : starts[first + 1]])
            features[-width - 1 : -1] = columns
            features[-1] = 1.0
            # max: argmax takes one number at a time on a CPU
            labels[begin : begin + step] = (coefficients @ features).max(dim=0).indices
        return labels


def _color_basis(channels: int) -> Tensor:
    """An orthonormal basis: grey and two opponent colours for three channels, the channels themselves otherwise."""
    if channels != 3:
        return torch.eye(channels)
    basis = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    return basis / basis.norm(dim=1, keepdim=True)
