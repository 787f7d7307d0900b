"""Live models as ONNX graphs: which head, which wrapper, tracing, names, and the check against torch."""
