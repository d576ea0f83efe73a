"""From PyTorch to ONNX graphs: trace, passes, rewrite."""
