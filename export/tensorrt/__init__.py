"""The `tensorrt` target: an ONNX graph that TensorRT's parser takes, and a TensorRT-RTX engine built ahead of time.

No GPU is needed to build. Where TensorRT-RTX does not offer the chip's compute capability, the folder holds the graph
and the command that builds the engine on a machine that has the chip.
"""
