"""Serving engines behind one protocol. `embedded` runs here; `trtllm` runs where TensorRT-LLM does."""
