"""From weights to integers: choosing scales, GPTQ, and the linear layer that holds the integers."""
