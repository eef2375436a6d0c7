"""Pure mathematics of bounds: no state, no model, nothing but tensors."""
