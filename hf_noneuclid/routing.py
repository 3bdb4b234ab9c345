"""Which parameter is a matrix.

A matrix is the weight of a linear map between hidden activations; everything else is a vector.
Ownership decides, not the name alone: the module that holds a tensor, every other module the same tensor is
tied to, and where that module stands in the model.
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
_PLURAL: dict[Kind, str] = {"matrix": "matrices", "vector": "vectors", "frozen": "frozen"}
# A module that holds a parameter, its path and the parameter's name in it; a tied parameter has several.
Place = tuple[nn.Module, str, str]

# Parameters that a module multiplies with itself instead of through an nn.Linear: routers and fused experts
# of transformers, in_proj_weight of nn.MultiheadAttention, weight_ih_l0 of nn.LSTM. Class tokens, position
# tables, scales and biases bear other names, and what bears an unknown name is safer among the vectors.
_LINEAR_NAME = re.compile(r"(\w+_)?(weight|proj|projection)|weight_[ih]h_l\d+(_reverse)?")
_NONLINEAR_CLASS = re.compile(r"norm|embed|position|relative", re.IGNORECASE)
# Only asked of transformers models that do not keep their heads apart from a base model, such as
# T5ForQuestionAnswering or CLIPForImageClassification.
_HEAD_NAME = re.compile(r"classifier|score|qa_outputs|(classification|lm|ctc|codec|itm)_heads?")
_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Route:
    """Where a parameter of `model.named_parameters()` goes and why; the shape is that before sharding."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    reason: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """One route a parameter, in the order of the model, tied ones once; `str` gives a table for the log."""

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

    def __str__(self) -> str:
        """One row a pattern of names (layer numbers are stars); frozen parameters only in the totals."""
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
    """Split the trainable parameters of a model into matrices and vectors.

    Only a transformers model tells its heads from its hidden layers (by its base model). In any other module
    every `nn.Linear` is a matrix, except what `get_output_embeddings()` returns. An adapter goes with what it
    adapts: LoRA's A and B are matrices in the hidden layers, vectors on an embedding or a head.

    Args:
        model: any module, bare or wrapped (PEFT, DDP, FSDP2, DeepSpeed); not FSDP1.
        vector_norm: norm of the vectors: "linf", "ada_linf" or "ada_l2".
        weight_decay: decoupled weight decay, a rate relative to the learning rate.
        decay_parameters: names of the parameters that are decayed; None for all of them.
        target_modules: overrides the choice, as `optim_target_modules` of the Trainer: names of modules or
            parts of them, or one regular expression for a whole name, or "all-linear". The matrices are the
            parameters with two dimensions or more of the modules that match, whatever else they may be.
        matrix_lr_scale: what the learning rate of the matrices is multiplied by.

    Returns:
        The non-empty parameter groups: "params" (pairs of name and parameter), "norm", "weight_decay" and
        "lr_scale". Weights of convolutions stand in groups of their own with "flatten": True, to be stepped
        as shape[0] x rest. And the table of what went where.

    Raises:
        ValueError: no parameter is a matrix, a target matches nothing, or the model is wrapped by FSDP1.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
        >>> groups, table = route_parameters(model)
        >>> [(group["norm"], [name for name, _ in group["params"]]) for group in groups]
        [('spectral', ['1.weight']), ('ada_l2', ['0.weight', '1.bias'])]
    """
    _refuse_fsdp1(model)
    places = _places(model)
    outside = _outside_hidden_layers(model)
    chosen = None if target_modules is None else _chosen(model, target_modules)
    named = dict(model.named_parameters())
    table = RoutingTable(
        tuple(
            Route(name, full_shape(parameter), *classify(parameter, places[id(parameter)], outside, chosen))
            for name, parameter in named.items()
        )
    )
    if not table.matrices:
        raise ValueError(_no_matrices(model, table))

    decayed = frozenset(named if decay_parameters is None else decay_parameters)
    groups: dict[tuple[Kind, bool, bool], dict[str, Any]] = {}
    for route in table.matrices + table.vectors:
        is_matrix, decays = route.kind == "matrix", route.name in decayed
        holders = (module for module, _, _ in places[id(named[route.name])])
        flatten = is_matrix and any(isinstance(holder, _ConvNd) for holder in holders)
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
    parameter: Tensor, places: Sequence[Place], outside: Mapping[int, str], chosen: Collection[int] | None
) -> tuple[Kind, str]:
    """Kind of a parameter and the reason, by the first rule that applies.

    Args:
        parameter: what to classify.
        places: every module that holds it.
        outside: ids of the parameters that are no hidden weights, and why.
        chosen: ids of the parameters the user wants as matrices; None leaves it to the rules.
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
    if all(reasons := [_linear_map(place, ndim) for place in places]):
        return "matrix", reasons[0]
    return "vector", "not a known linear map"


