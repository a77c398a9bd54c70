"""The Triton face of the engine: model repository, model, draft agent, supervisor and HTTP client."""
