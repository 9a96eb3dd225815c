"""Bounded parameters with a global set and rows, which an M-step learns."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.em._anchor import Anchored
from lightning_modules.em._float64 import Float64Buffers
from lightning_modules.em.parameter_bounds import check_bounds, resolve


class TableValues(NamedTuple):
    """State of a `ParameterTable` in its coordinates: logarithms, and plain numbers for integers.

    Attributes:
        shared: Coordinates g of the global set, float64 `[P]`.
        offsets: Offsets δ of the rows from it, float64 `[K, P]`.
    """

    shared: Tensor
    offsets: Tensor


class ParameterTable(Float64Buffers):
    r"""Bounded parameters, one global set and one offset for each row, outside any optimiser's reach.

    An image with responsibilities r over the rows uses :math:`\log\theta = g + \sum_k r_k \delta_k`, clamped into the
    bounds where it is read. Values are float64 buffers, so they reach the device, every process, the checkpoint and
    whoever loads it. `forward` hands out a fresh leaf for each image, whose gradient arrives with the backward pass
    that the network needs anyway; `pop_gradient` collects it. One scalar parameter of weight 0, `anchor`, lets DDP
    wrap, automatic mixed precision scale and an optimiser exist where nothing else is trainable.

    Args:
        initial: Start values by name. Names of graph diffusion (`sigma`, `tau`, `radius`, `sigma_s`, `sigma_f`,
            `smooth_steps`) replace the default start; with any other name among them, the table holds exactly the
            names given.
        bounds: Lower and upper bound by name.
        learned: Names that the M-step moves; all of them by default.
        per_row: Names that have a value for each row.
        row_names: Names of the rows, such as the classes.
        initial_rows: Start values of rows that differ from the global set: row name, then parameter name.
        integers: Names whose values are whole numbers; these stay out of log space.

    Raises:
        ValueError: If bounds are reversed or not positive, a start value lies outside them, or a name is unknown.

    Example:
        >>> table = ParameterTable(learned=["sigma"], per_row=["sigma"], row_names=["cat", "dog"])
        >>> table(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))["sigma"].tolist()
        [0.30000001192092896, 0.30000001192092896]
        >>> table.get_parameters()["smooth_steps"]
        5
    """

    # Coordinates g of the global set and offsets δ of the rows, float64 [P] and [K, P].
    shared: Tensor
    offsets: Tensor
    # Bounds in the same coordinates, float64 [P].
    lower: Tensor
    upper: Tensor

    def __init__(
        self,
        initial: dict[str, float] | None = None,
        bounds: dict[str, tuple[float, float]] | None = None,
        learned: list[str] | None = None,
        per_row: list[str] | None = None,
        row_names: list[str] | None = None,
        initial_rows: dict[str, dict[str, float]] | None = None,
        integers: list[str] | None = None,
    ) -> None:
        super().__init__()
        start, limits = resolve(initial or {}, bounds or {})
        self.names = tuple(start)
        self.bounds = {name: (float(limits[name][0]), float(limits[name][1])) for name in self.names}
        whole = ["smooth_steps"] if integers is None else integers
        self.integers = tuple(name for name in whole if integers is not None or name in start)
        self.learned = tuple(self.names if learned is None else learned)
        self.per_row = tuple(per_row or ())
        self.row_names = tuple(row_names or ())
        for argument in ("integers", "learned", "per_row"):
            self._check_names(argument, getattr(self, argument))
        for name in self.names:
            check_bounds(name, start[name], self.bounds[name], whole=name in self.integers)

        shared = torch.tensor([self._coordinate(name, start[name]) for name in self.names], dtype=torch.float64)
        self.register_buffer("shared", shared)
        self.register_buffer("offsets", self._initial_offsets(shared, initial_rows or {}))
        for side, index in (("lower", 0), ("upper", 1)):
            limit = [self._coordinate(name, self.bounds[name][index]) for name in self.names]
            self.register_buffer(side, torch.tensor(limit, dtype=torch.float64), persistent=False)
        self.anchor = nn.Parameter(torch.zeros(()))

        # Columns of the leaf: what a gradient can move.
        self._moving = tuple(p for p, n in enumerate(self.names) if n in self.learned and n not in self.integers)
        self._leaves: list[Tensor] = []
        self._sampled: TableValues | None = None
        #: whether the M-step moves the rows; where not, `project` keeps their offsets as they are
        self.rows_learn = True
        self._start = TableValues(shared.clone(), self.offsets.clone())
        self._read_constants()

    # Reading -----------------------------------------------------------------------------------------------------

    def forward(self, responsibilities: Tensor) -> dict[str, Tensor | int]:
        """Parameters of each image, clamped into the bounds.

        Args:
            responsibilities: Responsibility of each row for each image; zeros use the global set.

        Shape:
            - responsibilities: `[B, K]`
            - output: by name `[B]`, in the precision of the module; an integer that nobody learns is a Python `int`
        """
        if responsibilities.ndim != 2 or responsibilities.shape[1] != len(self.row_names):
            raise ValueError(
                f"responsibilities must be [B, {len(self.row_names)}], one column for each row of the table, got "
                f"{list(responsibilities.shape)}"
            )
        return self._hand_out(responsibilities)

    @torch.compiler.disable  # the list of leaves is a side effect that a compiled region must not specialise on
    def _hand_out(self, responsibilities: Tensor) -> dict[str, Tensor | int]:
        learns = self.training and torch.is_grad_enabled()
        shared, offsets = self._sampled if learns and self._sampled is not None else self.state
        coordinates = (shared + responsibilities.double() @ offsets).clamp(self.lower, self.upper)
        columns = dict(zip(self.names, coordinates.unbind(1), strict=True))
        if learns:  # a forward in evaluation has no M-step that would collect it
            if any(leaf.grad is not None for leaf in self._leaves):
                self._leaves.clear()  # an earlier step's, which nobody has collected
            leaf = coordinates.detach()[:, _constant(self._moving, torch.long, coordinates.device)].requires_grad_()
            self._leaves.append(leaf)
            columns.update(zip([self.names[p] for p in self._moving], leaf.unbind(1), strict=True))
        theta: dict[str, Tensor | int] = {}
        for name, column in columns.items():
            if name in self._constants and name in self.integers:
                theta[name] = int(self._constants[name])
            elif name in self.integers:
                theta[name] = (column + 0.5).floor().long()
            else:
                theta[name] = Anchored.apply(column.exp().to(self.anchor.dtype), self.anchor)
        return theta

    def get_parameters(self, row: int | None = None) -> dict[str, float]:
        """Current values by name, of the global set or of a row.

        Args:
            row: Index of the row; None for the global set.

        Raises:
            ValueError: If there is no such row.
        """
        return self._named(TableValues(self.shared, self.offsets), row)

    def initial_parameters(self, row: int | None = None) -> dict[str, float]:
        """Values at construction by name, of the global set or of a row; see `get_parameters`."""
        return self._named(self._start, row)

    def describe(self, values: TableValues, row: int | None = None) -> dict[str, float]:
        """Any state of this table by name in natural units, such as one of the past; see `get_parameters`."""
        return self._named(values, row)

    def values(self) -> Tensor:
        """Current values in natural units, clamped, float64 `[K + 1, P]`; row 0 is the global set."""
        return self._natural(TableValues(self.shared, self.offsets))

    def upper_bound(self, name: str) -> float:
        """Largest value that a parameter can have in a run: its bound, or the value itself where nothing moves it."""
        return float(self._constants.get(name, self.bounds[name][1]))

    def lower_bound(self, name: str) -> float:
        """Smallest value that a parameter can have in a run; see `upper_bound`."""
        return float(self._constants.get(name, self.bounds[name][0]))

    # The M-step's side -------------------------------------------------------------------------------------------

    @property
    def state(self) -> TableValues:
        """Current coordinates (views, not copies)."""
        return TableValues(self.shared, self.offsets)

    def pop_gradient(self) -> Tensor | None:
        """Gradient of the loss with respect to the coordinates of each image, summed over this step's forwards.

        None if no backward pass has reached the table. The leaves are let go.

        Shape:
            - output: float64 `[B, P]`; zero for what is not learned by gradients
        """
        gradients = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
        self._leaves.clear()
        if not gradients:
            return None
        total = torch.stack(gradients).sum(0)
        gradient = total.new_zeros(len(total), len(self.names))
        gradient[:, _constant(self._moving, torch.long, total.device)] = total
        return gradient

    @property
    def learned_per_row(self) -> tuple[str, ...]:
        """Names whose rows the M-step moves: those of `per_row` that are learned; none where the rows rest."""
        return tuple(name for name in self.per_row if name in self.learned) if self.rows_learn else ()

    def project(self, proposed: TableValues) -> TableValues:
        """What of a proposed state this table accepts.

        Only learned parameters move, and of the rows only those that learn. The global set is clamped into its bounds.
        A row's own step may not carry it out of the bounds, but a row that a step of the global set has carried past
        them keeps its offset: clamping it would erase what the row has learned.
        """
        shared = torch.where(self._mask(self.learned), proposed.shared.clamp(self.lower, self.upper), self.shared)
        floor = torch.minimum(self.offsets, self.lower - shared)
        ceiling = torch.maximum(self.offsets, self.upper - shared)
        offsets = torch.where(self._mask(self.learned_per_row), proposed.offsets.clamp(floor, ceiling), self.offsets)
        return TableValues(shared, offsets)

    @torch.no_grad()
    def write(self, values: TableValues) -> None:
        """Store a state, in place."""
        self.shared.copy_(values.shared)
        self.offsets.copy_(values.offsets)

    def perturb(self, values: TableValues | None) -> None:
        """What training steps are handed out from here on; None for the table's own values, which stay as they are.

        Evaluation always uses the table's own.
        """
        self._sampled = values

    def attach(self, value: Tensor) -> Tensor:
        """The value as it is, with the table in its graph: a loss that may not depend on the parameters of the step.

        DDP waits for a gradient of every parameter, the anchor included.
        """
        return Anchored.apply(value, self.anchor)

    def vector(self, values: Mapping[str, float], default: float = 0.0) -> Tensor:
        """One number for each column, float64 `[P]` on the table's device, copied there once.

        Args:
            values: Numbers by name; other names than the table's are left out.
            default: Number of the columns that are not named.
        """
        numbers = tuple(float(values.get(name, default)) for name in self.names)
        return _constant(numbers, torch.float64, self.shared.device)

    def mask(self, names: Sequence[str]) -> Tensor:
        """Which columns the names stand for, boolean `[P]` on the table's device."""
        self._check_names("names", names)
        return self._mask(names)

    # Inside ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        stored, layout = state_dict.get(prefix + "offsets"), state_dict.get(prefix + "_extra_state")
        same_size = stored is not None and stored.shape == self.offsets.shape
        if same_size and layout is not None and layout != self.get_extra_state():
            raise ValueError(
                f"the checkpoint's parameter table has the parameters {layout['names']} and the rows {layout['rows']}, "
                f"this one {list(self.names)} and {list(self.row_names)}: values would land under other names. Load it "
                "with the data set and the table that it was trained with"
            )
        if stored is not None and stored.shape != self.offsets.shape:
            rows, parameters = stored.shape
            raise ValueError(
                f"the checkpoint's parameter table has {rows} rows and {parameters} parameters, this one has "
                f"{len(self.row_names)} rows ({', '.join(self.row_names) or 'none'}) and {len(self.names)} parameters "
                f"({', '.join(self.names)}): load it with the data set and the table that it was trained with, or "
                "start from its exported em_parameters.yaml"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_constants()

    def get_extra_state(self) -> dict[str, list[str]]:
        """Names of the columns and rows, which the checkpoint keeps beside the values."""
        return {"names": list(self.names), "rows": list(self.row_names)}

    def set_extra_state(self, state: dict[str, list[str]]) -> None:
        """Checked before anything is loaded; see `_load_from_state_dict`."""

    def _read_constants(self) -> None:
        # Read once on the host, so that a forward on an accelerator need not wait for them.
        current = self.get_parameters()
        self._constants = {n: current[n] for n in self.names if n not in self.learned and n not in self.per_row}

    def _mask(self, names: Sequence[str]) -> Tensor:
        return _constant(tuple(name in names for name in self.names), torch.bool, self.shared.device)

    def _coordinate(self, name: str, value: float) -> float:
        return float(value) if name in self.integers else math.log(value)

    def _natural(self, values: TableValues) -> Tensor:
        coordinates = torch.cat([values.shared[None], values.shared + values.offsets])
        coordinates = coordinates.clamp(self.lower.to(coordinates), self.upper.to(coordinates))
        whole = self._mask(self.integers).to(coordinates.device)
        return torch.where(whole, (coordinates + 0.5).floor(), coordinates.exp())

    def _named(self, values: TableValues, row: int | None) -> dict[str, float]:
        if row is not None and not 0 <= row < len(self.row_names):
            raise ValueError(
                f"row {row} is not in the table: it has {len(self.row_names)} rows, counted from 0 "
                f"({', '.join(self.row_names) or 'none'}); leave it out for the global set"
            )
        numbers = self._natural(values)[0 if row is None else row + 1].tolist()
        # Twelve digits: without what the way through the logarithm adds in the last ones.
        return {
            name: round(value) if name in self.integers else float(f"{value:.12g}")
            for name, value in zip(self.names, numbers, strict=True)
        }

    def _initial_offsets(self, shared: Tensor, initial_rows: dict[str, dict[str, float]]) -> Tensor:
        if len(set(self.row_names)) < len(self.row_names):
            raise ValueError(f"row_names must differ from each other, got {list(self.row_names)}")
        offsets = torch.zeros(len(self.row_names), len(self.names), dtype=torch.float64)
        for row, values in initial_rows.items():
            if row not in self.row_names:
                raise ValueError(f"initial_rows names {row!r}, which is no row of the table: {list(self.row_names)}")
            for name, value in values.items():
                self._check_names(f"initial_rows[{row!r}]", [name])
                if name not in self.per_row:
                    raise ValueError(f"initial_rows[{row!r}] sets {name!r}, which has no rows: add it to per_row")
                check_bounds(name, value, self.bounds[name], whole=name in self.integers)
                column = self.names.index(name)
                offsets[self.row_names.index(row), column] = self._coordinate(name, value) - shared[column]
        return offsets

    def _check_names(self, argument: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                raise ValueError(f"{argument} names {name!r}, but the table's parameters are {', '.join(self.names)}")

    def extra_repr(self) -> str:
        """Names, for `print(module)`."""
        return f"{len(self.row_names)} rows, learned={list(self.learned)}, per_row={list(self.per_row)}"


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # made in a validation and cached, it must still serve a training step
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor that is copied to its device once: each copy would make the host wait for an accelerator."""
    return torch.tensor(values, dtype=dtype, device=device)
