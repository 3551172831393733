"""Models as they come: folders, user's own modules, ONNX files; their parts without weights, and their weights."""
