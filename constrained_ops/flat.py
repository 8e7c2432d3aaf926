"""All parameters of a model as one unconstrained vector: for L-BFGS, HMC, Laplace's approximation, SciPy.

Parameters of one family lie next to each other in the vector, so that each family is one kernel forward and one
backward, however many parameters it has; what the model gets are views of the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import _checks
from ._constraints import Box, Record, SimplexOf, interpret
from ._library import compute_dtype
from .bounded import bounded
from .positive import positive
from .simplex import simplex, simplex_inverse


@dataclass(frozen=True, eq=False)
class _Entry:
    """One parameter, and where its raw lies in the vector."""

    name: str
    param: nn.Parameter
    record: Record | None
    place: slice


class FlatParameters:
    """A module's trainable parameters as one 1-D vector ``theta`` without constraints.

    ``torch.nn.utils.vector_to_parameters`` copies into the parameters, which cuts the graph: no gradient reaches the
    vector. :meth:`constrain` gives tensors that are functions of ``theta``, for ``torch.func.functional_call``.

    Frozen parameters have no part in it. A tied parameter has one, under the first of its names. The order within
    ``theta`` depends on the names, shapes and constraints alone: a saved one serves a module made in the same way.

    Args:
        module: its parameters are float16, bfloat16, float32 or float64, on one device. They are read by
            :meth:`initial` and written by :meth:`load_` only.
        constraints: for some of the parameter names, objects of ``torch.distributions.constraints`` or
            :class:`Bounded`, :class:`Positive`, :class:`Simplex`. Without one a parameter is itself. The simplex is
            the image of "ilr" (one number less than elements along its dimension) unless ``Simplex`` names a kind.
        dtype: of ``theta``; by default the widest of the parameters', and at least float32.

    Attributes:
        slices: for each name its part of ``theta``.
        dtype, device, numel: of ``theta``.

    Raises:
        KeyError: a name in ``constraints`` is no parameter.
        TypeError, ValueError, NotImplementedError: a parameter or a constraint that cannot be.
    """

    def __init__(
        self, module: nn.Module, constraints: Mapping[str, Any] | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        records = _records(module, constraints or {})
        params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        devices = {p.device: name for name, p in params.items()}
        if len(devices) > 1:
            where = " and ".join(f"{name} on {device}" for device, name in devices.items())
            raise ValueError(f"FlatParameters: parameters must be on one device, got {where}")
        self.device = next(iter(devices), torch.device("cpu"))
        widest = _widest(params.values())
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"FlatParameters: dtype must be a torch.dtype, got {dtype!r}")
        self.dtype = dtype or widest
        if not self.dtype.is_floating_point or torch.promote_types(self.dtype, widest) != self.dtype:
            raise ValueError(f"FlatParameters: dtype must hold the parameters' {widest}, got {self.dtype}")

        families: dict[tuple[Any, ...], list[tuple[str, nn.Parameter, Record | None]]] = {}
        for name, param in params.items():
            record = records[name]
            families.setdefault(_family(param, record), []).append((name, param, record))
        self._families: list[_Family] = []
        begin = 0
        for (kind, *_), members in families.items():
            family = _FAMILIES[kind](members, begin, self.dtype)
            self._families.append(family)
            begin = family.end
        self.numel = begin
        places = {e.name: e.place for family in self._families for e in family.entries}
        self.slices = {name: places[name] for name in params}

    def initial(self) -> Tensor:
        """The ``theta`` of the module's present values: 1-D leaf that requires a gradient.

        A value on a bound becomes the largest finite raw on that side.

        Raises:
            ValueError: a value outside its constraint, with the parameter's name and the worst value.
        """
        entries = [(family, entry) for family in self._families for entry in family.entries]
        for _, e in entries:
            if e.record is not None:
                e.record.check(f"FlatParameters: {e.name}", e.param.detach())
        with torch.no_grad():
            parts = [family.raw(e).reshape(-1) for family, e in entries]
            theta = torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype, device=self.device)
        return theta.detach().requires_grad_()

    @overload
    def constrain(self, theta: Tensor, *, return_log_det: Literal[False] = False) -> dict[str, Tensor]: ...
    @overload
    def constrain(self, theta: Tensor, *, return_log_det: Literal[True]) -> tuple[dict[str, Tensor], Tensor]: ...
    def constrain(self, theta: Tensor, *, return_log_det: bool = False) -> Any:
        """The parameters that ``theta`` stands for, strictly inside their constraints, differentiable in ``theta``.

        Args:
            theta: shape (numel,), of ``dtype`` and on ``device``; ``torch.vmap`` maps over more of them.
            return_log_det: also return the logarithm of the determinant of the whole map, for densities.

        Returns:
            {name: Tensor} with shapes and dtypes of the parameters, views of few tensors: for
            ``torch.func.functional_call(module, x, args)``, not to be changed in place. With ``return_log_det``
            also a tensor of shape () and of theta's dtype.

        Raises:
            TypeError, ValueError: theta is not such a vector; or a log-det is asked for that does not exist.
        """
        _checks.floating("FlatParameters.constrain", theta, "theta")
        if theta.shape != (self.numel,) or theta.dtype != self.dtype or theta.device != self.device:
            raise ValueError(
                f"FlatParameters.constrain: theta must have shape ({self.numel},), {self.dtype} and {self.device}, "
                f"got {tuple(theta.shape)}, {theta.dtype} and {theta.device}"
            )
        x: dict[str, Tensor] = {}
        log_det: Any = theta.new_zeros(()) if return_log_det else None
        # One family has all of theta: no node of the graph for a part of it, and names in order.
        several = len(self._families) > 1
        parts = theta.split([family.end - family.begin for family in self._families]) if several else (theta,)
        for family, part in zip(self._families, parts, strict=False):
            values, part_log_det = family.transform(part, return_log_det)
            x.update(zip(family.names, family.views(values), strict=True))
            if part_log_det is not None:
                log_det = log_det + part_log_det.sum()
        if several:
            x = {name: x[name] for name in self.slices}
        return (x, log_det) if return_log_det else x

    @torch.no_grad()
    def load_(self, theta: Tensor) -> None:
        """Write the parameters that ``theta`` stands for into the module. Raises as :meth:`constrain`."""
        x = self.constrain(theta.detach())
        for family in self._families:
            for e in family.entries:
                e.param.copy_(x[e.name])

    def __repr__(self) -> str:
        return f"FlatParameters({len(self.slices)} parameters, numel={self.numel}, dtype={self.dtype})"


def _records(module: nn.Module, constraints: Mapping[str, Any]) -> dict[str, Record | None]:
    """For the first name of each parameter, trainable or not, its constraint fitted to it."""
    first = {id(p): name for name, p in module.named_parameters()}
    names = {name: (first[id(p)], p) for name, p in module.named_parameters(remove_duplicate=False)}
    records: dict[str, Record | None] = dict.fromkeys(first.values())
    for name, (_, param) in names.items():
        _checks.floating("FlatParameters", param, name)
    for name, given in constraints.items():
        if name not in names:
            raise KeyError(f"FlatParameters: {name!r} is no parameter of the module, which has {sorted(names)}")
        canonical, param = names[name]
        if records[canonical] is not None:
            raise ValueError(f"FlatParameters: {name} and {canonical} are one parameter, and both have a constraint")
        record = interpret("FlatParameters", given)
        if isinstance(record, SimplexOf) and not hasattr(given, "kind"):  # one of torch's
            record = SimplexOf(record.dim, record.total, "ilr")
        records[canonical] = None if record is None else record.on("FlatParameters", param, name)
    return records


def _widest(params: Any) -> torch.dtype:
    widest = torch.float32
    for p in params:
        widest = torch.promote_types(widest, compute_dtype(p.dtype))
    return widest


# --- Families --------------------------------------------------------------------------------------------------------


def _family(param: Tensor, record: Record | None) -> tuple[Any, ...]:
    if record is None:
        return "plain", param.dtype
    if isinstance(record, Box):
        return record.transform, param.dtype
    return "simplex", param.dtype, record.kind, param.shape[record.dim] if param.dim() else 1


class _Family:
    """Parameters that one kernel maps from their part of theta, where they lie next to each other."""

    def __init__(
        self, members: Sequence[tuple[str, nn.Parameter, Record | None]], begin: int, dtype: torch.dtype
    ) -> None:
        self.begin = self.end = begin
        self.dtype, self.param_dtype = dtype, members[0][1].dtype
        self.entries: list[_Entry] = []
        for name, param, record in members:
            n = self.raw_numel(param, record)
            self.entries.append(_Entry(name, param, record, slice(self.end, self.end + n)))
            self.end += n
        self.names = [e.name for e in self.entries]
        self.shapes = [self.value_shape(e) for e in self.entries]
        self.vectors = all(len(shape) == 1 for shape in self.shapes)
        self.sizes = [shape.numel() for shape in self.shapes]

    def raw_numel(self, param: Tensor, record: Any) -> int:
        return param.numel()

    def value_shape(self, entry: _Entry) -> torch.Size:
        """As the parameter lies in the result of ``transform``."""
        return entry.param.shape

    def raw(self, entry: _Entry) -> Tensor:
        """Of the parameter's present value, as it lies in theta."""
        return entry.param.to(self.dtype)

    def transform(self, raw: Tensor, return_log_det: bool) -> tuple[Tensor, Tensor | None]:
        return raw.to(self.param_dtype), None

    def views(self, values: Tensor) -> Sequence[Tensor]:
        parts = values.split(self.sizes)
        if self.vectors:
            return parts
        # One node of the graph for all, and none for a view that changes nothing.
        return [part if len(shape) == 1 else part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def rounded(self, x: Tensor, lower: Any, upper: Any) -> Tensor:
        """In the parameters' dtype, strictly inside there too, with the gradient of what was not rounded."""
        if x.dtype == self.param_dtype:
            return x
        y = x.to(self.param_dtype)
        lower, upper = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (lower, upper))
        smallest, largest = _checks.inside(lower, upper, self.param_dtype)
        return y + (y.clamp(smallest.to(y.dtype), largest.to(y.dtype)) - y).detach()