def _linear_map(place: Place, ndim: int) -> str:
    """What kind of linear map a parameter is the weight of in this place; "" if of none."""
    module, path, leaf = place
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
    """Parameters (by identity, so that tied ones are found) that are no hidden weights, and why."""
    reasons: dict[int, str] = {}
    for module in model.modules():
        for reason, parameters in _no_hidden_weights(module):
            for parameter in parameters:
                reasons.setdefault(id(parameter), reason)
    return reasons


def _no_hidden_weights(module: nn.Module) -> Iterator[tuple[str, Iterable[Tensor]]]:
    adapted = getattr(module, "base_layer", module)  # what an adapter of PEFT wraps
    if isinstance(adapted, nn.Embedding | nn.EmbeddingBag):
        yield "embedding", module.parameters()
    # Vision models return the projection of their patches here, a convolution and so a matrix.
    entry = _call(module, "get_input_embeddings")
    if entry is not None and not isinstance(entry, _ConvNd):
        yield "input embedding", entry.parameters(recurse=False)
    if (exit_ := _call(module, "get_output_embeddings")) is not None:
        yield "output embedding", exit_.parameters()
    yield "head outside the base model", _head_parameters(module, entry)


def _call(module: nn.Module, getter: str) -> nn.Module | None:
    try:
        result = getattr(module, getter)()
    except (AttributeError, NotImplementedError):  # transformers raises both for a model without any
        return None
    return result if isinstance(result, nn.Module) else None


def _head_parameters(module: nn.Module, entry: nn.Module | None) -> list[Tensor]:
    """What a transformers model, alone or inside of something larger, has beside its base model."""
    # Asked of the class: PEFT and other wrappers pass attributes they lack on to the model they wrap.
    prefix = getattr(type(module), "base_model_prefix", None)
    if prefix is None:
        return []
    base = getattr(module, prefix, None) if prefix else None
    inside = {id(p) for p in base.parameters()} if isinstance(base, nn.Module) else set()
    # In DINOv3ViTModel that name is the stack of layers alone; a base model has the input embeddings, too.
    if inside and (entry is None or all(id(p) in inside for p in entry.parameters())):
        return [p for p in module.parameters() if id(p) not in inside]
    heads = (child for name, child in module.named_children() if _HEAD_NAME.fullmatch(name))
    return [p for head in heads for p in head.parameters()]


def _chosen(model: nn.Module, target_modules: str | Sequence[str]) -> set[int]:
    whole_name = isinstance(target_modules, str)
    chosen: set[int] = set()
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
        exits = (_call(module, "get_output_embeddings") for module in model.modules())
        matched -= {id(p) for exit_ in exits if exit_ is not None for p in exit_.parameters()}
    return matched


def _places(model: nn.Module) -> dict[int, list[Place]]:
    places: defaultdict[int, list[Place]] = defaultdict(list)
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places[id(parameter)].append((module, path, leaf))
    return places


def _refuse_fsdp1(model: nn.Module) -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__}: FSDP1 (FullyShardedDataParallel) flattens the parameters it wraps and "
            "leaves no matrix to orthogonalise; use FSDP2 (fsdp_version: 2)"
        )


def _no_matrices(model: nn.Module, table: RoutingTable) -> str:
    reasons = Counter(route.reason for route in table.routes).most_common()
    return (
        f"{type(model).__name__} has no trainable matrix; its {len(table.routes)} parameters are: "
        f"{', '.join(f'{count} x {reason}' for reason, count in reasons) or 'none'}. Name the modules whose "
        "weights are matrices with optim_target_modules (target_modules), or unfreeze some"
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
