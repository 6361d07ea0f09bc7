"""Jraph's graph networks, graphs of several sizes batched by concatenation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from tests.outside.registry import Problem, cross_entropy, floats, integers, model, normal

NODES, EDGES, CLASSES = (4, 3, 3), (9, 8, 7), 5


def graphs() -> jraph.GraphsTuple:
    """Three random graphs, as one."""
    rng = np.random.default_rng(0)
    return jraph.batch(
        [
            jraph.GraphsTuple(
                nodes=normal(nodes, 3, seed=i),
                edges=normal(edges, 2, seed=10 + i),
                globals=normal(1, 2, seed=20 + i),
                senders=jnp.asarray(rng.integers(0, nodes, edges)),
                receivers=jnp.asarray(rng.integers(0, nodes, edges)),
                n_node=jnp.asarray([nodes]),
                n_edge=jnp.asarray([edges]),
            )
            for i, (nodes, edges) in enumerate(zip(NODES, EDGES, strict=True))
        ]
    )


class Mlp(nn.Module):
    widths: tuple

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def problem(module, graph, labels, logits) -> Problem:
    params = floats(module.init(jax.random.key(0), graph))

    def loss_fn(params, graph, labels):
        return cross_entropy(logits(module.apply(params, graph)), labels)

    return Problem(loss_fn, params, (graph, labels))


class GraphNetwork(nn.Module):
    @nn.compact
    def __call__(self, graph):
        for _ in range(2):
            edge, node, whole = Mlp((6, 4)), Mlp((6, 4)), Mlp((6, 4))
            graph = jraph.GraphNetwork(
                jraph.concatenated_args(edge),
                jraph.concatenated_args(node),
                jraph.concatenated_args(whole),
            )(graph)
        return graph._replace(globals=nn.Dense(CLASSES)(graph.globals))


@model("jraph: GraphNetwork")
def graph_network():
    labels = integers(CLASSES, len(NODES))
    return problem(GraphNetwork(), graphs(), labels, lambda graph: graph.globals)


@model("jraph: GraphNetwork, padded")
def graph_network_padded():
    """A last graph fills up to a fixed size, as jraph does for `jit`; its loss is masked."""
    graph = jraph.pad_with_graphs(graphs(), 16, 32, 5)
    module = GraphNetwork()
    params = floats(module.init(jax.random.key(0), graph))

    def loss_fn(params, graph, labels):
        outputs = nn.log_softmax(module.apply(params, graph).globals)
        mask = jraph.get_graph_padding_mask(graph)
        picked = jnp.take_along_axis(outputs, labels[:, None], 1)[:, 0]
        return -jnp.sum(jnp.where(mask, picked, 0)) / jnp.sum(mask)

    return Problem(loss_fn, params, (graph, integers(CLASSES, 5)))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, graph):
        for width in (6, CLASSES):
            graph = jraph.GraphConvolution(nn.Dense(width), add_self_edges=True)(graph)
        return graph


@model("jraph: graph convolutions")
def graph_convolutions():
    labels = integers(CLASSES, sum(NODES))
    return problem(Convolutions(), graphs(), labels, lambda graph: graph.nodes)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, graph):
        def logit(sent, received, edges):
            del edges
            both = jnp.concatenate([sent, received], -1)
            return nn.leaky_relu(nn.Dense(1, name="logit")(both))

        return jraph.GAT(nn.Dense(CLASSES, name="query"), logit)(graph._replace(edges=None))


@model("jraph: graph attention")
def graph_attention():
    labels = integers(CLASSES, sum(NODES))
    return problem(Attention(), graphs(), labels, lambda graph: graph.nodes)


class DeepSets(nn.Module):
    @nn.compact
    def __call__(self, graph):
        node, whole = Mlp((6, 4)), Mlp((6, CLASSES))
        return jraph.DeepSets(jraph.concatenated_args(node), whole)(graph)


@model("jraph: deep sets")
def deep_sets():
    labels = integers(CLASSES, len(NODES))
    return problem(DeepSets(), graphs(), labels, lambda graph: graph.globals)


class Interaction(nn.Module):
    @nn.compact
    def __call__(self, graph):
        edge, node = jraph.concatenated_args(Mlp((6, 4))), jraph.concatenated_args(Mlp((6, 3)))
        graph = jraph.InteractionNetwork(edge, node)(graph)
        return graph._replace(nodes=nn.Dense(CLASSES)(graph.nodes))


@model("jraph: interaction network")
def interaction():
    labels = integers(CLASSES, sum(NODES))
    return problem(Interaction(), graphs(), labels, lambda graph: graph.nodes)
