"""The graph of a network: its nodes and shapes, the default layer, its stages, pooling, and truncation after the embedded layers.

Nodes are named as in `torchvision.models.feature_extraction`: by the path of the module, or of the operation in it.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp

from pipeline.config import BackboneConfig, guess
from pipeline.errors import BackboneError, first_line
from pipeline.io.process import is_out_of_memory
from pipeline.io.vision import torchvision

logger = logging.getLogger(__name__)

PENULTIMATE = "penultimate"

UNPOOLED = "unpooled"
"""The layer of a timm network that is the input of its own pooling: the tokens after the last norm, or the last map."""

POOLED = "pooled"
"""The layer of a network's own feature, if it defines one (timm); for other networks the feature is the classifier's input."""

GRID = 3
"""Number of cells of `pooling: grid` along each side of the image."""


# ---- nodes


class Taps(nn.Module):
    """An untraced network that returns the outputs of some of its modules, None for a module that does not run."""

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.network, self._layers = network, layers

    def forward(self, images: torch.Tensor) -> tuple[Any, ...]:
        """Return the layers' outputs, of any shape and dtype, for images of the network's dtype, shape (n, 3, height, width)."""
        found: dict[str, Any] = {}

        def keep(layer: str, module: nn.Module, given: Any, output: Any) -> None:
            found[layer] = output

        modules = [(layer, self.network.get_submodule(layer)) for layer in self._layers]
        hooks = [module.register_forward_hook(partial(keep, layer)) for layer, module in modules]
        try:
            self.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(map(found.get, self._layers))


TracedNetwork = tuple[fx.GraphModule | Taps, dict[str, fx.Node | None]]
"""A network and its layers by name, in order of execution; if it could not be traced, in order of definition."""


def trace(model: nn.Module, probe: torch.Tensor | None = None) -> TracedNetwork:
    """Return a network in eval mode as a graph with its nodes by name; if tracing fails, the network itself with its modules.

    probe : images, float32 of shape (n, 3, height, width), for which graph and network must have the same output
    """
    try:
        module, names = traced(model.eval())
        if probe is None or _same(module, model, probe):
            return module, names
        reason = "its graph computes something else"
    except Exception as error:  # a forward pass may run any Python code
        reason = first_line(error)
    logger.info("%s runs without a graph, as it cannot be traced: %s", type(model).__name__, reason)
    return Taps(model, ()), dict.fromkeys(name for name, _ in model.named_modules() if name)


def _same(module: fx.GraphModule, model: nn.Module, probe: torch.Tensor) -> bool:
    """Whether both have the same output; if the network itself fails, such as for a wrong image size, that is reported elsewhere."""
    with torch.inference_mode():
        try:
            expected = model(probe)
        except (RuntimeError, AssertionError, ValueError, BackboneError):
            return True
        found = module.forward(probe)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def traced(model: nn.Module) -> tuple[fx.GraphModule, dict[str, fx.Node | None]]:
    """Return the graph of a network in eval mode and its nodes by name; any exception if it cannot be traced."""
    from torchvision.models.feature_extraction import NodePathTracer

    # Like create_feature_extractor, except that torchvision's own blocks are traced too: otherwise the convolutions and
    # batch norms in them could not be folded.
    timm = sys.modules.get("timm.layers")  # only networks of an imported timm have its layers
    leaves = [nn.Linear, *timm.get_notrace_modules()] if timm else []
    tracer = NodePathTracer(
        autowrap_modules=(math, torchvision.ops),
        autowrap_functions=tuple(timm.get_notrace_functions()) if timm else (),
        leaf_modules=(*leaves, *getattr(model, "leaf_modules", ())),
    )
    graph = tracer.trace(model)
    names = {name: node for node, name in tracer.node_to_qualname.items() if node.op != "output"}
    module = fx.GraphModule(tracer.root, graph)
    if timm:
        calls = [(name, node) for name, node in names.items() if node.op == "call_module"]
        parts = [(name, node, module.get_submodule(str(node.target))) for name, node in calls]
        names |= {name: _decompose(module, node, part, timm) for name, node, part in parts}
        module.recompile()
    return module, names


def _decompose(module: fx.GraphModule, node: fx.Node, part: Any, timm: ModuleType) -> fx.Node:
    """Replace timm's norm with activation, or convolution with SAME padding, by torch's layers; return the last node of these."""
    plain: nn.Module
    if type(part) is timm.BatchNormAct2d and part.track_running_stats:
        plain = nn.BatchNorm2d(part.num_features, part.eps, device="meta")
        name = f"{node.target}_act"
        module.add_submodule(name, nn.Sequential(part.drop, part.act).eval())
        with module.graph.inserting_after(node):
            end = module.graph.call_module(name, (node,))
        node.replace_all_uses_with(end, delete_user_cb=lambda user: user is not end)
    elif type(part) is timm.Conv2dSame:
        sizes = part.kernel_size, part.stride, 0, part.dilation, part.groups
        plain = nn.Conv2d(part.in_channels, part.out_channels, *sizes, device="meta")
        with module.graph.inserting_before(node):
            given = (node.args[0], part.kernel_size, part.stride, part.dilation)
            node.args = (module.graph.call_function(timm.pad_same, given),)
        end = node
    else:
        return node
    for kind in ("_parameters", "_buffers"):
        getattr(plain, kind).update(getattr(part, kind))
    module.add_submodule(str(node.target), plain.eval())
    return end


def classifier(module: nn.Module) -> fx.Node:
    """Return the node that maps features to class scores: the last Linear, or if there is none the last Conv2d (squeezenet)."""
    nodes: Iterable[fx.Node] = reversed(module.graph.nodes) if isinstance(module, fx.GraphModule) else ()
    modules = dict(module.named_modules())
    calls = [node for node in nodes if node.op == "call_module"]
    for kind in (nn.Linear, nn.Conv2d):
        for node in calls:
            if isinstance(modules[str(node.target)], kind):
                return node
    raise BackboneError("a network without a linear or convolutional layer has no penultimate one; name a layer")


def classifier_name(model: nn.Module, graph: TracedNetwork) -> str:
    """Return the name of the module that maps features to class scores."""
    if not hasattr(model, "get_classifier"):
        return str(classifier(graph[0]).target)
    own = model.get_classifier()  # type: ignore[operator]  # timm's method
    return next((name for name, part in model.named_modules() if part is own), "")


def resolve(
    graph: TracedNetwork,
    asked: Sequence[str],
    has_classifier: bool = True,
    stages: Callable[[], Mapping[str, str]] = dict,
) -> list[str]:
    """Return the node of each requested layer, which may be a stage or `penultimate`, the network's own feature or classifier input.

    BackboneError with a line for every unknown layer, or for layers from the classifier on if the weights lack it.
    """
    module, names = graph
    by_node = {node: name for name, node in names.items()}
    found = {layer: _last_of(layer, names) for layer in asked}
    if PENULTIMATE in asked:
        own = POOLED in names
        found[PENULTIMATE] = POOLED if own else by_node.get(classifier(module).args[0])  # type: ignore[arg-type]
    if None in found.values():
        by_stage = stages()
        found = {layer: end or by_stage.get(layer) for layer, end in found.items()}
        known = [PENULTIMATE, *by_stage, *names]
        unknown = [f"no layer {layer!r}{guess(layer, known)}" for layer, end in found.items() if end is None]
        if unknown:
            raise BackboneError("layers that are not in the network, which `manyheads layers MODEL` lists", unknown)
    if not has_classifier and POOLED not in names:
        order = [*names]
        last = order.index(by_node[classifier(module)])
        late = [layer for layer, end in found.items() if order.index(str(end)) >= last]
        if late:
            raise BackboneError(f"the weights have no classifier, so no {', '.join(late)}; use layers: [{PENULTIMATE}]")
    return [str(found[layer]) for layer in asked]


def _last_of(layer: str, names: Iterable[str]) -> str | None:
    """Return the node of that name, or the last node in the module of that name: `layer4` is its output."""
    if layer in names:
        return layer
    return next((name for name in reversed(list(names)) if name.startswith(f"{layer}.")), None)


def shapes(graph: TracedNetwork, size: tuple[int, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the nodes that have an output per image, with its shape for one image of `size`."""
    module, names = graph
    n_images = 2  # tells the batch axis from axes of length 1, such as windows or heads
    images = torch.zeros(n_images, 3, *size)
    with torch.inference_mode():
        if isinstance(module, Taps):
            outputs = Taps(module.network, [*names])(images)
        else:
            ShapeProp(module).propagate(images)
            outputs = [node and node.meta.get("tensor_meta") for node in names.values()]
    found = []
    for name, output in zip(names, outputs, strict=True):
        shape = getattr(output, "shape", None)
        if isinstance(shape, torch.Size) and len(shape) > 1 and shape[0] == n_images:
            found.append((name, tuple(shape[1:])))
    return found


