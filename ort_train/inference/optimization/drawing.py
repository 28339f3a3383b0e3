"""A block of a graph before and after passes, as two SVG pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

#: More can't be read in a picture.
MAX_NODES = 48
_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 132, 26, 14, 26, 12
# Okabe and Ito's palette, as in the charts.
_PLAIN, _REMOVED, _ADDED = "#f2f2f2", "#f6c7a6", "#a8dcc9"
_SWEEPS = 8  # of the ordering; more change nothing


def choose_block(before: GraphProto, after: GraphProto, pattern: str | None) -> set[str] | None:
    """The tensors that the drawn nodes write.

    Args:
        pattern: part of the nodes' names or of what they write, such as layers.0/mlp; None: what
            lies around the first difference.

    Returns:
        None where there is no difference and no pattern.

    Raises:
        LookupError: the pattern fits nothing.
    """
    if pattern is not None:
        fits = [node for node in before.node if _named(node, pattern)]
        fits += [node for node in after.node if _named(node, pattern)]
        if not fits:
            raise LookupError(pattern)
        return {name for node in fits for name in node.output}
    own, new = (Counter(map(_signature, graph.node)) for graph in (before, after))
    for graph, other in ((before, new), (after, own)):
        for node in graph.node:
            if _signature(node) not in other:
                return _around(before, node) | _around(after, node)
    return None


def draw(graph: GraphProto, other: GraphProto, block: set[str], added: bool) -> str:
    """One picture.

    Args:
        graph: what is drawn.
        other: what it is compared with: nodes that the other hasn't are coloured.
        block: from `choose_block`.
        added: whether coloured nodes are new ones rather than ones that go.

    Returns:
        An <svg> element.
    """
    known = Counter(map(_signature, other.node))
    nodes = [node for node in graph.node if block.intersection(node.output)]
    # Constants are half of an exported graph, and say little: only those that change are drawn.
    nodes = [n for n in nodes if n.op_type != "Constant" or _signature(n) not in known][:MAX_NODES]
    rows = _rows(nodes)
    width = max((len(row) for row in rows), default=1) * (_BOX_WIDTH + _GAP_X) + 2 * _MARGIN
    height = len(rows) * (_BOX_HEIGHT + _GAP_Y) + 2 * _MARGIN
    corner: dict[int, tuple[float, float]] = {}
    for y, row in enumerate(rows):
        start = (width - len(row) * (_BOX_WIDTH + _GAP_X) + _GAP_X) / 2
        for x, index in enumerate(row):
            corner[index] = (
                start + x * (_BOX_WIDTH + _GAP_X),
                _MARGIN + y * (_BOX_HEIGHT + _GAP_Y),
            )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-family="system-ui, sans-serif" font-size="12">'
    ]
    for source, target in _edges(nodes):
        x1, x2 = corner[source][0] + _BOX_WIDTH / 2, corner[target][0] + _BOX_WIDTH / 2
        y1, y2 = corner[source][1] + _BOX_HEIGHT, corner[target][1]
        middle = (y1 + y2) / 2
        parts.append(
            f'<path d="M{x1:.0f} {y1:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} '
            f'{x2:.0f} {y2:.0f}" fill="none" stroke="#909090"/>'
        )
    for index, node in enumerate(nodes):
        left, top = corner[index]
        differs = _signature(node) not in known
        fill = (_ADDED if added else _REMOVED) if differs else _PLAIN
        parts.append(
            f"<g><title>{escape(node.name or node.output[0])}</title>"
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" '
            f'rx="4" fill="{fill}" stroke="#606060"/>'
            f'<text x="{left + _BOX_WIDTH / 2:.0f}" y="{top + 17:.0f}" text-anchor="middle">'
            f"{escape(_label(node))}</text></g>"
        )
    return "\n".join([*parts, "</svg>"])


def _label(node: NodeProto) -> str:
    return (
        node.op_type if len(node.op_type) <= 20 else f"{node.op_type[:19]}\N{HORIZONTAL ELLIPSIS}"
    )


def _named(node: NodeProto, pattern: str) -> bool:
    return pattern in node.name or any(pattern in name for name in node.output)


def _signature(node: NodeProto) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    return node.op_type, tuple(node.input), tuple(node.output)


def _around(graph: GraphProto, center: NodeProto) -> set[str]:
    """What the nodes near one write, those next to it first, until the picture is full."""
    touching = defaultdict(list)
    for node in graph.node:
        if node.op_type != "Constant":
            for name in (*node.input, *node.output):
                touching[name].append(node)
    block: set[str] = set(center.output)
    edge, drawn = [center], 1
    while edge and drawn < MAX_NODES // 2:
        following = []
        for node in edge:
            for name in (*node.input, *node.output):
                for near in touching[name]:
                    if not block.issuperset(near.output) and drawn < MAX_NODES // 2:
                        block.update(near.output)
                        following.append(near)
                        drawn += 1
        edge = following
    return block


def _edges(nodes: Sequence[NodeProto]) -> Iterable[tuple[int, int]]:
    writer = {name: index for index, node in enumerate(nodes) for name in node.output}
    for index, node in enumerate(nodes):
        for name in dict.fromkeys(node.input):
            if name in writer:
                yield writer[name], index


def _rows(nodes: Sequence[NodeProto]) -> list[list[int]]:
    """Nodes in layers: each below all it reads, beside its neighbours (Sugiyama's barycenters)."""
    edges = list(_edges(nodes))
    level = [0] * len(nodes)
    for _ in nodes:  # a graph's nodes are in order, so that mostly one round is enough
        moved = False
        for source, target in edges:
            if level[target] <= level[source]:
                level[target], moved = level[source] + 1, True
        if not moved:
            break
    rows: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
    for index in range(len(nodes)):
        rows[level[index]].append(index)
    near = defaultdict(list)
    for source, target in edges:
        near[source].append(target)
        near[target].append(source)
    place = {index: x / max(len(row), 1) for row in rows for x, index in enumerate(row)}
    for _ in range(_SWEEPS):
        for row in rows:
            row.sort(key=lambda i: sum(place[j] for j in near[i]) / len(near[i]) if near[i] else 0)
            for x, index in enumerate(row):
                place[index] = (x + 0.5) / len(row)
    return rows
