"""The interface of an assignment, and the one that needs no rows."""

from abc import ABC, abstractmethod

from torch import Tensor

from lightning_modules.em._float64 import Float64Buffers


class Assignment(Float64Buffers, ABC):
    """Gives every image its responsibilities over the rows of a parameter table: the E-step's posterior.

    A new way to decide is a new subclass in a file of its own, named by `class_path` in a configuration.
    """

    def check_labels(self, labels: Tensor, num_rows: int) -> None:
        """Raise `ValueError` for labels that this assignment cannot use; called while they are on the host.

        Args:
            labels: Class labels; −1 where there is none.
            num_rows: Number K of rows.

        Shape:
            - labels: int64 `[B]`
        """

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor, noise_std: Tensor, num_rows: int) -> Tensor:
        """Responsibilities of the rows for each image; a row of zeros is the global parameter set.

        Args:
            images: The images as they come in, noisy.
            labels: Class labels; −1 where there is none.
            noise_std: Noise standard deviation of each image, known or estimated.
            num_rows: Number K of rows.

        Shape:
            - images: `[B, C, H, W]`
            - labels: int64 `[B]`
            - noise_std: `[B]`
            - output: float64 `[B, K]`, each row's sum in [0, 1]
        """

    def e_step(self, images: Tensor, labels: Tensor, noise_std: Tensor, responsibilities: Tensor) -> Tensor | None:
        """E-step of the assignment's own model: sufficient statistics of each image, which `m_step` receives summed.

        Args:
            images: The images as they come in, noisy.
            labels: Class labels; −1 where there is none.
            noise_std: Noise standard deviation of each image, known or estimated.
            responsibilities: What `forward` returned for them.

        Shape:
            - responsibilities: `[B, K]`
            - output: float64 `[B, M]`; None where there is nothing to learn
        """
        return None

    def m_step(self, sums: Tensor, accepted: Tensor) -> None:
        """M-step of the assignment's own model, in closed form, alike on every process.

        Must not wait for the device (`.item()`, `if tensor`): select with `accepted` instead.

        Args:
            sums: Sums of the statistics over all images of an optimiser step, all processes included.
            accepted: Whether the step counts; the state stays where it does not.

        Shape:
            - sums: float64 `[M]`
            - accepted: boolean scalar
        """

    def warnings(self, ended: bool = False) -> list[str]:
        """Sentences that the user should read, each of which is said once; asked for on steps that log.

        Args:
            ended: Whether the run is over.
        """
        return []

    def diagnostics(self) -> dict[str, float]:
        """Numbers to log about the assignment's own model, by name; read only on steps that log."""
        return {}


class GlobalAssignment(Assignment):
    """Every image uses the global parameter set.

    Example:
        >>> import torch
        >>> images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
        >>> GlobalAssignment()(images, labels, torch.zeros(2), num_rows=3).sum().item()
        0.0
    """

    def forward(self, images: Tensor, labels: Tensor, noise_std: Tensor, num_rows: int) -> Tensor:
        """Zeros; see `Assignment.forward`."""
        return noise_std.new_zeros(len(images), num_rows).double()