def cut(graph: TracedNetwork, layers: Sequence[str]) -> nn.Module:
    """Return the network truncated after the layers, with their outputs as a tuple and batch norms folded.

    Folding a batch norm into the preceding convolution changes features by about 1e-9 of their length (cosine, ResNet-50)
    and saves a pass over the activations. A convolution whose output is embedded, or used twice, is not changed.
    """
    module, names = graph
    if isinstance(module, Taps):
        return Taps(module.network, layers)
    kept = [node for layer in layers if (node := names[layer]) is not None]
    for node in list(module.graph.nodes):
        if node.op == "output":
            module.graph.erase_node(node)
    module.graph.output(tuple(kept))
    module.graph.eliminate_dead_code()
    if any(user.op != "output" for node in kept for user in node.users):
        # An in-place operation after an embedded layer, such as ReLU(inplace=True), would overwrite its output.
        for part in module.modules():
            if getattr(part, "inplace", False):
                part.inplace = False  # type: ignore[assignment]
        for node in module.graph.nodes:
            if node.kwargs.get("inplace"):
                node.update_kwarg("inplace", False)
    module.delete_all_unused_submodules()
    module.recompile()
    return fuse(module, inplace=True, no_trace=True)


def map_before(module: nn.Module, output: int, images: torch.Tensor) -> torch.Tensor | None:
    """Return the last map before one of the outputs, (n, channels, rows, columns) or channels last; None if there is none.

    images : of the network's dtype, as is the map, shape (n, 3, height, width)
    """
    if not isinstance(module, fx.GraphModule):
        return None
    module = fx.GraphModule(module, copy.deepcopy(module.graph))
    ShapeProp(module).propagate(images[:1])
    end = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    node = end.args[0][output]
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        shape: Sequence[int] = getattr(node.meta.get("tensor_meta"), "shape", ())
        if len(shape) == 4 and shape[2] > 1:
            end.args = (node,)
            module.graph.eliminate_dead_code()
            module.recompile()
            found: torch.Tensor = module(images)
            return found
    return None


