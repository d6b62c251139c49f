"""Networks that do not fit one device: k ranks hold one together, each some rows of every parameter.

What is stored never passes through one place as a whole. A network comes as its skeleton and a safetensors file, of which each rank
reads its own rows; FSDP2 gathers the weights of one unit (`units`) at a time for forward and backward; the result goes to disk tensor
by tensor.

Everything else of a training (optimizer, averaged weights, clipping, masks) works on `Sharded.rows`: a module of the network's own
classes whose parameters are this rank's rows, in the same storage that FSDP gathers from. It is never called, and to all that
changes parameters one by one it is a network like any other.

A rank's rows of a tensor of n rows are those of `torch.chunk`: ceil(n / k) each, the last ranks may have fewer, or none. Parameters
without dimensions and buffers are whole on every rank. Under bf16 autocast a rank also keeps, from forward to backward, the bf16 copies
that autograd has saved of the weights: two bytes for each.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_leaves, tree_map_only

from pipeline import artifacts
from pipeline.artifacts import StorageError

MIN_ELEMENTS = 1 << 18
"""Of a unit. A smaller module is gathered with what surrounds it: it saves less memory than another collective costs time."""

TORCH_DTYPES = {name: dtype for dtype, name in artifacts.DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A network of which nobody holds the values."""

    skeleton: nn.Module
    """See `skeleton_of`. Is not changed."""
    path: str
    """Safetensors file with its state_dict; local path or URI that every rank can read. Of tied tensors one name is enough."""


Network = nn.Module | Stored

Take = Callable[[str, Sequence[Tensor]], None]
"""Is told a parameter's name and its gradients, one of each rank's micro-batch, in order; of a network in rows this rank's rows of them."""


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy with parameters and persistent buffers on the meta device, tied ones still tied. What no file would hold stays real."""
    memo: dict[int, Any] = {}
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, Tensor):
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            is_parameter = isinstance(value, nn.Parameter)
            memo[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def whole(network: Network) -> nn.Module:
    """A copy of the network with all its values on the CPU."""
    if not isinstance(network, Stored):
        return copy.deepcopy(network)
    model = copy.deepcopy(network.skeleton)
    with _values(network) as read:
        _fill_(model, lambda name, empty: read(name, empty, None))
    return model


def mapped(network: Stored) -> nn.Module:
    """The network on the CPU with its values mapped into memory: of a local file each is read when it is looked at, and given up when
    memory is short. Of another place they are fetched."""
    tensors = artifacts.read_tensors(network.path)
    aliases, model = _aliases(network.skeleton), copy.deepcopy(network.skeleton)

    def value(name: str, empty: Tensor) -> Tensor:
        found = _by_any(aliases[name], tensors)
        _require_shape(network.path, name, empty, None if found is None else found.shape)
        assert found is not None
        return found.to(empty.dtype)

    _fill_(model, value)
    return model


# --- several ranks that do one thing ----------------------------------------------------------------------------------


def together(work: Callable[[], Any], world_size: int) -> Any:
    """`work()` on every rank; an error of one is raised on all, so that none waits for a rank that has given up."""
    if world_size == 1:
        return work()
    result, mine = None, None
    try:
        result = work()
    except Exception as error:
        mine = error
        try:
            pickle.dumps(mine)
        except Exception:  # what cannot be sent would leave the others without an answer
            mine = RuntimeError(f"{type(error).__name__}: {error}")
    errors: list[Exception | None] = [None] * world_size
    dist.all_gather_object(errors, mine)
    for failure in errors:
        if failure is not None:
            raise failure
    return result


def build_mesh(shard_over: int, world_size: int, device: torch.device) -> DeviceMesh | None:
    """All ranks in lines of `shard_over`: a line holds one network, and the lines are replicas. None where each rank holds it all.

    Raises:
        ValueError: the ranks do not fill whole lines.
    """
    if shard_over < 1 or world_size % shard_over:
        raise ValueError(
            f"shard_over ({shard_over}) ranks hold a network together, and {world_size} ranks are not a multiple of that. Choose "
            f"{', '.join(str(k) for k in range(1, world_size + 1) if world_size % k == 0)}, or another number of workers."
        )
    if shard_over == 1:
        return None
    shape = (world_size // shard_over, shard_over)
    if shape[0] == 1:
        return init_device_mesh(device.type, shape[1:], mesh_dim_names=("shard",))
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


# --- what is gathered at a time ---------------------------------------------------------------------------------------


def units(model: nn.Module, min_elements: int = MIN_ELEMENTS) -> list[nn.Module]:
    """The modules whose weights are gathered on their own, inner ones first; the rest of the network is one unit more.

    FSDP gathers a module's weights when the module is *called*, and gives them back afterwards. So a unit must be called, and its
    weights must be used nowhere else. Whether a network does so cannot be read off its modules, but two places are made for being called: the
    members of nn.Sequential, nn.ModuleList and nn.ModuleDict that have modules of their own (repeated blocks), and all members of a Sequential
    that calls them itself. A linear layer that is an attribute is not among them: nn.MultiheadAttention never calls its out_proj, but reads the
    weight. Nor is a module with a parameter that is also found outside it (tied weights, shared modules).

    Where a network breaks the rule all the same, the weight that it finds is a DTensor, which torch refuses to combine with a tensor: an
    error in the first step (`explained`), never a wrong number.

    Args:
        min_elements: a module with fewer that are not yet in a unit is left to what surrounds it.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules())
    chosen: list[nn.Module] = []
    taken: set[int] = set()
    for name, module in reversed(modules.items()):  # children come after their parents
        parent = modules.get(name.rpartition(".")[0])
        if not name or not _is_called(module, parent):
            continue
        if any(not owner.startswith(f"{name}.") for p in module.parameters() for owner in owners[id(p)]):
            continue
        own = {id(p): p.numel() for p in module.parameters() if id(p) not in taken and p.dim() > 0}
        if own and sum(own.values()) >= min_elements:
            chosen.append(module)
            taken |= own.keys()
    return chosen


