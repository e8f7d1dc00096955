"""The block layer: what a node is, and how nodes make a graph.

Read `driver` first (what a driver may do), then `node` (what the layer does for every driver),
`graph` (how nodes are joined) and `backend` (how somebody uses one).
"""