# ---- stages


@dataclass(frozen=True)
class Stage:
    """A part of a network, named `stem`, `stage1` ... `stageN` or `head` in every family."""

    name: str
    modules: tuple[str, ...]
    """Names of its modules, in the order of definition."""
    end: str
    """The module whose output is the stage's: the last one with the same resolution as the first."""


def find_stages(network: nn.Module, size: tuple[int, int], head: str) -> tuple[Stage, ...]:
    """Return the stages of a network for images of `size` (height, width) pixels, the stem first, by one forward pass.

    Modules are split until all children of each end in one resolution; adjacent modules of equal resolution form a stage.
    Modules without a resolution (a transformer's blocks) are one stage each, except norms, which belong to the previous stage.
    `head` names the classifier, which is the last stage; '' for a network without one.
    """
    names = [name for name, _ in network.named_modules()]
    with torch.inference_mode():
        images = torch.zeros(1, 3, *size, device=next(network.parameters()).device)
        outputs = dict(zip(names, Taps(network.eval(), names)(images), strict=True))
    of_maps = {name for name, output in outputs.items() if isinstance(output, torch.Tensor) and output.ndim == 4}
    resolutions = {name: tuple(outputs[name].shape[-2:]) if name in of_maps else None for name in names}
    runs: list[list[str]] = []
    for name in _split(network, "", head, resolutions):
        same = runs and resolutions.get(name) is not None and resolutions[name] == resolutions.get(runs[-1][-1])
        part = network.get_submodule(name)
        opens_body = len(runs) == 1 and sum(isinstance(each, nn.Conv2d | nn.Linear) for each in part.modules()) > 1
        norm = len(runs) > 1 and all(parameter.ndim < 2 for parameter in part.parameters())
        if (same and not opens_body) or norm:
            runs[-1].append(name)
        else:
            runs.append([name])
    ends = [[part for part in run if resolutions.get(part) == resolutions.get(run[0])][-1] for run in runs]
    stages = [
        Stage(f"stage{number}" if number else "stem", tuple(run), end)
        for number, (run, end) in enumerate(zip(runs, ends, strict=True))
    ]
    return (*stages, Stage("head", (head,), head)) if head else tuple(stages)


