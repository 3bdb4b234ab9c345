"""Which parameter is a matrix.

A matrix is the weight of a linear map between hidden activations; everything else is a vector.
The module that holds a tensor decides, not the name alone: its class, every other module that the tensor is
tied to, and where the module stands in the model.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Kind = Literal["matrix", "vector", "frozen"]
NO_MATRIX = "none"
"""As target modules: no parameter is a matrix."""

_PLURAL: dict[Kind, str] = {"matrix": "matrices", "vector": "vectors", "frozen": "frozen"}
# A module that holds a parameter, the path of the module, and the name of the parameter in it.
Holder = tuple[nn.Module, str, str]

# Matrices that a module holds itself instead of in an nn.Linear: routers and fused experts of transformers,
# in_proj_weight of nn.MultiheadAttention, weight_ih_l0 of nn.LSTM. Class tokens, position tables, scales and
# biases have other names. A parameter with an unknown name is safer among the vectors.
_LINEAR_NAME = re.compile(r"(\w+_)?(weight|proj|projection)|weight_[ih]h_l\d+(_reverse)?")
_NONLINEAR_CLASS = re.compile(r"norm|embed|position|relative", re.IGNORECASE)
# Needed only for transformers models whose heads are not apart from a base model, such as
# T5ForQuestionAnswering and CLIPForImageClassification.
_HEAD_NAME = re.compile(r"classifier|score|qa_outputs|(classification|lm|ctc|codec|itm)_heads?")
_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Route:
    """Where a parameter of ``model.named_parameters()`` goes, and why. Its shape is that before sharding."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    reason: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """A route for each parameter, in the order of the model, tied ones once; ``str`` gives a table."""

    routes: tuple[Route, ...]

    @property
    def matrices(self) -> tuple[Route, ...]:
        return self._of("matrix")

    @property
    def vectors(self) -> tuple[Route, ...]:
        return self._of("vector")

    @property
    def frozen(self) -> tuple[Route, ...]:
        return self._of("frozen")

    @property
    def counts(self) -> dict[Kind, tuple[int, int]]:
        """Tensors and elements of each kind."""
        return {kind: (len(self._of(kind)), sum(r.elements for r in self._of(kind))) for kind in _PLURAL}

    def _of(self, kind: Kind) -> tuple[Route, ...]:
        return tuple(route for route in self.routes if route.kind == kind)

    @property
    def summary(self) -> str:
        """A line for each kind: how many there are, and the three patterns of names with most elements."""
        lines = []
        for kind, (n, size) in self.counts.items():
            patterns = Counter((_LAYER_NUMBER.sub("*", r.name), r.shape) for r in self._of(kind))
            largest = sorted(patterns.items(), key=lambda x: -x[1] * math.prod(x[0][1]))[:3]
            examples = ", ".join(f"{count} x {name} {shape}" for (name, shape), count in largest)
            lines += [f"{_PLURAL[kind]}: {n} tensors, {size:,} elements, such as {examples}"] if n else []
        return "\n".join(lines)

    def __str__(self) -> str:
        """A row for each pattern of names, with stars for layer numbers; frozen ones only in the totals."""
        trainable = (route for route in self.routes if route.kind != "frozen")
        patterns = Counter((_LAYER_NUMBER.sub("*", r.name), r.shape, r.kind, r.reason) for r in trainable)
        cells = [(name, str(shape), f"x{n}", kind, why) for (name, shape, kind, why), n in patterns.items()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        totals = [
            f"{_PLURAL[kind]}: {n} tensors, {size:,} elements" for kind, (n, size) in self.counts.items()
        ]
        return "\n".join([*rows, "; ".join(totals)])


def route_parameters(
    model: nn.Module,
    *,
    vector_norm: str = "ada_l2",
    weight_decay: float = 0.0,
    decay_parameters: Collection[str] | None = None,
    target_modules: str | Sequence[str] | None = None,
    matrix_lr_scale: float = 1.0,
) -> tuple[list[dict[str, Any]], RoutingTable]:
    """Splits the trainable parameters of a model into matrices and vectors.

    Only a transformers model tells its heads from its hidden layers, by its base model. In any other module
    every ``nn.Linear`` is a matrix, except what ``get_output_embeddings()`` returns. An adapter goes with
    what it adapts: LoRA's A and B are matrices in the hidden layers, vectors on an embedding or a head.

    Args:
        model: Any module, bare or wrapped (PEFT, DDP, FSDP2, DeepSpeed), except FSDP1.
        vector_norm: Norm of the vectors: ``linf``, ``ada_linf`` or ``ada_l2``.
        weight_decay: Decoupled weight decay λ.
        decay_parameters: Names of the parameters that decay; None for all of them.
        target_modules: Overrides the choice, like ``optim_target_modules`` of the Trainer: names of modules
            or parts of them, or one regular expression for a whole name, or ``all-linear``. Every parameter
            with two dimensions or more that a matching module holds is a matrix then. ``none`` makes every
            parameter a vector.
        matrix_lr_scale: Multiplies the learning rate of the matrices.

    Returns:
        The parameter groups that are not empty, and the table of what went where. A group has ``params``
        (pairs of name and parameter), ``norm``, ``weight_decay`` and ``lr_scale``. Weights of convolutions
        are in groups of their own with ``flatten``, which makes them matrices of shape[0] rows.

    Raises:
        ValueError: No parameter is a matrix, a target matches nothing, or the model is wrapped by FSDP1.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        >>> groups, table = route_parameters(model)
        >>> [(group["norm"], [name for name, _ in group["params"]]) for group in groups]
        [('spectral', ['1.weight']), ('ada_l2', ['0.weight', '1.bias'])]
    """
    _refuse_fsdp1(model)
    holders = _holders(model)
    outside = _outside_hidden_layers(model)
    chosen = None if target_modules is None else _chosen(model, target_modules)
    named = dict(model.named_parameters())
    table = RoutingTable(
        tuple(
            Route(name, full_shape(parameter), *classify(parameter, holders[id(parameter)], outside, chosen))
            for name, parameter in named.items()
        )
    )
    if not table.matrices and not (target_modules == NO_MATRIX and table.vectors):
        raise ValueError(_no_matrices(model, table))

    decayed = frozenset(named if decay_parameters is None else decay_parameters)
    groups: dict[tuple[Kind, bool, bool], dict[str, Any]] = {}
    for route in table.matrices + table.vectors:
        is_matrix, decays = route.kind == "matrix", route.name in decayed
        modules = [module for module, _, _ in holders[id(named[route.name])]]
        flatten = is_matrix and any(isinstance(module, _ConvNd) for module in modules)
        norm, lr_scale = ("spectral", matrix_lr_scale) if is_matrix else (vector_norm, 1.0)
        decay = weight_decay if decays else 0.0
        empty = {"params": [], "norm": norm, "weight_decay": decay, "lr_scale": lr_scale}
        group = groups.setdefault(
            (route.kind, flatten, decays), empty | ({"flatten": True} if flatten else {})
        )
        group["params"].append((route.name, named[route.name]))
    return list(groups.values()), table


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape before it is split: under DeepSpeed ZeRO-3 the tensor is empty and one-dimensional."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def classify(
    parameter: Tensor, holders: Sequence[Holder], outside: Mapping[int, str], chosen: Collection[int] | None
) -> tuple[Kind, str]:
    """The kind of a parameter and the reason, by the first rule that applies.

    Args:
        parameter: What to classify.
        holders: Every module that holds it; a tied parameter has several.
        outside: Ids of the parameters that are not hidden weights, and why.
        chosen: Ids of the parameters that the user chose as matrices; None leaves it to the rules.
    """
    ndim = len(full_shape(parameter))
    if not parameter.requires_grad:
        return "frozen", "does not require a gradient"
    if ndim < 2:
        return "vector", "fewer than two dimensions"
    if chosen is not None:
        return ("matrix", "target module") if id(parameter) in chosen else ("vector", "not a target module")
    if id(parameter) in outside:
        return "vector", outside[id(parameter)]
    if all(reasons := [_linear_map(holder, ndim) for holder in holders]):
        return "matrix", reasons[0]
    return "vector", "not a known linear map"


def _linear_map(holder: Holder, ndim: int) -> str:
    """The kind of linear map whose weight a module holds in a parameter; "" if it is not one."""
    module, path, leaf = holder
    if isinstance(module, _ConvNd):
        return "convolution" if leaf == "weight" else ""
    if _is_linear(module):
        return "linear map" if leaf == "weight" and ndim == 2 else ""
    if ndim == 2 and path.endswith((".lora_A", ".lora_B")):  # AdaLoRA keeps them in ParameterDicts
        return "low-rank adapter"
    if not _LINEAR_NAME.fullmatch(leaf) or _NONLINEAR_CLASS.search(type(module).__name__):
        return ""
    # A router of experts counts too: a linear map from hidden activations to one logit an expert.
    return {2: "linear map", 3: "stack of linear maps"}.get(ndim, "")


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is known by its name, since transformers need not be installed.
    return isinstance(module, nn.Linear) or any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _outside_hidden_layers(model: nn.Module) -> dict[int, str]:
    """Ids of the parameters that are not hidden weights, and why. The ids find tied parameters, too."""
    reasons: dict[int, str] = {}
    for module in model.modules():
        for reason, parameters in _not_hidden(module):
            for parameter in parameters:
                reasons.setdefault(id(parameter), reason)
    return reasons


def _not_hidden(module: nn.Module) -> Iterator[tuple[str, Iterable[Tensor]]]:
    adapted = getattr(module, "base_layer", module)  # what an adapter of PEFT wraps
    if isinstance(adapted, nn.Embedding | nn.EmbeddingBag):
        yield "embedding", module.parameters()
    # Vision models return the projection of their patches here, a convolution, which is a matrix.
    input_embeddings = _call(module, "get_input_embeddings")
    if input_embeddings is not None and not isinstance(input_embeddings, _ConvNd):
        yield "input embedding", input_embeddings.parameters(recurse=False)
    if (output_embeddings := _call(module, "get_output_embeddings")) is not None:
        yield "output embedding", output_embeddings.parameters()
    yield "head outside the base model", _head_parameters(module, input_embeddings)


def _call(module: nn.Module, getter: str) -> nn.Module | None:
    try:
        result = getattr(module, getter)()
    except (AttributeError, NotImplementedError):  # transformers raises both for a model without any
        return None
    return result if isinstance(result, nn.Module) else None


def _head_parameters(module: nn.Module, input_embeddings: nn.Module | None) -> list[Tensor]:
    """What a transformers model has beside its base model; the model may be part of a larger one."""
    # The class is asked: wrappers such as PEFT pass attributes that they lack on to the model they wrap.
    prefix = getattr(type(module), "base_model_prefix", None)
    if prefix is None:
        return []
    base = getattr(module, prefix, None) if prefix else None
    inside = {id(p) for p in base.parameters()} if isinstance(base, nn.Module) else set()
    # In DINOv3ViTModel that name is only the stack of layers; a base model has the input embeddings, too.
    if inside and (input_embeddings is None or all(id(p) in inside for p in input_embeddings.parameters())):
        return [p for p in module.parameters() if id(p) not in inside]
    heads = (child for name, child in module.named_children() if _HEAD_NAME.fullmatch(name))
    return [p for head in heads for p in head.parameters()]


def _chosen(model: nn.Module, target_modules: str | Sequence[str]) -> set[int]:
    whole_name = isinstance(target_modules, str)
    chosen: set[int] = set()
    if target_modules == NO_MATRIX:
        return chosen
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        if not (matched := _targeted(model, target, whole_name=whole_name)):
            raise ValueError(_no_target(model, target))
        chosen |= matched
    return chosen


def _targeted(model: nn.Module, target: str, *, whole_name: bool) -> set[int]:
    """Parameters with two dimensions or more that stand directly on the modules a target matches."""
    all_linear = whole_name and target.replace("_", "-") == "all-linear"
    matched: set[int] = set()
    for path, module in model.named_modules():
        named = (not whole_name and target in path) or re.fullmatch(target, path) is not None
        if _is_linear(module) if all_linear else named:
            matched |= {id(p) for p in module.parameters(recurse=False) if len(full_shape(p)) >= 2}
    if all_linear:
        heads = [_call(module, "get_output_embeddings") for module in model.modules()]
        matched -= {id(p) for head in heads if head is not None for p in head.parameters()}
    return matched


def _holders(model: nn.Module) -> dict[int, list[Holder]]:
    """The holders of each parameter, by its identity."""
    holders: defaultdict[int, list[Holder]] = defaultdict(list)
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders[id(parameter)].append((module, path, leaf))
    return holders


def _refuse_fsdp1(model: nn.Module) -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__}: FSDP1 (FullyShardedDataParallel) flattens the parameters it wraps and "
            "no matrices remain; use FSDP2 (fsdp_version: 2)"
        )


def _no_matrices(model: nn.Module, table: RoutingTable) -> str:
    reasons = Counter(route.reason for route in table.routes).most_common()
    return (
        f"{type(model).__name__} has no trainable matrix; its {len(table.routes)} parameters are: "
        f"{', '.join(f'{count} x {reason}' for reason, count in reasons) or 'none'}. Name the modules whose "
        "weights are matrices with optim_target_modules (target_modules), say 'none' there to step all as "
        "vectors, or unfreeze parameters"
    )


def _no_target(model: nn.Module, target: str) -> str:
    examples = dict.fromkeys(
        _LAYER_NUMBER.sub("*", path)
        for path, module in model.named_modules()
        if any(len(full_shape(parameter)) >= 2 for parameter in module.parameters(recurse=False))
    )
    return (
        f"optim_target_modules: {target!r} matches no module of {type(model).__name__} that has a parameter "
        f"of two dimensions or more, such as {', '.join(list(examples)[:12])} (* is a layer number)"
    )
