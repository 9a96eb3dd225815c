"""Bounded parameters with a global set and rows, which an M-step learns."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules._cached import cached_tensors
from lightning_modules.em._anchor import Anchored
from lightning_modules.em._float64 import Float64Buffers
from lightning_modules.imaging import seeded_uniform
from lightning_modules.operators.operator import ParameterSpec

# Forwards of one step whose gradients are waited for.
_MOST_LEAVES = 64
# Part of a coordinate that a checkpoint in half precision may be off by.
_ROUNDING = 0.01
# Sets the sides that a pair of parameters takes apart from whatever else is drawn from an image's key.
_PAIR_STREAM = 0x3C6E_F372
# The same for the parameter that an image moves, of as many as are few.
_PICK_STREAM = 0xA54F_F53A
_FEW = 8


class TableValues(NamedTuple):
    """State of a `ParameterTable` in its coordinates: logarithms; plain numbers for integers, and units of a `scale`.

    Attributes:
        shared: Coordinates g of the global set, float64 `[P]`.
        offsets: Offsets δ of the rows from it, float64 `[K, P]`.
    """

    shared: Tensor
    offsets: Tensor


class ParameterPair(NamedTuple):
    """Two sets of parameters for each image, on either side of the table's own.

    Attributes:
        plus: The one set, as `ParameterTable.forward` returns it.
        minus: The other.
        distance: How far the first is from the second in each coordinate, with its sign, over the number of those among
            which one was drawn, float64 `[B, P]`; 0 for what is not moved.
    """

    plus: dict[str, Tensor | int]
    minus: dict[str, Tensor | int]
    distance: Tensor

    def gradient(self, plus: Tensor, minus: Tensor) -> Tensor:
        r"""Estimate of each image's gradient, :math:`(\ell^+ - \ell^-) / d_j` for each j that was moved.

        Where several were, the other coordinates' part has expectation 0, for their sides are drawn independently
        (simultaneous perturbation; Spall, IEEE TAC 37, 1992, equation 2.2).

        Args:
            plus: Value of each image under the one set.
            minus: Value under the other, with all else equal.

        Shape:
            - plus, minus: `[B]`
            - output: float64 `[B, P]`
        """
        apart = self.distance != 0
        difference = (plus.double() - minus.double())[:, None]
        return torch.where(apart, difference / torch.where(apart, self.distance, 1.0), 0.0)


class ParameterTable(Float64Buffers):
    r"""Bounded parameters, one global set and one offset for each row, outside any optimizer's reach.

    An image with responsibilities r over the rows uses :math:`\log\theta = g + \sum_k r_k \delta_k`, clamped into the
    bounds where it is read. Values are float64 buffers, so they reach the device, every process, the checkpoint and
    whoever loads it. `forward` hands out a fresh leaf for each image, whose gradient arrives with the backward pass
    that the network needs anyway; `pop_gradient` collects it. One scalar parameter of weight 0, `anchor`, lets DDP
    wrap, automatic mixed precision scale and an optimizer exist where nothing else is trainable.

    Under a rule that needs no gradient, `pair_distance` is set, and a training step evaluates a `pair` instead.

    Which parameters there are is declared by an operator (`declare`, which `Reconstruction` calls); start values and
    bounds given here then override the declared ones by name. A table for a module of your own gives both for each of
    its parameters.

    Args:
        initial: Start values by name; a list for a bank.
        bounds: Lower and upper bound by name.
        learned: Names that the M-step moves; all of them by default.
        per_row: Names that have a value for each row.
        row_names: Names of the rows, such as the classes.
        initial_rows: Start values of rows that differ from the global set: row name, then parameter name.
        integers: Names of a table of your own whose values are whole numbers; these stay out of log space.

    Raises:
        ValueError: If bounds are reversed or not positive, a start value is outside them, or a name is unknown.

    Example:
        >>> table = ParameterTable({"gain": 0.5}, {"gain": (0.1, 1.0)}, per_row=["gain"], row_names=["cat", "dog"])
        >>> table(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))["gain"].tolist()
        [0.5, 0.5]
        >>> table.get_parameters()
        {'gain': 0.5}
    """

    # Coordinates g of the global set and offsets δ of the rows, float64 [P] and [K, P].
    shared: Tensor
    offsets: Tensor
    # Bounds in the same coordinates, float64 [P].
    lower: Tensor
    upper: Tensor
    # Names of columns and rows, as character codes: tools that average or store a state take tensors only, and an
    # average of equal floating-point numbers rounds back to them.
    layout: Tensor

    def __init__(
        self,
        initial: Mapping[str, float | list[float]] | None = None,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        learned: list[str] | None = None,
        per_row: list[str] | None = None,
        row_names: list[str] | None = None,
        initial_rows: Mapping[str, Mapping[str, float | list[float]]] | None = None,
        integers: list[str] | None = None,
    ) -> None:
        super().__init__()
        self._initial, self._bounds = dict(initial or {}), dict(bounds or {})
        self._learned, self._integers = learned, tuple(integers or ())
        self._initial_rows = dict(initial_rows or {})
        self.per_row = tuple(per_row or ())
        self.row_names = tuple(row_names or ())
        if len(set(self.row_names)) < len(self.row_names):
            raise ValueError(f"row_names must differ from each other, got {list(self.row_names)}")
        self.anchor = nn.Parameter(torch.zeros(()))
        self._leaves: list[Tensor] = []
        self._sampled: TableValues | None = None
        #: whether the M-step moves the rows; where not, `project` keeps their offsets as they are
        self.rows_learn = True
        #: half the distance, in each coordinate, of the pairs that a training step evaluates; None for gradients
        self.pair_distance: Tensor | None = None
        for name in ("shared", "offsets", "lower", "upper", "layout"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64), persistent=name not in ("lower", "upper"))
        self._specs: dict[str, ParameterSpec] = {}
        self._declared: tuple[tuple[Any, ...], ...] | None = None
        others = {*(learned or ()), *self.per_row, *self._integers}
        if self._initial and self._initial.keys() == self._bounds.keys() >= others:
            self._build([self._own_spec(name) for name in self._initial])

    def declare(self, specs: Sequence[ParameterSpec]) -> "ParameterTable":
        """Take the parameters that an operator declares; what was given at construction overrides them by name.

        A table that has taken the same parameters before keeps its values and bounds.

        Args:
            specs: The operator's parameters.

        Returns:
            The table itself.

        Raises:
            ValueError: If a parameter is declared twice, a name given at construction is not declared, or a start value
                is outside its bounds.
        """
        layout = tuple((spec.name, spec.shape, spec.unit == "noise", spec.integer, spec.scale) for spec in specs)
        if self._declared == layout:
            return self
        if self._declared is not None:
            raise ValueError(
                f"the table has values for {', '.join(self.names)} of another operator: make a table for each operator"
            )
        declared = {spec.name: spec for spec in specs}
        if len(declared) < len(specs):
            names = [spec.name for spec in specs]
            raise ValueError(f"the operator declares {max(names, key=names.count)!r} twice: give each name once")
        for argument in ("initial", "bounds"):
            for name in getattr(self, f"_{argument}"):
                if name not in declared:
                    raise ValueError(
                        f"{argument} names {name!r}, but the operator's parameters are {', '.join(declared)}: correct "
                        "the name or leave it out"
                    )
        self._build(
            [
                replace(
                    spec,
                    start=self._initial.get(spec.name, spec.start),
                    bounds=_pair(self._bounds.get(spec.name, spec.bounds)),
                    integer=spec.integer or spec.name in self._integers,
                )
                for spec in specs
            ]
        )
        self._declared = layout
        return self

    def _own_spec(self, name: str) -> ParameterSpec:
        start = self._initial[name]
        shape = () if isinstance(start, float | int) else (len(start),)
        return ParameterSpec(name, start, _pair(self._bounds[name]), shape, integer=name in self._integers)

    def _build(self, specs: Sequence[ParameterSpec]) -> None:
        former, self._specs = self._specs, {spec.name: spec for spec in specs}
        try:
            learned = tuple(self._specs if self._learned is None else self._learned)
            for argument, names in (("integers", self._integers), ("learned", learned), ("per_row", self.per_row)):
                self._check_names(argument, names)
            shared = self._coordinates(spec.starts for spec in specs)
            offsets = self._initial_offsets(shared)
        except ValueError:
            self._specs = former
            raise
        device = self.shared.device
        self.learned = learned
        self.shared, self.offsets = shared.to(device), offsets.to(device)
        self.lower, self.upper = (
            self._coordinates((spec.bounds[side],) * spec.size for spec in specs).to(device) for side in (0, 1)
        )
        text = json.dumps({"columns": self.column_labels, "rows": self.row_names})
        self.layout = torch.tensor([float(ord(letter)) for letter in text], dtype=torch.float64, device=device)
        # Columns of the leaf: what a gradient can move.
        moving = (name for name in self.names if name in learned and not self._specs[name].integer)
        self._moving = tuple(column for name in moving for column in range(*self.columns(name).indices(len(shared))))
        self._start = TableValues(self.shared.clone(), self.offsets.clone())
        self._read_constants()

    def _coordinates(self, values: Iterable[Sequence[float]]) -> Tensor:
        """Numbers of all parameters in order, as coordinates, float64 `[P]`."""
        pairs = zip(self._specs.values(), values, strict=True)
        numbers = [_coordinate(spec, number) for spec, own in pairs for number in own]
        return torch.tensor(numbers, dtype=torch.float64)

    # What there is ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        if not self._specs:
            unpaired = ", ".join(sorted(self._initial.keys() ^ self._bounds.keys()))
            for argument, names in (("learned", self._learned or ()), ("per_row", self.per_row)):
                for name in names if self._initial and not unpaired else ():
                    if name not in self._initial:
                        raise ValueError(
                            f"{argument} names {name!r}, but the table's parameters are {', '.join(self._initial)}"
                        )
            raise ValueError(
                "the table has no parameters yet: pass it to Reconstruction, whose operator declares them, or give "
                "initial and bounds for each parameter of your own"
                + (f" ({unpaired} has only one)" if unpaired else "")
            )
        return tuple(self._specs)

    @property
    def column_names(self) -> tuple[str, ...]:
        """A label for each of the P columns: the parameter's name, with its index in a bank."""
        return tuple(
            f"{name}[{index}]" if spec.shape else name
            for name, spec in self._specs.items()
            for index in range(spec.size)
        )

    @property
    def column_labels(self) -> list[str]:
        """The columns' names in checkpoints, where a number in units of the noise is not taken for an absolute one,
        nor one in units of a scale for a logarithm.
        """
        specs = (spec for spec in self._specs.values() for _ in range(spec.size))
        return [
            name + (" × noise" if spec.unit == "noise" else "") + (f" / {spec.scale:g}" if spec.scale else "")
            for name, spec in zip(self.column_names, specs, strict=True)
        ]

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Lower and upper bound by name."""
        return {name: self._specs[name].bounds for name in self.names}

    @property
    def integers(self) -> tuple[str, ...]:
        """Names of the parameters that take whole numbers."""
        return tuple(name for name in self.names if self._specs[name].integer)

    @property
    def units(self) -> dict[str, str]:
        """What the numbers count, by name; see `ParameterSpec`."""
        return {name: self._specs[name].unit for name in self.names}

    @property
    def scales(self) -> dict[str, float]:
        """Scale of the parameters that may be negative, by name; see `ParameterSpec`."""
        return {name: spec.scale for name, spec in self._specs.items() if spec.scale is not None}

    @property
    def pictures(self) -> dict[str, tuple[int, int]]:
        """Height and width of the pictures that a bank holds, by name; see `ParameterSpec`."""
        return {name: spec.picture for name, spec in self._specs.items() if spec.picture is not None}

    @property
    def relative_steps(self) -> Tensor:
        """Relative step of `SignRule` for each column, float64 `[P]`."""
        return self.vector({name: self._specs[name].relative_step for name in self.names})

    def columns(self, name: str) -> slice:
        """Which columns of the table a parameter has."""
        first = 0
        for other, spec in self._specs.items():
            if other == name:
                break
            first += spec.size
        return slice(first, first + self._specs[name].size)

    # Reading -----------------------------------------------------------------------------------------------------

    def forward(self, responsibilities: Tensor) -> dict[str, Tensor | int]:
        """Parameters of each image, clamped into the bounds.

        Args:
            responsibilities: Responsibility of each row for each image; zeros use the global set.

        Shape:
            - responsibilities: `[B, K]`
            - output: by name `[B]`, a bank of N values `[B, N]`, in the precision of the module; an integer that nobody
              learns is a Python `int`
        """
        _ = self.names  # there must be some
        if responsibilities.ndim != 2 or responsibilities.shape[1] != len(self.row_names):
            raise ValueError(
                f"responsibilities must be [B, {len(self.row_names)}], one column for each row of the table, got "
                f"{list(responsibilities.shape)}"
            )
        if self.training and torch.is_grad_enabled():  # a forward in evaluation has no M-step that would collect it
            return self._hand_out_leaves(responsibilities)
        return self._by_name(self._coordinates_of(self.state, responsibilities))

    def pair(self, responsibilities: Tensor, key: Tensor) -> ParameterPair:
        """Two sets of parameters of each image, for a training step under a rule that needs no gradient.

        Of few parameters each image moves one, drawn from its key, which then counts for all: what the others do is no
        noise to it. Many differ at once, each to a side that is drawn: they cost no more evaluations than one. Whole
        numbers are those next to the table's own, which may be in between.

        Args:
            responsibilities: As in `forward`.
            key: Keys of the images; see `lightning_modules.imaging.ImageBatch`.

        Shape:
            - responsibilities: `[B, K]`
            - key: `[B]`, int64
        """
        assert self.pair_distance is not None
        here = self._coordinates_of(self._sampled or self.state, responsibilities).detach()
        side = torch.where(seeded_uniform(key ^ _PAIR_STREAM, here.shape[1]) < 0.5, -1.0, 1.0)
        apart = torch.where(self._mask(self.learned), side * self.pair_distance, 0.0)
        ends = [(here + apart).clamp(self.lower, self.upper), (here - apart).clamp(self.lower, self.upper)]
        whole = self._mask(self.integers) & self._mask(self.learned)
        # Between n and n + 1 the function is taken to be linear. At a whole number the side is drawn.
        floor = torch.where(here == here.round(), here + side.clamp_max(0), here.floor())
        floor = torch.maximum(torch.minimum(floor, self.upper - 1), self.lower)
        next_up = torch.minimum(floor + 1, self.upper)
        neighbors = torch.where(side > 0, next_up, floor), torch.where(side > 0, floor, next_up)
        plus, minus = (torch.where(whole, n, end) for n, end in zip(neighbors, ends, strict=True))
        learned = self._mask(self.learned).nonzero()[:, 0]
        distance = plus - minus
        if len(learned) <= _FEW:
            pick = learned[(seeded_uniform(key ^ _PICK_STREAM, 1)[:, 0] * len(learned)).long()]
            picked = torch.nn.functional.one_hot(pick, here.shape[1]).bool()
            plus, minus = (torch.where(picked, end, here) for end in (plus, minus))
            distance = torch.where(picked, distance / len(learned), 0.0)
        return ParameterPair(self._by_name(plus), self._by_name(minus), distance)

    @torch.compiler.disable  # the list of leaves is a side effect that a compiled region must not specialise on
    def _hand_out_leaves(self, responsibilities: Tensor) -> dict[str, Tensor | int]:
        if torch.compiler.is_compiling():  # an export
            return self._by_name(self._coordinates_of(self.state, responsibilities))
        coordinates = self._coordinates_of(self._sampled or self.state, responsibilities)
        if any(leaf.grad is not None for leaf in self._leaves):
            self._leaves.clear()  # an earlier step's, which nobody has collected
        del self._leaves[:-_MOST_LEAVES]  # nor used: a backbone need not call the operator
        coordinates = coordinates.detach()
        moving = _constant(self._moving, torch.long, coordinates.device)
        leaf = coordinates[:, moving].requires_grad_()
        self._leaves.append(leaf)
        return self._by_name(coordinates.index_copy(1, moving, leaf))

    def _coordinates_of(self, values: TableValues, responsibilities: Tensor) -> Tensor:
        """Coordinates of each image, `[B, P]`."""
        return (values.shared + responsibilities.double() @ values.offsets).clamp(self.lower, self.upper)

    def _by_name(self, coordinates: Tensor) -> dict[str, Tensor | int]:
        theta: dict[str, Tensor | int] = {}
        for name in self.names:
            spec, column = self._specs[name], coordinates[:, self.columns(name)]
            column = column if spec.shape else column[:, 0]
            if not spec.integer:
                column = column.exp() if spec.scale is None else column * spec.scale
                theta[name] = Anchored.apply(column.to(self.anchor.dtype), self.anchor)
            elif name in self._constants and not spec.shape:
                theta[name] = int(self._constants[name])
            else:
                theta[name] = (column.detach() + 0.5).floor().long()
        return theta

    def get_parameters(self, row: int | None = None) -> dict[str, Any]:
        """Current values by name, a list for a bank, of the global set or of a row.

        Args:
            row: Index of the row; None for the global set.

        Raises:
            ValueError: If there is no such row.
        """
        return self._named(TableValues(self.shared, self.offsets), row)

    def initial_parameters(self, row: int | None = None) -> dict[str, Any]:
        """Values at construction by name, of the global set or of a row; see `get_parameters`."""
        return self._named(self._start, row)

    def describe(self, values: TableValues, row: int | None = None) -> dict[str, Any]:
        """Any state of this table by name in natural units, such as one of the past; see `get_parameters`."""
        return self._named(values, row)

    def values(self) -> Tensor:
        """Current values in natural units, clamped.

        Shape:
            - output: float64 `[K + 1, P]`; row 0 is the global set
        """
        return self._natural(TableValues(self.shared, self.offsets))

    def upper_bound(self, name: str) -> float:
        """Largest value that a parameter can have in a run: its bound, or the value itself where nothing moves it."""
        value = self._constants.get(name, self.bounds[name][1])
        return float(max(value) if isinstance(value, list) else value)

    def lower_bound(self, name: str) -> float:
        """Smallest value that a parameter can have in a run; see `upper_bound`."""
        value = self._constants.get(name, self.bounds[name][0])
        return float(min(value) if isinstance(value, list) else value)

    def natural(self, coordinates: Tensor) -> Tensor:
        """What coordinates are in natural units, clamped.

        Shape:
            - coordinates: float64 `[..., P]`
            - output: float64 `[..., P]`
        """
        coordinates = coordinates.clamp(self.lower.to(coordinates), self.upper.to(coordinates))
        whole = self._mask(self.integers).to(coordinates.device)
        scale = self.vector(self.scales).to(coordinates.device)
        real = torch.where(scale > 0, coordinates * scale, coordinates.exp())
        return torch.where(whole, (coordinates + 0.5).floor(), real)

    def slope(self, values: Tensor) -> Tensor:
        """How much natural values change by a unit of their coordinates, to first order.

        Shape:
            - values: float64 `[..., P]`
            - output: float64 `[..., P]`
        """
        scale = self.vector(self.scales).to(values.device)
        slope = torch.where(scale > 0, scale, values)
        return torch.where(self._mask(self.integers).to(values.device), 1.0, slope)

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
        gradient = total.new_zeros(len(total), len(self.shared))
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

        Shape:
            - value: `[...]`
            - output: `[...]`
        """
        return Anchored.apply(value, self.anchor)

    def vector(self, values: Mapping[str, float], default: float = 0.0) -> Tensor:
        """One number for each column, on the table's device, copied there once.

        Args:
            values: Numbers by name; other names than the table's are left out.
            default: Number of the columns that are not named.

        Shape:
            - output: float64 `[P]`
        """
        numbers = (float(values.get(name, default)) for name, spec in self._specs.items() for _ in range(spec.size))
        return _constant(tuple(numbers), torch.float64, self.shared.device)

    def mask(self, names: Sequence[str]) -> Tensor:
        """Which columns the names have, on the table's device.

        Shape:
            - output: boolean `[P]`
        """
        self._check_names("names", names)
        return self._mask(names)

    # Inside ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "offsets" in state_dict:
            if not {prefix + "layout", prefix + "_extra_state"} & state_dict.keys():
                raise ValueError(f"it lacks {prefix}layout, the names of its values")
            self._check_layout(*_stored_layout(state_dict, prefix))
            self._check_values(state_dict, prefix)
            state_dict[prefix + "layout"] = self.layout.clone()
            state_dict.pop(prefix + "_extra_state", None)  # of version 0.1
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_constants()

    def _check_layout(self, columns: Sequence[str], rows: Sequence[str]) -> None:
        same_size = (len(columns), len(rows)) == (len(self.column_names), len(self.row_names))
        if same_size and (list(columns), list(rows)) != (self.column_labels, list(self.row_names)):
            raise ValueError(
                f"the checkpoint's parameter table has the parameters {list(columns)} and the rows {list(rows)}, "
                f"this one {self.column_labels} and {list(self.row_names)}: values would land under other names. "
                "Load it with the data set and the table that it was trained with"
            )
        if not same_size:
            raise ValueError(
                f"the checkpoint's parameter table has {len(rows)} rows and {len(columns)} parameters, this one has "
                f"{len(self.row_names)} rows ({', '.join(self.row_names) or 'none'}) and {len(self.column_names)} "
                f"parameters ({', '.join(self.column_names)}): load it with the data set and the table that it was "
                "trained with, or start from its exported em_parameters.yaml"
            )

    def _check_values(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Refuses stored numbers that are none, and warns of those that no run within these bounds has learned."""
        own = {"shared": self.shared, "offsets": self.offsets}
        stored: dict[str, Tensor] = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        if any(value.is_meta or value.shape != own[name].shape for name, value in stored.items()) or len(stored) < 2:
            return  # torch itself has what to say
        for name, value in stored.items():
            if not value.isfinite().all():
                raise ValueError(f"{prefix}{name} is not finite")
        lower, upper = self.lower.cpu(), self.upper.cpu()
        slack = _ROUNDING * (1 + torch.maximum(lower.abs(), upper.abs()))
        shared, offsets = (value.detach().to("cpu", torch.float64) for value in stored.values())
        outside = (shared < lower - slack) | (shared > upper + slack)
        # a row may have been carried past the bounds by the global set, but never further than they are apart
        outside = outside | (offsets.abs() > upper - lower + slack).any(0)
        if outside.any():
            columns = [n for n, is_outside in zip(self.column_names, outside.tolist(), strict=True) if is_outside]
            warnings.warn(
                f"{prefix.rstrip('.') or 'the table'} has values outside its bounds in the checkpoint, of "
                f"{', '.join(columns)}: they are clamped where they are read; give the bounds of the run that wrote it",
                stacklevel=2,
            )

    def _read_constants(self) -> None:
        # Read once on the host, so that a forward on an accelerator need not wait for them.
        current = self.get_parameters()
        self._constants = {n: current[n] for n in self.names if n not in self.learned and n not in self.per_row}

    def _mask(self, names: Sequence[str]) -> Tensor:
        chosen = (name in names for name, spec in self._specs.items() for _ in range(spec.size))
        return _constant(tuple(chosen), torch.bool, self.shared.device)

    def _natural(self, values: TableValues) -> Tensor:
        return self.natural(torch.cat([values.shared[None], values.shared + values.offsets]))

    def _named(self, values: TableValues, row: int | None) -> dict[str, Any]:
        if row is not None and not 0 <= row < len(self.row_names):
            raise ValueError(
                f"row {row} is not in the table: it has {len(self.row_names)} rows, counted from 0 "
                f"({', '.join(self.row_names) or 'none'}); leave it out for the global set"
            )
        numbers = self._natural(values)[0 if row is None else row + 1].tolist()
        named: dict[str, Any] = {}
        for name, spec in self._specs.items():
            # Twelve digits: without what the way through the logarithm adds in the last ones.
            own = [round(v) if spec.integer else float(f"{v:.12g}") for v in numbers[self.columns(name)]]
            named[name] = own if spec.shape else own[0]
        return named

    def _initial_offsets(self, shared: Tensor) -> Tensor:
        offsets = torch.zeros(len(self.row_names), len(shared), dtype=torch.float64)
        for row, values in self._initial_rows.items():
            if row not in self.row_names:
                raise ValueError(f"initial_rows names {row!r}, which is no row of the table: {list(self.row_names)}")
            for name, value in values.items():
                self._check_names(f"initial_rows[{row!r}]", [name])
                if name not in self.per_row:
                    raise ValueError(f"initial_rows[{row!r}] sets {name!r}, which has no rows: add it to per_row")
                spec = replace(self._specs[name], start=value)
                own = torch.tensor([_coordinate(spec, number) for number in spec.starts], dtype=torch.float64)
                columns = self.columns(name)
                offsets[self.row_names.index(row), columns] = own - shared[columns]
        return offsets

    def _check_names(self, argument: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                raise ValueError(f"{argument} names {name!r}, but the table's parameters are {', '.join(self.names)}")

    def extra_repr(self) -> str:
        """Names, for `print(module)`."""
        learned = list(self.learned) if self._specs else self._learned
        return f"{len(self.row_names)} rows, learned={learned}, per_row={list(self.per_row)}"


def _pair(bounds: Sequence[float]) -> tuple[float, float]:
    lower, upper = bounds
    return float(lower), float(upper)


def _coordinate(spec: ParameterSpec, value: float) -> float:
    if spec.integer:
        return float(value)
    return math.log(value) if spec.scale is None else value / spec.scale


def stored_columns(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """Names of the columns of a table in a state dict, whose keys begin with `prefix`; empty where there is none."""
    return _stored_layout(state_dict, prefix)[0] if prefix + "offsets" in state_dict else []


def _stored_layout(state_dict: Mapping[str, Any], prefix: str) -> tuple[list[str], list[str]]:
    """Names of the columns and rows of a stored table; numbers where it holds no names that can be read."""
    if (old := state_dict.get(prefix + "_extra_state")) is not None:  # of version 0.1
        return list(old["names"]), list(old["rows"])
    try:
        text = "".join(chr(round(code)) for code in state_dict[prefix + "layout"].double().tolist())
        names = json.loads(text)
        return names["columns"], names["rows"]
    except (ValueError, KeyError, TypeError, OverflowError):
        rows, columns = state_dict[prefix + "offsets"].shape
        return [f"column {index}" for index in range(columns)], [f"row {index}" for index in range(rows)]


@cached_tensors(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor that is copied to its device once: each copy would make the host wait for an accelerator."""
    return torch.tensor(values, dtype=dtype, device=device)
