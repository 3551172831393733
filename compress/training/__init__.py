"""The one training loop, and quantized weights as functions that take gradients."""
