"""What is wrong with this machine or that TensorRT-LLM, and what to do about it. One check a module, all in one shape (`finding`)."""
