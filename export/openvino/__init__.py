"""The `openvino` target: a folder with openvino_model.xml and .bin that OpenVINO runs on a CPU.

The captured graph goes through the lowerings of the onnx target's structure, in standard operators, into OpenVINO's own
form; the weights are put in there, in the types that its kernels take.
"""
