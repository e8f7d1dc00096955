"""Where bytes live: drivers at the bottom of the graph."""
