"""Serving on TensorRT-LLM: the LLM API where it is enough, one private mechanism for capture. Imports tensorrt_llm only when it opens."""
