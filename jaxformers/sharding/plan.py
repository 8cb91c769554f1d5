"""What a step of training takes on a mesh: memory of each device, and bytes between devices.

It needs no devices. The arguments of a step and the bytes of its collectives are those of the
programs that XLA compiles for CPUs, as `tests/sharded_checks.py plan` checks. Temporary memory is
an estimate, by the model that `docs/scaling.md` writes down.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from jaxformers import chunks
from jaxformers.checks import check_flag, check_size
from jaxformers.sharding.mesh import AXES, DATA, FSDP, SEQUENCE, TENSOR
from jaxformers.sharding.rules import as_names, divide
from jaxformers.sharding.workload import INTEGER, STORED, Workload

# What moves between devices.
LAYERS, TABLES = "weights of layers", "tables"
GRADIENTS, PARTS = "gradients", "gradients of parts of the loss"
SUMS, LOSS = "activations", "loss"
RING = "keys and values"


class Transfer(NamedTuple):
    """Bytes that devices exchange in a step.

    Arguments:
        kind: the name of the collective on CPUs. Accelerators scatter the sums of gradients.
        what: the arrays that are exchanged, such as "weights of layers".
        axes: the axes of the mesh over which devices exchange them.
        size: the bytes of the results on each device.
    """

    kind: str
    what: str
    axes: tuple[str, ...]
    size: float


class Memory(NamedTuple):
    """Bytes on each device. The first three are the arguments of a step, the others temporary."""

    weights: float
    moments: float
    batch: float
    gradients: float
    narrow_weights: float
    gathered_weights: float
    activations: float
    loss: float

    @property
    def arguments(self) -> float:
        return sum(self[:3])

    @property
    def temporaries(self) -> float:
        return sum(self[3:])

    @property
    def total(self) -> float:
        return sum(self)


class Plan:
    """A step of training on a mesh.

    Arguments:
        work: what the step does.
        mesh: sizes of the mesh by axis; those left out are 1.
        rematerialized: whether the layers' activations are computed again for the gradient.

    Raises:
        ValueError: if the model, the rows or the positions cannot be divided over the mesh.

    Example:
        >>> plan = Plan(Workload(model, rows=8, length=32), {"fsdp": 2})
        >>> plan.memory.arguments < Plan(plan.work, {"data": 2}).memory.arguments
        True
    """

    def __init__(self, work: Workload, mesh: Mapping[str, int], rematerialized: bool = True):
        unknown = mesh.keys() - set(AXES)
        if unknown:
            raise ValueError(
                f"a mesh has the axes {', '.join(AXES)}, got {', '.join(sorted(unknown))}."
            )
        self.work = work
        self.mesh = sizes = dict.fromkeys(AXES, 1) | dict(mesh)
        self.rematerialized = rematerialized
        check_size(**sizes)
        check_flag(rematerialized=rematerialized)
        _check_batch(work, sizes)
        specs = divide(work.arrays, sizes)
        pairs = zip(work.arrays, specs, strict=True)
        self.parts = [Part(array, spec, sizes) for array, spec in pairs]
        if work.has_experts and sizes[TENSOR] > 1:
            raise ValueError(
                f"there is no plan for a mixture of experts over tensor={sizes[TENSOR]}, because "
                "its activations are added up block by block. Use fsdp and data."
            )

    @property
    def devices(self) -> int:
        return prod(self.mesh.values())

    @property
    def tokens(self) -> float:
        """The tokens of a device."""
        return self.work.tokens / self._over(DATA, FSDP, SEQUENCE)

    @property
    def chunks(self) -> int:
        """How many parts the loss has, see `chunked_cross_entropy`."""
        divided = any(TENSOR in x.over for x in self.parts if x.is_output(self.work.tied))
        devices = self._over(DATA, FSDP, SEQUENCE, *((TENSOR,) if divided else ()))
        sizes = self.work.tokens, self.work.model.vocab_size
        chunk = chunks.choose_chunk(*sizes, devices, chunks.CHUNK_LOGITS_ELSEWHERE)
        number = -(-self.work.tokens // chunk)
        if number == 1 or self.mesh[SEQUENCE] == 1:
            return number
        return prod(chunks.split_of((self.work.rows, self.work.length), number, self.mesh))

    @property
    def memory(self) -> Memory:
        work, divided = self.work, sum(part.numbers() for part in self.parts)
        # A batch whose positions are divided also says positions and documents.
        arrays = 4 if self.mesh[SEQUENCE] > 1 else 2
        return Memory(
            weights=STORED * divided,
            moments=2 * STORED * divided,
            batch=arrays * INTEGER * self.tokens,
            gradients=STORED * divided,
            narrow_weights=work.width * divided if work.width < STORED else 0,
            gathered_weights=work.width * self._gathered(),
            activations=self.tokens * self._kept(),
            loss=self._loss(),
        )

    def _gathered(self) -> float:
        """Returns the numbers of weights that are whole over "fsdp" at a time.

        Of scanned layers it is one that computes and the next one, which is on its way.
        """
        if self.mesh[FSDP] == 1:
            return 0
        share = min(1, 2 / len(self.work.model.decoder.layers))
        gathered = (part for part in self.parts if FSDP in part.over)
        return sum((share if self._again(x) else 1) * x.numbers(FSDP) for x in gathered)

    def _again(self, part: "Part") -> bool:
        """Returns whether the backward pass gathers an array of a layer again.

        Those of separate layers are kept, and so are experts', unless all is computed again.
        """
        experts = self.work.has_experts and "feed_forward" in part.path.split(".")
        return part.in_layer and self.work.scanned and (self.rematerialized or not experts)

    def _kept(self) -> float:
        """Returns the bytes of activations for a token that the gradient needs.

        Layers that are computed again keep their inputs, and one layer has all of its own.
        """
        all_layers, largest = self.work.kept(self.mesh[TENSOR])
        if self.rematerialized:
            number = sum(count for _, count in self.work.layers)
            all_layers = number * self.work.width * self.work.model.embedding.d_model
        return all_layers + largest

    def _loss(self) -> float:
        """Returns the bytes of logits, in float32 and as computed, and of their gradients.

        A loss in several parts adds up the gradient of the output layer in float32.
        """
        vocabulary = self.work.model.vocab_size / self.mesh[TENSOR]
        logits = self.tokens * vocabulary * (2 * STORED + self.work.width) / self.chunks
        output = [x.numbers(FSDP) for x in self.parts if x.is_output(self.work.tied)]
        return logits + (STORED * sum(output) if self.chunks > 1 else 0)

    def traffic(self) -> dict[str, float]:
        """Returns the bytes of results of each kind of collective on a device in a step."""
        found: dict[str, float] = {}
        for transfer in self.transfers():
            found[transfer.kind] = found.get(transfer.kind, 0) + transfer.size
        return found

    def transfers(self) -> Iterator[Transfer]:
        """Yields what devices exchange in a step."""
        for part in self.parts:
            what = LAYERS if part.in_layer else TABLES
            if FSDP in part.over:
                times = 2 if self._again(part) else 1
                size = times * self.work.width * part.numbers(FSDP)
                yield Transfer("all-gather", what, (FSDP,), size)
            yield from self._gradients(part)
        yield from self._sums()
        yield from self._ring()

    def _gradients(self, part: "Part") -> Iterator[Transfer]:
        """Yields the sums of the gradients of an array, over rows and over positions."""
        numbers, work, times = part.numbers(FSDP), self.work, 1
        # A tied table has two, as the tokens' table and as the output layer's.
        if part.is_table and work.tied:
            times += 1
        in_parts = self.chunks > 1 and part.is_output(work.tied)
        for axes in ((DATA, FSDP), (SEQUENCE,)):
            if self._over(*axes) == 1:
                continue
            if times > in_parts:
                size = (times - in_parts) * work.width * numbers
                yield Transfer("all-reduce", GRADIENTS, axes, size)
            if in_parts:
                yield Transfer("all-reduce", PARTS, axes, self.chunks * STORED * numbers)

    def _sums(self) -> Iterator[Transfer]:
        """Yields the sums of activations over "tensor".

        A map whose inputs are divided adds up its outputs, and one whose outputs are divided adds
        up the gradients of its inputs. Layers that are computed again add up their outputs again,
        all but the last of a layer.
        """
        work, activation = self.work, self.work.width * self.tokens
        again = 0.0
        for part in self.parts:
            forward, backward = part.sums()
            if part.is_table and work.tied:
                backward = forward
            if part.in_layer:
                again += forward
            if forward + backward:
                size = activation * (forward + backward)
                yield Transfer("all-reduce", SUMS, (TENSOR,), size)
        if again and self.rematerialized:
            last = sum(number for _, number in work.layers) * work.model.embedding.d_model
            yield Transfer("all-reduce", SUMS, (TENSOR,), activation * (again - last))
        if any(part.is_output(work.tied) and TENSOR in part.over for part in self.parts):
            # The largest logit, the sum of the exponentials and the target's logit of each token.
            yield Transfer("all-reduce", LOSS, (TENSOR,), 3 * STORED * self.tokens)

    def _ring(self) -> Iterator[Transfer]:
        """Yields what travels around the ring: keys and values, and in turn their gradients."""
        turns = self.mesh[SEQUENCE]
        if turns == 1:
            return
        passes, size = 3 if self.rematerialized else 2, 0.0
        for layer, number in self.work.layers:
            heads = layer.self_attention
            features = 2 * heads.num_kv_heads * heads.head_dim / self.mesh[TENSOR]
            size += number * features * (passes * self.work.width + STORED)
        # The positions and documents of keys too: those of the forward pass travel once for all.
        number = sum(number for _, number in self.work.layers)
        size += 2 * INTEGER * (1 + (passes - 1) * number)
        yield Transfer("collective-permute", RING, (SEQUENCE,), turns * self.tokens * size)

    def _over(self, *axes: str) -> int:
        return prod(self.mesh[axis] for axis in axes)


class Part:
    """An array of a model on a mesh."""

    def __init__(self, array: Any, spec: Any, sizes: Mapping[str, int]):
        self.path, self.axes, self.shape = array
        self.sizes = sizes
        # The array's axis that each axis of the mesh divides.
        self.over = {axis: i for i, over in enumerate(spec) for axis in as_names(over)}
        names = self.path.split(".")
        self.in_layer = "layers" in names
        self.is_table = self.path.startswith("embedding.token_embedding.")

    def is_output(self, tied: bool) -> bool:
        return self.is_table if tied else self.path == "output.w"

    def numbers(self, *whole: str) -> float:
        """Returns the numbers on a device if they are gathered over these axes of the mesh."""
        return prod(self.shape) / prod(self.sizes[x] for x in self.over if x not in whole)

    def sums(self) -> tuple[int, int]:
        """Returns the numbers that a token has added up over "tensor", forward and backward."""
        at = self.over.get(TENSOR)
        if at is None or not self.axes.inputs:
            return 0, 0
        maps, inputs, outputs = self.axes.sizes(self.shape)
        return (maps * outputs, 0) if at in self.axes.inputs else (0, maps * inputs)


def _check_batch(work: Workload, sizes: Mapping[str, int]) -> None:
    """Raises an error if rows or positions cannot be divided."""
    rows, parts = sizes[DATA] * sizes[FSDP], sizes[SEQUENCE]
    if work.rows % rows:
        raise ValueError(
            f"a batch of {work.rows} rows cannot be divided over data={sizes[DATA]} x "
            f"fsdp={sizes[FSDP]}. Use a multiple of {rows} rows."
        )
    if work.length % parts or (parts > 1 and work.length % (2 * parts)):
        raise ValueError(
            f"rows of {work.length} tokens cannot be divided over sequence={parts}, whose devices "
            f"have two parts of a row each. Use a multiple of {2 * parts} tokens."
        )
