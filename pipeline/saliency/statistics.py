"""Statistics of the saliency pass: additive sums over rows, from which every criterion is computed afterwards.

# N = rows of a micro-batch, C = channels of a group, K = entries of one channel, F = input features of a contraction
# A = channels of all groups, side by side in the order of the graph, then the residual blocks that can go, one each

A channel gate multiplies a channel by 1 where the network reads it; the gradient at the gate of row n is
s[n, c] = sum x * dL/dx over the channel's entries at *all* its consumers, which is the first-order change of that row's loss when
the channel is cut. Gates sit at the consumers and not at the producers, because that is where a cut acts: biases, squeeze-and-excite
factors and activations without s(0) = 0 on the way are then accounted for exactly. The sum over consumers comes before abs and square.

A block's gate multiplies its branches by 1 where they enter their sums: s[n] = sum branch * dL/dbranch over all elements and branches.

No weight gradient is needed, so the pass is cheaper than a training step. The loss is summed over rows, never averaged: nothing
depends on the batch.

On request the same pass keeps the gradients of every weight that is multiplied, and moments of what it is multiplied with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pipeline.models import calls
from pipeline.models.calls import in_calls
from pipeline.models.graph import Branch, Graph, Site
from pipeline.models.modes import eval_mode
from pipeline.models.sharding import Network, Stored, Take, gathered_anew, local_rows
from pipeline.models.task import CHECKED_ROWS, Place, Task, add_, hand_over

GATE_KINDS = ("gate_sum", "gate_abs", "gate_square", "gate_fourth")
WEIGHT_KINDS = ("grad_sum", "grad_abs", "grad_square")
INPUT_KINDS = ("input_sum", "input_square", "input_count")
TRAINING_KINDS = ("movement", "gate_open")
"""Counted while a network is trained (training.policy): no pass over the data gives them."""

HALF = (torch.float16, torch.bfloat16)

Tap = Callable[[Tensor, Tensor], None]
SiteOf = tuple[str, int, Site | Branch]
"""Group, position among its consumers, and the consumer; of a block its key and branches."""


class SaliencyError(ValueError):
    """The network does not have per-row gradients at its gates; the message names the group and the way out."""


class _Gate(torch.autograd.Function):
    """Identity forward; backward shows the input and its gradient to `tap`. Costs no multiplication in the forward pass.

    copy: what it was given may be written into afterwards; given_away: what it returns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tap, copy: bool, given_away: bool) -> Tensor:
        out = x.clone() if copy or given_away else x.view_as(x)
        ctx.save_for_backward(x if given_away else out)
        ctx.tap = tap
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.tap(x, grad)
        return grad, None, None, None


def gate_terms(x: Tensor, grad: Tensor, axis: int | None) -> Tensor:
    """s per entry of the first axis and feature: x * dL/dx summed over all other axes; float64 [len(x), F]. No axis: F is 1."""
    if x.dtype in HALF:
        x, grad = x.float(), grad.float()
    product = x * grad
    if axis is None:
        return product.reshape(len(product), -1).sum(1, keepdim=True).double()
    other = [dim for dim in range(1, x.dim()) if dim != axis % x.dim()]
    return (product.sum(dim=other) if other else product).double()


