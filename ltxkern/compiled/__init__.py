"""Launch geometry of the compiled kernels, one module an op: from shapes alone to the steps that every compiled tier runs."""
