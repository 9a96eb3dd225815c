"""Residual of a restoration: the noise of an image, and the traces of whatever made it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.checkpoints.file import read_checkpoint
from lightning_modules.detection.inputs import DetectorInput
from lightning_modules.em import ParameterTable
from lightning_modules.em.parameter_table import TableValues, stored_columns
from lightning_modules.graph import GraphDiffusion

# A little smoothing over near neighbours that resemble each other; where none does, as in white noise, nothing is taken
# away.
_INITIAL = {"sigma": 0.1, "tau": 0.1, "radius": 2.0, "sigma_s": 1.5, "sigma_f": 0.2, "smooth_steps": 1}
_BOUNDS = {
    "sigma": (0.02, 1.0),
    "tau": (0.005, 0.9),
    "radius": (1.5, 2.0),
    "sigma_s": (0.5, 20.0),
    "sigma_f": (0.02, 1.0),
    "smooth_steps": (1, 10),
}
_LEARNED = ["sigma", "tau", "sigma_s", "sigma_f"]


class RestorationResidual(DetectorInput):
    r"""The image less its restoration by graph diffusion, :math:`x - \text{restore}(x)`.

    The image is restored as if it were free of noise (nothing is taken off the distances), so that what the similarity
    of patches explains goes and everything else stays. Where the parameters are fixed, no gradient is computed.

    Args:
        diffusion: The graph diffusion; patches of 3 by default.
        em_parameters: Its parameters; by default values that suit photographs without visible noise.
        checkpoint: Checkpoint of a `GraphDiffusionReconstruction` whose global parameters are loaded when the fit
            starts. From then on they travel with the detector: a fit that resumes does not read it again.
        learn: Learn the parameters from the detector's own loss, under `callbacks.EMParameterCallback`.
        scale: See `DetectorInput`.

    Example:
        >>> residual = RestorationResidual()
        >>> residual(torch.full((1, 3, 12, 10), 0.5)).abs().max() < 1e-4
        tensor(True)
    """

    def __init__(
        self,
        diffusion: GraphDiffusion | None = None,
        em_parameters: ParameterTable | None = None,
        checkpoint: str | None = None,
        learn: bool = False,
        scale: float = 20.0,
    ) -> None:
        super().__init__(scale)
        #: arguments that were left out, which the attributes of their names no longer show
        self.given = {
            name: None for name, part in (("diffusion", diffusion), ("em_parameters", em_parameters)) if part is None
        }
        self.diffusion = GraphDiffusion(patch_size=3) if diffusion is None else diffusion
        if em_parameters is None:
            em_parameters = ParameterTable(initial=_INITIAL, bounds=_BOUNDS, learned=_LEARNED)
        if self.diffusion.widths == "noise":
            raise ValueError(
                "the residual takes images as free of noise, in which widths='noise' has no unit: use 'absolute'"
            )
        self.em_parameters = table = em_parameters.declare(self.diffusion.parameter_specs)
        self.diffusion.set_bounds({n: (table.lower_bound(n), table.upper_bound(n)) for n in table.names})
        self.checkpoint = checkpoint
        self.learn = learn

    def featurize(self, images: Tensor) -> Tensor:
        """The residual; see `DetectorInput.featurize`."""
        table = self.em_parameters
        with torch.set_grad_enabled(self.learn and torch.is_grad_enabled()):
            parameters: dict[str, Any] = table(images.new_zeros(len(images), len(table.row_names)))
            return images - self.diffusion(images, **parameters)

    def load_from_checkpoint(self) -> None:
        """Loads the parameters of `checkpoint`, where there is one.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it has no parameters of a diffusion, or values outside the bounds of this table.
        """
        if self.checkpoint is None:
            return
        if not Path(self.checkpoint).exists():
            raise FileNotFoundError(
                f"the restoration's checkpoint {self.checkpoint} does not exist: give the path of a checkpoint that "
                "fitting GraphDiffusionReconstruction has written, or leave `checkpoint` out"
            )
        state = read_checkpoint(self.checkpoint).get("state_dict", {})
        table = self.em_parameters
        shared, columns = state.get("em_parameters.shared"), stored_columns(state, "em_parameters.")
        missing = [name for name in table.column_labels if name not in columns] if columns else []
        if not columns or missing:
            raise ValueError(
                f"{self.checkpoint} has no {', '.join(missing) or 'parameter table'} of a diffusion: give a "
                "checkpoint of GraphDiffusionReconstruction"
            )
        shared = shared[[columns.index(name) for name in table.column_labels]].double()
        lower, upper = table.lower.cpu(), table.upper.cpu()
        outside = ((shared < lower - 1e-9) | (shared > upper + 1e-9)).tolist()
        if any(outside):
            names = [name for name, out in zip(table.column_names, outside, strict=True) if out]
            raise ValueError(
                f"the values of {', '.join(names)} in {self.checkpoint} are outside the bounds of this table: give it "
                "the bounds of the reconstruction"
            )
        table.write(TableValues(shared.to(table.shared), table.offsets.clone()))
        # by the way of a checkpoint, on which the table reads its constants again
        table.load_state_dict(table.state_dict())
