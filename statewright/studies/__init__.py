"""The experiments of the papers, as cells that a run fills one by one and may resume."""
