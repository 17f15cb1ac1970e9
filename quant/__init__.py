"""From weights to integers: searching scales, GPTQ, and the linear layer that holds the result."""
