"""What is done to a finished training graph, before it is run; `graph_passes` lists it in order."""