def _split(network: nn.Module, name: str, head: str, resolutions: Mapping[str, tuple[int, ...] | None]) -> list[str]:
    """Return the modules that lie within one stage each, in order of definition, without the head.

    A module is split if it contains the head, if its children end in more than two resolutions (the first block of a stage
    has two), or, if it has most of the network's parameters, also if they end in two or, as in a transformer, in none.
    """
    module = network.get_submodule(name)
    if name == (head or None) or not _count(module):
        return []
    inside = [f"{name}.{child}".lstrip(".") for child, part in module.named_children() if _count(part)]
    ends = {resolutions.get(child) for child in inside}
    body = _count(network) - (_count(network.get_submodule(head)) if head else 0)
    most = 2 * _count(module) > body
    several = len(ends) > 1 or (ends == {None} and len(inside) > 1)
    if not name or head.startswith(f"{name}.") or len(ends) > 2 or (most and several):
        return [part for child in inside for part in _split(network, child, head, resolutions)]
    return [name]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def stage_ends(model: nn.Module, graph: TracedNetwork, size: tuple[int, int]) -> dict[str, str]:
    """Return the last node of each stage of a network by the stage's name, without the head."""
    try:
        head = classifier_name(model, graph)
    except BackboneError:
        head = ""
    stages = find_stages(model, size, head)
    ends = {stage.name: _last_of(stage.end, graph[1]) for stage in stages if stage.name != "head"}
    return {name: node for name, node in ends.items() if node is not None}


# ---- pooling


class Tokens(NamedTuple):
    """A transformer's extra tokens and its own pooling."""

    prefix: int = 0
    """Number of class and register tokens, which precede the patch tokens."""
    class_token: bool = False
    attention_pool: bool = False
    """Whether its own feature is pooled by attention, as in SigLIP."""
    own: str = ""
    """timm's name of its own pooling; '' if it is not a transformer of timm."""


def tokens_of(model: nn.Module) -> Tokens:
    """Return a network's tokens from the attributes that timm and torchvision use for them."""
    class_token = getattr(model, "cls_token", getattr(model, "class_token", None)) is not None
    prefix = getattr(model, "num_prefix_tokens", None)
    own = "" if prefix is None else str(getattr(model, "global_pool", ""))
    attention_pool = getattr(model, "attn_pool", None) is not None
    return Tokens(int(class_token) if prefix is None else prefix, class_token, attention_pool, own)


def source(layer: str, pooling: str, tokens: Tokens) -> str:
    """Return the layer to which a pooling is applied: for `penultimate` the tokens before it, unless the network pools in this way."""
    own = pooling in {"own", "map"} or (pooling == "cls" and tokens.own == "token")
    return UNPOOLED if layer == PENULTIMATE and tokens.own and not own else layer


