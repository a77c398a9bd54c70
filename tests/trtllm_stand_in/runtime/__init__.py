"""What the generated classes do. Copied into the stand-in package as `tensorrt_llm._stand_in`; written by hand, apart from the facts."""
