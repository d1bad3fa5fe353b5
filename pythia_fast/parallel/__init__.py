"""Many processes: the mesh of ranks, and how a model, its data and its optimizer lie on it."""