class GateStatistics(Task):
    """Gates of every group and block for each row of a micro-batch; on request gradients and inputs of every weight.

    Args:
        network: the dense one; evaluated with its running statistics, since a row's saliency must not depend on its neighbours.
        graph: its channel groups and the weights that are multiplied.
        weights: also sum g, |g| and g^2 over micro-batches, per weight; g is the gradient of the micro-batch's summed loss. Since w
            does not change during the pass, sums of |g*w| and (g*w)^2 follow from them.
        inputs: also sum x and x^2 of each input feature of each convolution and linear layer, over rows and positions.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3 (gates); per-row squares:
    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018.
    """

    nested = frozenset({*GATE_KINDS, "rows"})
    """Sums that are also kept over every 2nd, 4th ... unit, to see how they settle."""

    def __init__(self, network: Network, graph: Graph, *, weights: bool = False, inputs: bool = False) -> None:
        self.network = network
        self.graph = graph
        self.weights = weights
        self.inputs = inputs
        sizes = tuple(graph.scored().values())
        self.segments: Mapping[str, tuple[int, ...]] = {kind: sizes for kind in GATE_KINDS} if sizes else {}
        """Groups differ in scale: each has a grid of its own."""
        self.model: nn.Module
        """The network where it was placed."""
        self._copy = False  # gates hand on copies, for networks that write into a consumer's input afterwards
        self._terms_NA = torch.empty(0)
        self._terms: dict[str, Tensor] = {}  # group -> its columns of _terms_NA
        self._inputs: dict[str, Tensor] = {}
        self._tapped: set[str] = set()
        self._parameters: dict[str, nn.Parameter] = {}  # whose gradients are summed
        self._weight_sums: dict[str, Tensor] = {}  # over the micro-batches since `collect`
        self._indices: dict[tuple[str, int], Tensor] = {}

    def place(self, place: Place) -> None:
        skeleton = self.network.skeleton if isinstance(self.network, Stored) else self.network
        names = multiplied(skeleton, self.graph) if self.weights else {}
        self.model = place(self.network, names, self._add_gradients)
        self._parameters = {name: p for name, p in self.model.named_parameters() if name in names}
        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        self._indices = {
            (name, i): (site.index_CK if isinstance(site, Site) else torch.zeros(1, 1, dtype=torch.int64)).to(device)
            for name, sites in self.graph.gates().items()
            for i, site in enumerate(sites)
        }

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """Sums over the rows: "gate_*" float64 [A], "input_*/<tensor>" float64 [F] and int64 for the count, "loss" float64, "rows" int64.

        Raises:
            SaliencyError: no gradient reaches a gate.
        """
        loss = self._run(images_NCHW, labels_N)
        sums: dict[str, Tensor] = {"rows": torch.tensor(len(labels_N), dtype=torch.int64), "loss": loss.double()}
        if self.segments:
            square_NA = self._terms_NA.square()
            sums["gate_sum"] = self._terms_NA.sum(0)
            sums["gate_abs"] = self._terms_NA.abs().sum(0)
            sums["gate_square"] = square_NA.sum(0)
            sums["gate_fourth"] = square_NA.square().sum(0)
        sums.update(self._inputs)
        return sums

    def collect(self) -> dict[str, Tensor]:
        """ "grad_*/<tensor>" like the weight; zeros where no backward has come by."""
        sums, self._weight_sums = self._weight_sums, {}
        for kind, (name, parameter) in product(WEIGHT_KINDS, self._parameters.items()):
            if f"{kind}/{name}" not in sums:
                rows = local_rows(parameter)
                sums[f"{kind}/{name}"] = torch.zeros_like(rows, dtype=torch.float32 if rows.dtype in HALF else None)
        return sums

    def idle(self, image_1CHW: Tensor) -> None:
        """A row whose loss is zero: so are the gradients that are exchanged."""
        ignored = -100
        self._run(image_1CHW, torch.full((1,), ignored, device=image_1CHW.device))

    def _run(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """Forward and backward: fills the terms of every group, returns the summed loss."""
        try:
            loss = self._backward(images_NCHW, labels_N)
        except RuntimeError as error:
            if self._copy or "inplace" not in str(error):
                raise
            self._copy = True
            self._weight_sums.clear()  # this network's first backward: nothing else is in there
            gathered_anew(self.model)
            loss = self._backward(images_NCHW, labels_N)
        for name, sites in self.graph.gates().items():
            if name not in self._tapped:
                raise SaliencyError(
                    f"no gradient reaches any consumer of group '{name}' ({', '.join(site.module for site in sites)}): it "
                    "runs under no_grad, behind detach() or in a reentrant checkpoint, and its saliency would be a silent 0. "
                    "Take that out for scoring (checkpoint: use_reentrant=False), or freeze the group with Graph.without."
                )
        return loss

    def _backward(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        sizes = self.graph.scored()
        self._terms_NA = torch.zeros(len(labels_N), sum(sizes.values()), dtype=torch.float64, device=images_NCHW.device)
        views = self._terms_NA.split([*sizes.values()], dim=1) if sizes else ()
        self._terms = dict(zip(sizes, views, strict=True))
        self._tapped, self._inputs = set(), {}
        with torch.enable_grad(), self._watching():
            logits = self.model(images_NCHW)
            logits = logits.float() if logits.dtype in HALF else logits
            loss = F.cross_entropy(logits, labels_N, reduction="sum")
            if loss.requires_grad:
                loss.backward()
        return loss.detach()

    def check(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        """A few rows together must give what they give alone: else the first axis of a consumer is not the rows'.

        Raises:
            SaliencyError: the gates of this network do not tell rows apart.
        """
        self._run(images_NCHW, labels_N)
        together = self._terms
        alone: dict[str, list[Tensor]] = {}
        for n in range(len(labels_N)):
            self._run(images_NCHW[n : n + 1], labels_N[n : n + 1])
            for name, terms_NC in self._terms.items():
                alone.setdefault(name, []).append(terms_NC)
        self._weight_sums.clear()
        narrow = next(self.model.parameters()).dtype in HALF
        for name, terms_NC in together.items():
            expected_NC = torch.cat(alone[name])
            # Not the largest difference: a value that rounds to the other side of a ReLU changes a few terms by a percent.
            if (terms_NC - expected_NC).norm() > (0.3 if narrow else 0.05) * expected_NC.norm() + 1e-12:
                raise SaliencyError(
                    f"group '{name}': {len(labels_N)} rows together give other gradients at its gates than each alone. Either rows "
                    "influence each other in this network, or they are not the first axis of what its consumers read. "
                    "Give the network batch-first inputs, or freeze the group with Graph.without."
                )

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside, one hook per consumer module, whichever groups it reads; a mode for the calls that modules make by themselves."""
        taps: dict[str, list[SiteOf]] = {}
        gated: dict[calls.Place, dict[int, list[SiteOf]]] = {}
        for name, sites in self.graph.gates().items():
            for i, site in enumerate(sites):
                if site.call is None:
                    taps.setdefault(site.module, []).append((name, i, site))
                else:
                    call, operand, function = site.call
                    gated.setdefault((site.module, call, function), {}).setdefault(operand, []).append((name, i, site))
        handles = []
        try:
            with in_calls(self.model, gated, self._gated):
                for name, own in taps.items():
                    handles.append(self.model.get_submodule(name).register_forward_pre_hook(self._hook(own)))
                for name, module in contractions(self.model, self.graph).items() if self.inputs else ():
                    handles.append(module.register_forward_pre_hook(_input_hook(name, self._inputs)))
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _gated(self, x: Tensor, sites: list[SiteOf]) -> Tensor:
        """x behind a gate that adds its terms to the groups whose channels end here."""
        site = sites[0][2]
        axis = site.axis if isinstance(site, Site) else None

        def tap(x: Tensor, grad: Tensor) -> None:
            terms_NF = self._by_row(gate_terms(x, grad, axis), sites[0])
            for group, i, _ in sites:
                self._terms[group] += terms_NF[:, self._indices[group, i]].sum(-1)
                self._tapped.add(group)

        if not x.requires_grad:  # below the first gate nothing needs a gradient: start the tape here
            x = x.detach().requires_grad_()
        # A sum writes into its branch as often as not: `out += x`.
        return _Gate.apply(x, tap, self._copy, isinstance(site, Branch))  # type: ignore[no-any-return]

    def _hook(self, sites: list[SiteOf]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            with torch._C.DisableTorchFunction():
                return (self._gated(args[0], sites), *args[1:])

        return hook

    def _by_row(self, terms: Tensor, site: SiteOf) -> Tensor:
        """[rows * k, F] -> [rows, F]: windows and patches that were folded into the batch belong to their row."""
        group = site[0]
        num_rows = len(self._terms[group])
        if len(terms) % num_rows:
            raise SaliencyError(
                f"group '{group}': {site[2].module} reads {len(terms)} entries for {num_rows} rows, so rows are not its first axis. "
                "Give the network batch-first inputs, or freeze the group with Graph.without."
            )
        return terms if len(terms) == num_rows else terms.reshape(num_rows, -1, terms.shape[1]).sum(1)

    @torch.no_grad()
    def _add_gradients(self, name: str, grads: Sequence[Tensor]) -> None:
        """Each is the gradient of a micro-batch."""
        for grad in grads:
            grad = grad.float() if grad.dtype in HALF else grad
            for kind, value in zip(WEIGHT_KINDS, (grad, grad.abs(), grad.square()), strict=True):
                add_(self._weight_sums, {f"{kind}/{name}": value.clone() if value._is_view() else value})


def multiplied(model: nn.Module, graph: Graph) -> dict[str, nn.Parameter]:
    """The weights that are multiplied (of convolutions, linear layers and the like), by name."""
    tensors = {contraction.tensor for contraction in graph.contractions}
    return {name: parameter for name, parameter in model.named_parameters() if name in tensors}


def contractions(model: nn.Module, graph: Graph) -> dict[str, nn.Module]:
    """Convolutions and linear layers by the name of their weight."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = dict(model.named_modules())
    owners = {name: modules[name.rpartition(".")[0]] for name in multiplied(model, graph)}
    return {name: owner for name, owner in owners.items() if isinstance(owner, layers) and name.endswith("weight")}


def _input_hook(name: str, sums: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        with torch._C.DisableTorchFunction():  # what a hook calls is no call of the network's
            x = args[0].detach()
            x = x.float() if x.dtype in HALF else x
            axis = x.dim() - 1 if isinstance(module, nn.Linear) else 1
            other = [dim for dim in range(x.dim()) if dim != axis]
            count = torch.tensor(x.numel() // x.shape[axis], dtype=torch.int64)
            moments = (x.sum(other).double(), x.square().sum(other).double(), count)
            for kind, value in zip(INPUT_KINDS, moments, strict=True):
                key = f"{kind}/{name}"
                sums[key] = sums[key] + value if key in sums else value  # a module may be called twice

    return hook


def by_group(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics as criteria read them: "gate_abs" [A] becomes "gate_abs/<group>" [C], "gate_abs@2" "gate_abs@2/<group>"."""
    sizes = graph.scored()
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.partition("@")[0] in GATE_KINDS:
            parts = value.split([*sizes.values()])
            found |= {f"{name}/{key}": part.clone() for key, part in zip(sizes, parts, strict=True)}
        else:
            found[name] = value
    return found


def at_stride(statistics: Mapping[str, Tensor], stride: int) -> dict[str, Tensor]:
    """Those over every `stride`-th unit, under the names of those over all units."""
    suffix = re.compile(rf"@{stride}(?=/|$)")
    return {suffix.sub("", name): value for name, value in statistics.items() if suffix.search(name)}


def accumulate(
    model: nn.Module,
    graph: Graph,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    weights: bool = False,
    inputs: bool = False,
) -> dict[str, Tensor]:
    """Statistics of `batches` of (images_NCHW, labels_N) in this process, in their order. The model is left as it was."""
    grads = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    device = next(model.parameters()).device
    task = GateStatistics(model, graph, weights=weights, inputs=inputs)
    handles: list[RemovableHandle] = []
    sums: dict[str, Tensor] = {}

    def in_its_place(network: Network, names: Collection[str] = (), take: Take | None = None) -> nn.Module:
        model.eval().requires_grad_(False)
        if take is not None:
            handles.extend(hand_over(model, names, take))
        return model

    try:
        for p in model.parameters():
            p.grad = None
        with eval_mode(model):
            task.place(in_its_place)
            checked = False
            for images, labels in ((images.to(device), labels.to(device)) for images, labels in batches):
                if not checked and len(labels) > 1:
                    task.check(images[:CHECKED_ROWS], labels[:CHECKED_ROWS])
                    checked = True
                add_(sums, task(images, labels))
            sums |= task.collect()
    finally:
        for handle in handles:
            handle.remove()
        for name, p in model.named_parameters():
            p.requires_grad_(grads[name][0])
            p.grad = grads[name][1]
    return by_group(graph, {name: value.cpu() for name, value in sums.items()})