class _Boxes(_Family):
    """Intervals and half-lines: floats if all have the same, otherwise a bound for each element."""

    def __init__(self, members: Any, begin: int, dtype: torch.dtype) -> None:
        super().__init__(members, begin, dtype)
        self.lower, self.upper = (self._bounds(name) for name in ("lower", "upper"))

    def _bounds(self, name: str) -> Any:
        bounds = [getattr(e.record, name) for e in self.entries]
        if not any(isinstance(bound, Tensor) for bound in bounds) and len(set(bounds)) == 1:
            return bounds[0]
        each = zip(bounds, self.entries, strict=True)
        device = self.entries[0].param.device
        return torch.cat(
            [torch.as_tensor(b, dtype=self.dtype, device=device).expand(e.param.shape).reshape(-1) for b, e in each]
        )

    def raw(self, entry: _Entry) -> Tensor:
        assert isinstance(entry.record, Box)
        return entry.record.inverse(entry.param).to(self.dtype)

    def transform(self, raw: Tensor, return_log_det: bool) -> tuple[Tensor, Tensor | None]:
        x, log_det = self._apply(raw) if return_log_det else (self._apply(raw, return_log_det=False), None)
        return self.rounded(x, self.lower, self.upper), log_det

    def _apply(self, raw: Tensor, return_log_det: bool = True) -> Any:
        log_det: Any = return_log_det
        return bounded(raw, self.lower, self.upper, return_log_det=log_det)


