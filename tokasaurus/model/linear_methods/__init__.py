"""Linear methods: what keeps the tensors of a matrix product, and multiplies by them."""
