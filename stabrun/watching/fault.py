"""Where the first value of a step that is not finite arose, and what was there, in a sentence or two."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

INPUT = "input"  # it was there before the first module
TOKEN = "token"  # an embedding has no row for an id
FORWARD = "forward"
LOSS = "loss"  # or its backward pass: between the last module and the loss
BACKWARD = "backward"
WEIGHT_GRADIENT = "weight gradient"
EXCHANGE = "exchange"  # gradients were finite on this rank, and one is not after the ranks have exchanged theirs


LISTED = 3  # names of weights


@dataclass(frozen=True)
class Fault:
    """A module and a pass. |x| of a tensor without finite values is 0; None is what has not been measured."""

    module: str  # its path in the model; empty for the model itself, and for what lies outside of its modules
    kind: str  # its class; empty outside of modules
    pass_: str  # one of the names above
    dtype: str  # of the value: `float16`
    overflow: bool = False  # the value is infinite; else NaN
    input_largest: float | None = None  # largest finite |x| of what the module got
    input_finite: bool = True
    output_largest: float | None = None  # largest finite |x| of what it returned
    gradient_largest: float | None = None  # largest finite |x| of the gradient that arrived at its output
    weights_largest: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))  # name → |w|, NaN if bad
    positions: tuple[tuple[int, int], ...] = ()  # the first (sequence, position) in the batch where it is not finite
    tokens: tuple[tuple[int, ...], ...] = ()  # for each position its token id, after the few before it
    scale: float = 1.0  # of the loss in the backward pass
    parameter: str = ""  # whose gradient it is
    token: int | None = None  # the id without a row
    rows: int | None = None  # of the embedding
    limit: float = float("inf")  # the largest number of dtype

    @property
    def name(self) -> str:
        """`layers.3.mlp (LlamaMLP)`."""
        return f"{self.module} ({self.kind})" if self.module else f"the model itself ({self.kind})"

    @property
    def place(self) -> str:
        """`, in sequence 0 at position 5 (token ids up to there: 7 8 9)`, or nothing."""
        if not self.positions:
            return ""
        sequence, position = self.positions[0]
        ids = f" (token ids up to there: {' '.join(map(str, self.tokens[0]))})" if self.tokens else ""
        return f", in sequence {sequence} at position {position}{ids}"

    def sentence(self) -> str:
        """One or two sentences."""
        return _SENTENCES[self.pass_](self)

    def _what(self) -> str:
        return f"{'infinite' if self.overflow else 'NaN'} ({self.dtype})"

    def _reason(self) -> str:
        """Of a result that is not finite although what went in is."""
        broken = [name for name, largest in self.weights_largest.items() if largest != largest]
        if broken:
            names = broken if len(broken) <= LISTED else [*broken[:LISTED], f"{len(broken) - LISTED} more"]
            return f"Its {_listed(names)} already held values that are not finite."
        among = "" if self.input_finite else " beside infinite ones"
        parts = [f"inputs up to {_short(self.input_largest)}{among}"] if self.input_largest is not None else []
        if self.gradient_largest is not None:
            scaled = f" (with a loss scale of {self.scale:g})" if self.scale != 1 else ""
            parts.append(f"a gradient up to {_short(self.gradient_largest)}{scaled} at its output")
        if self.weights_largest:
            parts.append(f"weights up to {_short(max(self.weights_largest.values()))}")
        end = f", and the largest number of {self.dtype} is {self.limit:.6g}" if self.overflow else ""
        return f"It had {_listed(parts)}{end}." if parts else ""


def _short(x: float) -> str:
    """`0.0123`, `102`, `60000`, `1.2e+06`."""
    return f"{x:.3g}" if x < 1000 else f"{x:.5g}"


def _listed(parts: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def _input(fault: Fault) -> str:
    return f"The input of {fault.name} was already {fault._what()}{fault.place}, before any module had run on it."


def _token(fault: Fault) -> str:
    where = f"{fault.place}," if fault.place else ""
    return f"Id {fault.token}{where} has no row in {fault.name}, whose ids go from 0 to {(fault.rows or 0) - 1}."


def _forward(fault: Fault) -> str:
    return f"The output of {fault.name} was the first to become {fault._what()}{fault.place}. {fault._reason()}".strip()


def _loss(fault: Fault) -> str:
    if fault.gradient_largest is None:
        return (
            f"The loss was {fault._what()}, although the outputs of all modules were finite. "
            "Its function or its targets are the cause, for example a mean over no targets."
        )
    return (
        "Where the backward pass of the loss reached the model, "
        f"the gradient was {fault._what()}{fault.place}, although the loss was finite."
    )


def _backward(fault: Fault) -> str:
    return (
        f"In the backward pass, the gradient became {fault._what()} in {fault.name}{fault.place}. {fault._reason()}"
    ).strip()


def _weight_gradient(fault: Fault) -> str:
    return (f"The gradient of {fault.parameter} became {fault._what()} in {fault.name}. {fault._reason()}").strip()


def _exchange(fault: Fault) -> str:
    return (
        f"The gradient of {fault.parameter} was {fault._what()} after the ranks had exchanged theirs. "
        "Before, none at a module of this rank was: another rank has the cause, or the sum was too large."
    )


_SENTENCES = {
    INPUT: _input,
    TOKEN: _token,
    FORWARD: _forward,
    LOSS: _loss,
    BACKWARD: _backward,
    WEIGHT_GRADIENT: _weight_gradient,
    EXCHANGE: _exchange,
}