class _Exponentials(_Boxes):
    def _apply(self, raw: Tensor, return_log_det: bool = True) -> Any:
        log_det: Any = return_log_det
        return positive(raw, self.lower, kind="exp", return_log_det=log_det)


class _Simplices(_Family):
    """Of one kind and length; their dimension is the last one in theta."""

    def __init__(self, members: Any, begin: int, dtype: torch.dtype) -> None:
        record = members[0][2]
        self.kind = record.kind
        self.length = members[0][1].shape[record.dim] if members[0][1].dim() else 1
        self.raw_length = self.length - (self.kind != "softmax")
        super().__init__(members, begin, dtype)

    def raw_numel(self, param: Tensor, record: Any) -> int:
        return param.numel() // self.length * self.raw_length

    def value_shape(self, entry: _Entry) -> torch.Size:
        return self._last(entry, entry.param).shape

    def _last(self, entry: _Entry, x: Tensor) -> Tensor:
        assert isinstance(entry.record, SimplexOf)
        return x.movedim(entry.record.dim, -1) if x.dim() else x

    def raw(self, entry: _Entry) -> Tensor:
        rows = self._last(entry, entry.param.to(self.dtype)).reshape(-1, self.length)
        return simplex_inverse(rows, kind=self.kind)

    def transform(self, raw: Tensor, return_log_det: bool) -> tuple[Tensor, Tensor | None]:
        rows = raw.view(sum(e.param.numel() for e in self.entries) // self.length, self.raw_length)
        if not return_log_det:
            return self.rounded(simplex(rows, kind=self.kind).view(-1), 0.0, math.inf), None
        try:
            x, log_det = simplex(rows, kind=self.kind, return_log_det=True)
        except ValueError as error:
            raise ValueError(f"FlatParameters.constrain: {self.entries[0].name}: {error}") from None
        return self.rounded(x.view(-1), 0.0, math.inf), log_det

    def views(self, values: Tensor) -> Sequence[Tensor]:
        dims = [e.record.dim if isinstance(e.record, SimplexOf) else -1 for e in self.entries]
        return [x.movedim(-1, dim) if x.dim() > 1 else x for dim, x in zip(dims, super().views(values), strict=True)]


_FAMILIES: dict[str, Callable[..., _Family]] = {
    "plain": _Family,
    "bounded": _Boxes,
    "exponential": _Exponentials,
    "simplex": _Simplices,
}