def pool(output: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool the output of a layer into one vector per image: of the same dtype, shape (n, dim).

    Output of shape (n, dim) is not pooled. (n, channels, height, width) and (n, height, width, channels) are averaged or
    maximised over the image, (n, tokens, dim) over the tokens. `cls` takes the first token; `avg[5:]`, `max[5:]` and `cls+avg[5:]`
    exclude the first five tokens, which are not patches. `grid` averages over each cell of a 3 x 3 grid, which keeps coarse
    positions, as in spatial pyramid matching, Lazebnik et al. 2006.
    """
    pooling, _, prefix = pooling.rstrip(":]").partition("[")
    if output.ndim == 2:
        return output
    if pooling == "flatten":
        return output.flatten(1)
    if pooling == "cls":
        return output[:, 0]
    patches = output[:, int(prefix or 0) :]
    if pooling == "cls+avg":
        return torch.cat([output[:, 0], patches.mean(1)], 1)
    axes = _axes_of_places(output)
    if pooling == "grid":
        maps = output if axes == (2, 3) else output.permute(0, 3, 1, 2)
        if torch.onnx.is_in_onnx_export():  # ONNX has no average over cells of unequal size
            return (_cells(maps.shape[2]) @ maps @ _cells(maps.shape[3]).T).flatten(1)
        return torch.nn.functional.adaptive_avg_pool2d(maps, GRID).flatten(1)
    return patches.mean(axes) if pooling == "avg" else patches.amax(axes)


def _cells(length: int) -> torch.Tensor:
    """Return the matrix, float32 of shape (GRID, length), that averages over the cells of a side like `adaptive_avg_pool2d`."""
    ends = [(length * cell // GRID, -(-length * (cell + 1) // GRID)) for cell in range(GRID)]
    return torch.tensor([[(start <= at < stop) / (stop - start) for at in range(length)] for start, stop in ends])


def contributions(maps: torch.Tensor, pooling: str, weights: torch.Tensor) -> torch.Tensor:
    """Return the contribution of each map position to a linear score of the pooled vectors; their mean is the score.

    For average pooling this is the class activation map of Zhou et al. 2016; it is as exact for any linear or selecting pooling.

    maps : float32 of shape (n, channels, height, width), or channels last; weights : float32 of shape (n, dim), the score's weights
        for each image; returns float32 of shape (n, height, width)
    """
    maps, channels = maps.detach().requires_grad_(), 1 if _axes_of_places(maps) == (2, 3) else 3
    with torch.enable_grad():
        scores = (pool(maps, pooling) @ weights.T).sum(0)
        gradients = [torch.autograd.grad(score, maps, retain_graph=True)[0] for score in scores]
    cells = torch.stack([(maps.detach() * gradient).sum(channels) for gradient in gradients], dim=1)
    return cells * cells[0, 0].numel()


def _axes_of_places(output: torch.Tensor) -> tuple[int, ...]:
    """Return the axes over the image or the tokens; empty if they are ambiguous."""
    if output.ndim == 3:
        return (1,)
    _, a, b, c = output.shape
    if b == c:
        return (2, 3)  # channels first, as in most networks
    return (1, 2) if a == b else ()  # channels last, as in swin; crops are square


def effective_pooling(output: torch.Tensor, pooling: str, tokens: Tokens, layer: str) -> str:
    """Return the pooling that applies to a layer's output, `none` if that is already one vector.

    `own` becomes `avg` for unpooled output. An average or a maximum over patch tokens names the first of them, as in `avg[5:]`,
    if other tokens precede them. BackboneError if the pooling is not possible for the layer.

    output : a layer's output, of any dtype, shape (n, ...); only its shape is used
    """
    axes = _axes_of_places(output) if output.ndim in {3, 4} else ()
    why = ""
    if pooling in {"cls", "cls+avg"}:
        possible = tokens.class_token and output.ndim in ({2, 3} if pooling == "cls" else {3})
        why = "" if possible else "it has no class token"
    elif pooling == "map":
        possible = tokens.attention_pool and output.ndim == 2
        why = "" if possible else f"it needs a network with attention pooling, and layer {PENULTIMATE}"
    elif output.ndim > 2 and pooling != "flatten" and not axes:
        why = "its places cannot be distinguished from its channels"
    elif output.ndim > 2 and pooling == "grid" and (len(axes) == 1 or output.shape[axes[0]] < GRID):
        why = f"it has no map of at least {GRID} x {GRID} places"
    if why:
        shape = " x ".join(map(str, output.shape[1:]))
        raise BackboneError(f"layer {layer!r} gives {shape}, no pooling {pooling!r}: {why}; use avg, max or flatten")
    if output.ndim == 2:
        return "none"
    if pooling in {"flatten", "cls"}:
        return pooling
    pooling = "avg" if pooling == "own" else pooling
    patches = output.shape[1] - tokens.prefix
    # Where there are no prefix tokens yet, such as after the first layer, the remaining count is not a square.
    square = output.ndim == 3 and patches > 0 and math.isqrt(patches) ** 2 == patches
    return f"{pooling}[{tokens.prefix}:]" if square and tokens.prefix else pooling


# ---- rows: the embeddings of a network


@dataclass(frozen=True)
class EmbeddingRow:
    """One embedding of a network."""

    layer: str
    """The layer as named in the config."""
    pooling: str
    source: str
    """The layer to which the pooling is applied, by `source`."""
    node: str
    output: int
    """The index of the network's output; there is one for each layer and pooling of the config."""

    @property
    def words(self) -> list[str]:
        """The parts of its name after the network: the layer, and the pooling unless that is the usual one."""
        usual = {"none", "avg"} if self.source == self.layer else {"none"}
        shown = self.pooling.partition("[")[0]
        return [self.layer, *([] if shown in usual else [shown])]


def rows(
    graph: TracedNetwork, model: nn.Module, config: BackboneConfig, size: tuple[int, int], has_classifier: bool
) -> list[EmbeddingRow]:
    """Return a row for each layer and pooling of a config; errors are those of `resolve`."""
    tokens = tokens_of(model)
    asked = [(layer, pooling, source(layer, pooling, tokens)) for layer in config.layers for pooling in config.pooling]
    stages = partial(stage_ends, model, graph, size)
    nodes = resolve(graph, [found for _, _, found in asked], has_classifier, stages)
    return [EmbeddingRow(*each, node, output) for output, (each, node) in enumerate(zip(asked, nodes, strict=True))]


def effective(
    run: Callable[[], Sequence[object]], rows: Sequence[EmbeddingRow], tokens: Tokens, name: str, size: tuple[int, int]
) -> list[EmbeddingRow]:
    """Return the rows with the effective pooling, from the outputs of `run` for two images; warn of poolings that are not possible.

    BackboneError if the network cannot take the images, or if none of a layer's poolings is possible.
    """
    try:
        with torch.inference_mode():
            outputs = run()
    except (RuntimeError, AssertionError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        failure = f"{name} cannot take images of {size[0]} x {size[1]} pixels"
        raise BackboneError(f"{failure} ({first_line(error)}); change preprocessing.crop") from None
    found: dict[tuple[str, str], EmbeddingRow] = {}
    fitting: set[str] = set()
    refused: list[tuple[str, str]] = []
    for row in rows:
        output = outputs[row.output]
        if not isinstance(output, torch.Tensor) or output.ndim < 2 or len(output) != 2:
            raise BackboneError(f"layer {row.node!r} gives no tensor per image; `manyheads layers` lists those that do")
        try:
            pooling = effective_pooling(output, row.pooling, tokens, row.node)
        except BackboneError as error:
            refused.append((row.layer, error.message))
            continue
        fitting.add(row.layer)
        found.setdefault((row.node, pooling), replace(row, pooling=pooling))
    problems = [problem for layer, problem in refused if layer not in fitting]
    if problems:
        raise BackboneError("layers for which none of the given poolings is possible", problems)
    for _, problem in refused:
        logger.warning("left out: %s", problem)
    return list(found.values())