def _is_called(module: nn.Module, parent: nn.Module | None) -> bool:
    if type(module).forward is nn.Module.forward or not isinstance(
        parent, nn.Sequential | nn.ModuleList | nn.ModuleDict
    ):
        return False
    calls_itself = isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward
    return calls_itself or any(True for _ in module.children())


def _without_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Copies of what is a view: FSDP hangs the gathering for the backward on the outputs, and an in-place operation on a view would drop it.

    For the same reason there must be no outputs that it does not find.
    """
    for leaf in tree_leaves(output):
        if not isinstance(leaf, Tensor | int | float | str | None):
            name = type(module).__name__.removeprefix("FSDP")
            raise ValueError(
                f"{name} returns {type(leaf).__name__}; a module whose weights are gathered on their own must return tensors, or tuples, lists or "
                "dicts of them. Return those, or set shard_over to 1."
            )
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, output)


@contextmanager
def explained() -> Iterator[None]:
    """Says what it means that weights were met which are not gathered, or an input that may not be written into."""
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" in str(error):
            raise ValueError(
                "the network uses weights of a member of an nn.Sequential or nn.ModuleList without calling that member, so that they are not "
                "gathered. Call it, keep the weights outside of such containers, or set shard_over to 1."
            ) from error
        if "RegisterPostBackwardFunction" in str(error):
            raise ValueError(
                "a block of the network writes into its own input, which a block whose weights are gathered on their own may not. Let it make a "
                "new tensor there (inplace=False), or set shard_over to 1."
            ) from error
        raise


def shares_of(length: int, size: int) -> list[tuple[int, int]]:
    """First row of each rank and the one after its last, as torch.chunk has them: the last ranks may have fewer, or none."""
    each = -(-length // size)
    return [(min(each * rank, length), min(each * (rank + 1), length)) for rank in range(size)]


# --- one network on several ranks -------------------------------------------------------------------------------------


class Sharded:
    """A network of which this rank holds its rows."""

    def __init__(self, network: Network, mesh: DeviceMesh, device: torch.device, *, trains: bool = True) -> None:
        """
        Args:
            network: is not changed.
            mesh: see `build_mesh`; its ranks all make this at the same time.
            trains: False: for forwards, and backwards whose gradients are handed over; there are no `rows` then.
        """
        self.mesh, self.device, self.world_size = mesh, device, mesh.size()
        self.group = mesh.get_group("shard")
        self.size, self.index = mesh["shard"].size(), mesh["shard"].get_local_rank()
        self.placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        skeleton = network.skeleton if isinstance(network, Stored) else skeleton_of(network)
        self.replica = copy.deepcopy(skeleton)
        """To be called, by all ranks at the same time."""
        without_rows = {p for p in self.replica.parameters() if p.dim() == 0}
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": without_rows}
        for unit in units(self.replica, MIN_ELEMENTS):
            unit.register_forward_hook(_without_views)
            fully_shard(unit, **options)
        self.replica.register_forward_hook(_without_views)
        # By its default the root is given back in the backward, which a network that only evaluates never has.
        fully_shard(self.replica, reshard_after_forward=None if trains else True, **options)
        together(lambda: self._read(network), self.world_size)
        self.shapes = {
            name: parameter.shape
            for name, parameter in self.replica.named_parameters(remove_duplicate=False)
            if isinstance(parameter, DTensor)
        }
        """Of the whole parameters that are in rows, by every name."""
        if trains:
            self.rows = copy.deepcopy(skeleton)
            """This rank's parameters and buffers, in storage that it shares with `replica`; never called."""
            self._pairs = self._share_()

    def _read(self, network: Network) -> None:
        with _values(network) as read:
            _fill_(self.replica, partial(self._placed, read))

    def _placed(self, read: Read, name: str, empty: Tensor) -> Tensor:
        if not isinstance(empty, DTensor):
            return read(name, empty, None).to(self.device)
        rows = read(name, empty, self.range(len(empty))).to(self.device)
        return self.spread(rows, empty.shape)

    @torch.no_grad()
    def _share_(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Give `rows` its parameters and buffers; returns each parameter of the replica with its rows."""
        own = dict(self.rows.named_modules(remove_duplicate=False))
        pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, module in self.replica.named_modules(remove_duplicate=False):
            own[name]._buffers = module._buffers  # the dict itself: a module may replace its buffers
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in pairs:
                    local = local_rows(parameter)
                    pairs[id(parameter)] = (parameter, nn.Parameter(local, requires_grad=parameter.requires_grad))
                own[name]._parameters[key] = pairs[id(parameter)][1]
        return list(pairs.values())

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def send_buffers_(self) -> None:
        """Rank 0's to all, as DDP does before each forward."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.replica.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        for buffers in kinds.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, src=0)
            for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))

    @torch.no_grad()
    def take_gradients_(self) -> None:
        """After the backward: hand the averaged gradients of the replica to the rows."""
        for parameter, rows in self._pairs:
            grad, parameter.grad = parameter.grad, None
            if grad is not None and not isinstance(grad, DTensor):  # FSDP leaves what has no dimensions alone
                dist.all_reduce(grad)
                grad /= self.world_size
            rows.grad = None if grad is None else local_rows(grad)

    def hand_over(self, names: Collection[str], take: Take | None) -> None:
        """From now on a backward hands over the gradients of these parameters, one of each rank and in their order, this rank's rows of
        them; they are not averaged. The others get none. All ranks do this at the same time, once.

        What FSDP would sum over the ranks is exchanged instead, which sends as much; so |g| and g^2 of each rank's micro-batch are known.
        """
        for name, parameter in self.replica.named_parameters():
            parameter.requires_grad_(name in names)
        if take is None or not names:
            return
        for module in self.replica.modules():
            if not isinstance(module, FSDPModule):
                continue
            module.unshard()  # makes the parameters that will have the gradients, once for all
            for name, parameter in self.replica.named_parameters():
                if name in names and not isinstance(parameter, DTensor) and name in self.shapes:
                    parameter.register_post_accumulate_grad_hook(partial(self._hand_over, name, take))
            module.reshard()

    def _hand_over(self, name: str, take: Take, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        take(name, self._exchanged(grad))

    def _exchanged(self, tensor: Tensor) -> Sequence[Tensor]:
        """This rank's rows of the tensors that all ranks have, in the order of the ranks."""
        row = tensor[0].numel()
        sent = [(stop - start) * row for start, stop in shares_of(len(tensor), self.size)]
        mine = sent[self.index]
        received = tensor.new_empty(self.size * mine)
        dist.all_to_all_single(received, tensor.contiguous().view(-1), [mine] * self.size, sent, group=self.group)
        return received.view(self.size, mine // row, *tensor.shape[1:]).unbind()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> None:
        """As torch's, over all ranks that hold the network."""
        # What every rank has whole counts once.
        counted = [rows for parameter, rows in self._pairs if isinstance(parameter, DTensor) or self.index == 0]
        grads = [rows.grad for rows in counted if rows.grad is not None]
        square = nn.utils.get_total_norm(grads).to(self.device).double() ** 2
        dist.all_reduce(square, group=self.group)
        nn.utils.clip_grads_with_norm_(self.rows.parameters(), max_norm, square.sqrt().float())

    # --- figures ------------------------------------------------------------------------------------------------------

    def nonfinite_parameter(self) -> str | None:
        """Name of the first parameter with NaN or Inf; the same on every rank."""
        named = dict(self.rows.named_parameters())
        finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return next((name for name, ok in zip(named, finite.tolist(), strict=True) if not ok), None)

    # --- rows and whole tensors ---------------------------------------------------------------------------------------

    def range(self, length: int) -> tuple[int, int]:
        """First row of this rank and the one after its last, of `length`."""
        return shares_of(length, self.size)[self.index]

    def cut(self, tensor: Tensor) -> Tensor:
        """A copy of this rank's rows of a whole tensor."""
        start, stop = self.range(len(tensor))
        return tensor[start:stop].clone()

    def spread(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The whole tensor of this shape of which each rank gives its rows, for collectives and checkpoints."""
        size = torch.Size(shape)
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, self.placements, run_check=False, shape=size, stride=stride)

    def empty(self, like: Tensor) -> Tensor:
        """A whole tensor of this shape and dtype, of which this rank has room for its rows."""
        start, stop = self.range(len(like))
        return self.spread(torch.empty(stop - start, *like.shape[1:], dtype=like.dtype, device=self.device), like.shape)

    def state_of(self, rows: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of a module like `rows`, one at a time on the CPU; all ranks take part."""
        for name, value in sorted(rows.state_dict().items()):
            if name in self.shapes:
                value = self.spread(value, self.shapes[name]).full_tensor()  # type: ignore[attr-defined]
            yield name, value.cpu()

    def spread_state(self, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """State of a training for a checkpoint: rows of parameters, and of what is kept for each, become parts of whole tensors.

        Args:
            names: of the optimizer's parameters, in its order.
        """

        def spread(name: str, value: Tensor) -> Tensor:
            start, stop = self.range(self.shapes[name][0])
            is_rows = value.shape == (stop - start, *self.shapes[name][1:])
            return self.spread(value, self.shapes[name]) if is_rows else value

        return self._each(state, names, spread)

    def take_state(self, state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The other way, with this rank's rows of what is whole, too: the training before may not have been sharded."""

        def take(name: str, value: Tensor) -> Tensor:
            if isinstance(value, DTensor):
                return local_rows(value)
            return self.cut(value) if value.shape == self.shapes[name] else value

        return self._each(state, names, take)

    def _each(
        self, state: Mapping[str, Any], names: Sequence[str], change: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Any]:
        """`state` with every tensor changed that stands under the name of a parameter in rows; the optimizer has numbers for names."""

        def walk(value: Any, name: str | None) -> Any:
            if isinstance(value, dict):
                return {key: walk(v, key if key in self.shapes else name) for key, v in value.items()}
            return change(name, value) if isinstance(value, Tensor) and name else value

        optimizer = state["optimizer"]
        moments = {n: walk({names[n]: values}, None)[names[n]] for n, values in optimizer["state"].items()}
        return {**walk(dict(state), None), "optimizer": {**optimizer, "state": moments}}


def gathered_anew(replica: nn.Module) -> None:
    """After a backward that broke off: without it FSDP would keep what was gathered. Does nothing to a network that is whole."""
    if isinstance(replica, FSDPModule):
        replica.reset_iter_state()  # type: ignore[attr-defined]


@torch.no_grad()
def local_rows(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank: the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


# --- values of a network ----------------------------------------------------------------------------------------------


Read = Callable[[str, Tensor, tuple[int, int] | None], Tensor]
"""(name, what it is for, rows or None for all) -> values on the CPU, in a storage of their own."""


@torch.no_grad()
def _fill_(model: nn.Module, place: Callable[[str, Tensor], Tensor]) -> None:
    """Put values where a skeleton has none; `place(name, empty)` gives them, for tied tensors once."""
    made: dict[int, Tensor] = {}
    state: dict[str, Any] = {}
    for name, empty in model.state_dict(keep_vars=True).items():
        if isinstance(empty, Tensor) and id(empty) not in made:
            values = place(name, empty)
            # A parameter, not a tensor: load_state_dict would make one for each name, and no longer one for all.
            is_parameter = isinstance(empty, nn.Parameter)
            made[id(empty)] = nn.Parameter(values, requires_grad=empty.requires_grad) if is_parameter else values
        state[name] = made.get(id(empty), empty)
    model.load_state_dict(state, assign=True)


@contextmanager
def _values(network: Network) -> Iterator[Read]:
    if isinstance(network, Stored):
        with artifacts.open_file(network.path) as file:
            yield _TensorFile(network.path, file, network.skeleton).read
    else:
        state = network.state_dict()
        yield lambda name, _, rows: (state[name] if rows is None else state[name][slice(*rows)]).cpu().clone()


def _aliases(skeleton: nn.Module) -> dict[str, list[str]]:
    """The names of each tensor of the network, by each of them."""
    found: dict[str, list[str]] = {}
    names: dict[int, list[str]] = {}
    for name, value in skeleton.state_dict(keep_vars=True).items():
        found[name] = names.setdefault(id(value), [])
        found[name].append(name)
    return found


def _by_any(names: Sequence[str], found: Mapping[str, Any]) -> Any:
    """What is found under one of these names, or None."""
    return next((found[name] for name in names if name in found), None)


def _require_shape(path: str, name: str, empty: Tensor, shape: Sequence[int] | None) -> None:
    if shape is None or list(shape) != list(empty.shape):
        found = "nothing" if shape is None else list(shape)
        raise ValueError(
            f"{path} holds {found} for {name} {list(empty.shape)}: it is of another network. Store the network anew."
        )


class _TensorFile:
    """A safetensors file of which single rows are read."""

    def __init__(self, path: str, file: Any, skeleton: nn.Module) -> None:
        self.path, self.file = path, file
        try:
            length = int.from_bytes(file.read(8), "little")
            self.header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise StorageError(f"{path} is no whole safetensors file ({error}). Remove it to make it anew.") from error
        self.start = 8 + length
        self.aliases = _aliases(skeleton)

    def read(self, name: str, empty: Tensor, rows: tuple[int, int] | None) -> Tensor:
        stored = _by_any(self.aliases[name], self.header)
        _require_shape(self.path, name, empty, None if stored is None else stored["shape"])
        assert stored is not None
        start, stop = rows or (0, len(empty) if empty.dim() else 1)
        shape = (stop - start, *empty.shape[1:]) if empty.dim() else ()
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[stored["dtype"]])
        row_bytes = (stored["data_offsets"][1] - stored["data_offsets"][0]) // max(1, len(empty) if empty.dim() else 1)
        self.file.seek(self.start + stored["data_offsets"][0] + start * row_bytes)
        self._read_into(tensor)
        return tensor.to(empty.dtype)

    def _read_into(self, tensor: Tensor) -> None:
        room = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
        while room:
            count = self.file.readinto(room)
            if not count:
                raise StorageError(
                    f"{self.path} ends too early: it is no whole safetensors file. Remove it to make it anew."
                )
            room = room[count:]


def write_result(path: str, sharded: Sharded, rows: nn.Module, metadata: Mapping[str, str], rank: int) -> None:
    """Write the state_dict of a module like `sharded.rows`, of whole tensors: gathered one by one, on all ranks; rank 0 writes."""
    about = {
        name: torch.empty(sharded.shapes.get(name, value.shape), dtype=value.dtype, device="meta")
        for name, value in sorted(rows.state_dict().items())
    }
    tensors = sharded.state_of(rows)
    try:
        if rank == 0:
            artifacts.write_parts(path, artifacts.streamed_tensors(about, tensors, metadata))
    finally:
        for _ in tensors:  # the other ranks; and rank 0 should its disk be full, as they go on and wait for it
            pass
