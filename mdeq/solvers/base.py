"""The fixed-point problem z = f(z): what a solver takes, what it returns, and the one iteration loop of the package."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

FlatFn = Callable[[Tensor], Tensor]
"""A map `(B, D) -> (B, D)` whose output sample i depends on input sample i only.

It returns a tensor of its own at every call: solvers go on from it, and a buffer that the next call writes into would
change the iterate under them.

It may offer `fn.take(index) -> FlatFn`, the same map for those samples alone; the loop then drops finished samples from
the batch that it evaluates. Without it the whole batch is evaluated until the last sample stops. It may also offer
`fn.tensors()`, all tensors it closes over that may need gradients: where none of them does, a solve is not
differentiated, and estimators that evaluate f in backward send gradients to these alone.
"""


class SolveStatus(enum.IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0  # residual below tol, or exactly zero
    MAX_STEPS = 1  # budget spent; the usual outcome in training, not an error
    DIVERGED = 2  # the absolute residual grew past divergence_factor times its first value
    NONFINITE = 3  # nan or inf occurred, or a norm that overflows; the best finite iterate is returned


@dataclass(frozen=True)
class SolveStats:
    """What a solve did, per sample. Holds no iterate, so keeping it costs no memory.

    Attributes:
        status: `(B,)` int64, values of `SolveStatus`.
        residual: `(B,)` residual of the returned iterate, relative (unitless) or absolute (units of z) by `stop_mode`.
        num_steps: `(B,)` int64, updates until that sample stopped. It took `num_steps + 1` evaluations (times
            `per_step`), plus those of a line search; one fewer where the first was known.
        nfe: evaluations of f, for the whole batch.
        trace: `(steps + 1, B)` residual at every iterate, the starting point first; a finished sample's last repeats.
        per_step: evaluations that a step takes by itself, and the start; 2 for the reversible iteration.
        first_known: whether the image of the starting point was known and took none.
    """

    status: Tensor
    residual: Tensor
    num_steps: Tensor
    nfe: int
    trace: Tensor
    per_step: int = 1
    first_known: bool = False

    @property
    def converged(self) -> Tensor:
        """`(B,)` bool."""
        return self.status == SolveStatus.CONVERGED

    @property
    def evaluations(self) -> Tensor:
        """`(B,)` floating point, evaluations of f that each sample took part in.

        A line search evaluates f for every sample that is still on its way; these are shared out evenly over the steps.
        """
        steps, calls = len(self.trace) - 1, self.nfe / self.per_step
        first = 0 if self.first_known else 1
        more = calls - steps - first
        return self.per_step * (first + self.num_steps * (1.0 + more / max(steps, 1)))

    def summary(self) -> dict[str, float]:
        """Means, residual quantiles and the share of each status, for logging. One host synchronisation."""
        # Taken over in the precision of the residual, float32 at least: some devices have no float64.
        wide = torch.promote_types(self.residual.dtype, torch.float32)
        columns = torch.stack([x.to(wide) for x in (self.num_steps, self.status, self.residual)])
        steps, status, residual = columns.cpu().double()
        residual = residual.nan_to_num(nan=float("inf"))
        if len(residual) == 0:
            residual = residual.new_full((1,), float("nan"))  # of nothing there is neither mean nor largest
        values = [steps.mean(), residual.mean(), residual.median(), residual.max()]
        values += [(status == code).double().mean() for code in SolveStatus]
        names = ["steps", "residual_mean", "residual_median", "residual_max"]
        names += [code.name.lower() for code in SolveStatus]
        return {"nfe": float(self.nfe), **dict(zip(names, torch.stack(values).tolist(), strict=True))}


class Memory(Protocol):
    """What a solver remembers between steps; tensors with the batch axis first."""

    def take(self, index: Tensor) -> "Memory":
        """Return the memory of the samples `index` alone; this one may be overwritten."""
        ...


def full_precision(z: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    # Nothing to switch off is the common case, and a graph with the switch in it cannot be saved by torch.export.
    if z.is_meta or not torch.is_autocast_enabled(z.device.type):
        return nullcontext()
    return torch.autocast(z.device.type, enabled=False)


def forget_casts(z: Tensor) -> None:
    """Have autocast cast weights anew: what it cast and cached without gradients has none (torch before 2.7)."""
    if not is_static(z) and torch.is_autocast_enabled(z.device.type):
        torch.clear_autocast_cache()


def small_dtype(z: Tensor) -> torch.dtype:
    """Return the dtype of norms and inner products of a state: its own, but for float16, in which they overflow."""
    return torch.float32 if z.dtype == torch.float16 else z.dtype


_all_steps: ContextVar[bool] = ContextVar("all_steps", default=False)


@contextmanager
def static_solves() -> Iterator[None]:
    """Have solves take every step, without a look at values, as in a CUDA graph."""
    token = _all_steps.set(True)
    try:
        yield
    finally:
        _all_steps.reset(token)


def is_static(z: Tensor) -> bool:
    """Whether values must not steer control flow: meta tensors and graphs, by whatever made, run every step."""
    if z.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _all_steps.get() or (z.is_cuda and torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver(ABC):
    """Settings of a fixed-point solver; calling it solves z = f(z) for every sample on its own.

    A subclass says how to step (`init`, and `direction` or `propose`); stopping, the best iterate, freezing of finished
    samples, failures and the trace exist once, in `solve`. Step counts, status and result of a sample do not depend on
    its batch mates, but for rounding, which an iteration that does not converge may amplify.

    Args:
        tol: a sample has converged when its residual is below this; relative (unitless) or absolute (units of z).
        max_steps: most updates; a solve takes at most `max_steps + 1` evaluations of f, and those of a line search.
        stop_mode: `"rel"`: `|f(z) - z| / (|f(z)| + 1e-9)`; `"abs"`: `|f(z) - z|`; 2-norms of one sample.
        divergence_factor: a sample has diverged when `|f(z) - z|` exceeds this many times its first value, or
            times `1e-3 sqrt(D)` where that is more: a start that happens to be near a fixed point is no yardstick.
            Judged on the absolute residual in both modes, since the relative one saturates near 1.
        check_every: steps between looks at who has finished, each of which waits for the device. In between, finished
            samples are kept as they are but evaluated along with the rest; results are the same.

    Raises:
        ValueError: at construction, for a setting out of range.
    """

    tol: float = 1e-3
    max_steps: int = 30
    stop_mode: Literal["rel", "abs"] = "rel"
    divergence_factor: float = 1e6
    check_every: int = 1

    def __post_init__(self) -> None:
        _require_number("tol", self.tol)
        _require(self.tol >= 0, "tol must be >= 0", self.tol)
        _require(self.tol < float("inf"), "tol must be finite", self.tol)
        _require_count("max_steps", self.max_steps, 1)
        _require(self.stop_mode in ("rel", "abs"), "stop_mode must be 'rel' or 'abs'", self.stop_mode)
        _require_number("divergence_factor", self.divergence_factor)
        _require(self.divergence_factor > 1, "divergence_factor must be > 1", self.divergence_factor)
        _require_count("check_every", self.check_every, 1)

    @abstractmethod
    def init(self, z0: Tensor) -> Any:
        """Return the memory of a new solve from z0 `(B, D)`."""

    def direction(self, memory: Any, z: Tensor, g: Tensor) -> Tensor:
        """Return the step `(B, D)` to take from iterate z, where g = f(z) - z; update the memory in place."""
        raise NotImplementedError(f"{type(self).__name__} must define direction or propose")

    def propose(self, memory: Any, z: Tensor, f: Tensor, g: Tensor) -> Tensor:
        """Return the next iterate `(B, D)`, where f = f(z) and g = f - z; update the memory in place.

        To be given in place of `direction` by a solver that gets there with fewer passes over the state.
        """
        return z + self.direction(memory, z, g)

    def judged(self, z: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the difference f(z) - z and the image f(z) by whose norms iterates are judged."""
        return g, f

    @property
    def looks_back(self) -> bool:
        """Whether `advance` looks at the iterate that it comes from."""
        return False

    def advance(self, fn: FlatFn, memory: Any, z: Tensor, g: Tensor, trial: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the next iterate, its image under fn, and the number of evaluations spent. A line search goes here."""
        return trial, fn(trial), 1

    @property
    def learns_jacobian(self) -> bool:
        """Whether `inverse_transposed` has more to say than w."""
        return type(self).inverse_transposed is not FixedPointSolver.inverse_transposed

    def secants(self, memory: Any) -> tuple[Tensor, ...]:
        """Return what the memory of a solve holds of J, for `inverse_transposed`: all that backward is given."""
        return ()

    def inverse_transposed(self, secants: tuple[Tensor, ...], stats: SolveStats, w: Tensor) -> Tensor:
        """Return an estimate of `(I - J)^-T w` `(B, D)` from what a solve has learnt of J; w where that is nothing.

        It is where the linear system of the implicit gradient may start (Ramzi et al. 2022, SHINE).

        Args:
            secants: of a solve that kept every sample in the batch, as `secants` returns them.
            stats: of the same solve.
            w: `(B, D)`.
        """
        return w

    def __call__(self, fn: FlatFn, z0: Tensor) -> tuple[Tensor, SolveStats]:
        """Return the best iterate of each sample `(B, D)` and what happened; see `solve`."""
        return self.solve(fn, z0)[:2]

    @torch.no_grad()
    def solve(
        self, fn: FlatFn, z0: Tensor, *, compact: bool = True, f0: Tensor | None = None
    ) -> tuple[Tensor, SolveStats, Any]:
        """Return the best iterate of each sample `(B, D)`, what happened, and the solver's memory at the end.

        Never raises on failure of a solve.

        The starting point does not compete as best iterate: it is returned only where it has converged already or where
        no later iterate is finite.

        Args:
            fn: the map, see `FlatFn`.
            z0: `(B, D)` starting points; their dtype is the dtype of the solve.
            compact: whether finished samples may leave the batch; the memory is then that of those that stayed.
            f0: fn(z0) `(B, D)` where it is known, which saves an evaluation.

        Raises:
            ValueError: for a z0 that is no floating-point `(B, D)`, or an fn that changes its shape.
        """
        if z0.ndim != 2 or not z0.is_floating_point():
            raise ValueError(f"z0 must be a floating-point tensor (B, D), got {tuple(z0.shape)} {z0.dtype}")
        static = is_static(z0)
        # Where the host looks at every step, it keeps the books: on a GPU their many small kernels would outnumber f's.
        books = z0.device if static or self.check_every > 1 else torch.device("cpu")
        progress = _Progress.start(z0, books)
        outer: list[tuple[_Progress, Tensor]] = []  # batches that were compacted, and the rows that went on
        memory = self.init(z0)
        z, fz, nfe = (z0, fn(z0), 1) if f0 is None else (z0, f0, 0)
        if fz.shape != z0.shape:
            raise ValueError(f"fn must keep the shape of its argument, {tuple(z0.shape)}, got {tuple(fz.shape)}")
        for step in range(self.max_steps + 1):
            g = fz - z
            difference, image = self.judged(z, fz, g)
            absolute = torch.linalg.vector_norm(difference, dim=1, dtype=small_dtype(g))
            residual = absolute
            if self.stop_mode == "rel":
                residual = absolute / (torch.linalg.vector_norm(image, dim=1, dtype=small_dtype(g)) + 1e-9)
            if books != z.device:
                absolute, residual = torch.stack((absolute, residual)).to(books)  # the one wait of a step
            look = not static and (step % self.check_every == 0 or step == self.max_steps)
            num_active = progress.update(self, step, z, absolute, residual, look)
            if step == self.max_steps or num_active == 0:
                break
            # Compaction copies the memory, so it waits until it saves a quarter of the evaluations.
            take = getattr(fn, "take", None) if compact else None
            if take is not None and num_active is not None and num_active <= 0.75 * z.shape[0]:
                # Their rows in order; nonzero() would wait for the device once more to learn how many there are.
                index = (~progress.active).byte().argsort(stable=True)[:num_active]
                outer.append((progress, index))
                progress, index = progress.take(index), index.to(z.device, non_blocking=True)
                memory, fn = memory.take(index), take(index)
                z = z[index]  # one after the other, which frees the one before
                fz = fz[index]
                g = g[index]
            with full_precision(z):  # autocast is for f, not for the solver's own products
                trial = self.propose(memory, z, fz, g)
            if num_active is None or num_active < z.shape[0]:
                # Finished samples rest at their best iterate, which is always finite.
                if self.looks_back:
                    z = _where(progress.active, z, progress.best)
                trial = _where(progress.active, trial, progress.best)
            z, fz, spent = self.advance(fn, memory, z, g, trial)
            nfe += spent
        for whole, index in reversed(outer):
            progress = whole.merge(index, progress)
        forget_casts(z0)
        return progress.best, progress.stats(nfe, f0 is not None), memory


@dataclass
class _Progress:
    """What the loop knows of each sample of the batch that it still evaluates: the best iterate, and the books."""

    best: Tensor  # (B, D), on the device of the state
    active: Tensor  # (B,) bool, as all that follows on the device where the books are kept
    best_residual: Tensor  # (B,)
    limit: Tensor  # (B,) absolute residual above which a sample has diverged
    status: Tensor  # (B,) int64
    num_steps: Tensor  # (B,) int64
    trace: list[Tensor]  # of (B,)

    @classmethod
    def start(cls, z0: Tensor, books: torch.device) -> "_Progress":
        batch, dtype = z0.shape[0], small_dtype(z0)
        status = torch.full((batch,), SolveStatus.MAX_STEPS, dtype=torch.int64, device=books)
        return cls(
            best=z0,
            active=torch.ones(batch, dtype=torch.bool, device=books),
            best_residual=torch.full((batch,), _largest(z0), dtype=dtype, device=books),
            limit=torch.zeros(batch, dtype=dtype, device=books),
            status=status,
            num_steps=torch.zeros_like(status),
            trace=[],
        )

    def update(
        self, solver: FixedPointSolver, step: int, z: Tensor, absolute: Tensor, residual: Tensor, look: bool
    ) -> int | None:
        """Take note of iterate z and decide which samples go on; return how many do, None where nobody may look."""
        if step == 0:
            first = absolute.clamp(min=1e-3 * z.shape[1] ** 0.5)
            self.limit = (solver.divergence_factor * first).clamp(max=_largest(z))
        # Comparisons with nan are false: what is not finite does not go on, and is never better.
        goes_on = self.active & (residual >= solver.tol) & (absolute > 0) & (absolute <= self.limit)
        finite = absolute <= _largest(z)
        better = self.active & (residual < self.best_residual) & finite
        if step == 0:  # its residual is reported if nothing else can be returned, but any finite iterate beats it
            better &= ~goes_on & (absolute <= self.limit)
        num_active = None
        if look:
            # Both numbers in one: the one host synchronisation of a step, unless the books are here.
            num_better, num_active = divmod(int((better.sum() * 2**32 + goes_on.sum()).item()), 2**32)
            if num_active == len(residual) and num_better == (0 if step == 0 else num_active):
                # Nothing ended and nothing got worse, the usual step: what is noted needs no pass over the state.
                if num_better:
                    self.best, self.best_residual = z, residual
                self.trace.append(residual)
                self.num_steps.fill_(step)
                return num_active
        ended = self.active & ~goes_on
        converged = ended & finite & ((residual < solver.tol) | (absolute == 0))
        self.best = _where(better, z, self.best)
        self.best_residual = torch.where(better, residual, self.best_residual)
        for status, condition in (
            (SolveStatus.CONVERGED, converged),
            (SolveStatus.DIVERGED, ended & finite & ~converged),
            (SolveStatus.NONFINITE, ended & ~finite),
        ):
            self.status = self.status.masked_fill(condition, status)
        self.trace.append(torch.where(self.active, residual, self.trace[-1]) if self.trace else residual)
        self.num_steps = torch.where(self.active, step, self.num_steps)
        self.active = goes_on
        return num_active

    def take(self, index: Tensor) -> "_Progress":
        best = self.best[index.to(self.best.device, non_blocking=True)]
        fields = (self.active, self.best_residual, self.limit, self.status, self.num_steps)
        return _Progress(best, *(x[index] for x in fields), trace=[self.trace[-1][index]])

    def merge(self, index: Tensor, part: "_Progress") -> "_Progress":
        """Write the samples that went on alone back to rows `index`."""
        self.best = self.best.index_copy(0, index.to(self.best.device, non_blocking=True), part.best)
        for name in ("best_residual", "status", "num_steps"):
            setattr(self, name, getattr(self, name).index_copy(0, index, getattr(part, name)))
        last = self.trace[-1]
        self.trace += [last.index_copy(0, index, row) for row in part.trace[1:]]
        return self

    def stats(self, nfe: int, first_known: bool) -> SolveStats:
        trace = torch.stack(self.trace)
        # Where no iterate competed, the starting point is what is returned.
        residual = torch.where(self.best_residual == _largest(self.best), trace[0], self.best_residual)
        small = (x.to(self.best.device, non_blocking=True) for x in (self.status, residual, self.num_steps, trace))
        status, residual, num_steps, trace = small
        return SolveStats(status, residual, num_steps, nfe, trace, first_known=first_known)


def _largest(z: Tensor) -> float:
    """Return the largest norm of a state that is finite. Graphs do without infinity, which PyTorch 2.7 cannot save."""
    return torch.finfo(small_dtype(z)).max


def _where(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the rows of x where a mask of the books holds, else those of y."""
    return torch.where(mask.to(x.device, non_blocking=True).unsqueeze(1), x, y)


def _require(condition: bool, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {value}")


def _require_number(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(number, f"{name} must be a number", repr(value))


def _require_count(name: str, value: Any, least: int) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool), f"{name} must be an integer", repr(value))
    _require(value >= least, f"{name} must be >= {least}", value)
