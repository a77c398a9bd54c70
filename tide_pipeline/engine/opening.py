"""The engine that engine.toml asks for. The one place that knows there are two."""

from __future__ import annotations

from tide_pipeline.config import TideConfig
from tide_pipeline.engine.protocol import Engine, Sink
from tide_pipeline.engine_spec import EngineSpec
from tide_pipeline.errors import SettingsError

BACKENDS = ("embedded", "trtllm")


def open_engine(config: TideConfig, spec: EngineSpec, sink: Sink | None = None) -> Engine:
    """Not started. Raises SettingsError for a backend that is unknown, or is not installed."""
    if spec.backend == "embedded":
        from tide_pipeline.engine.embedded import EmbeddedEngine

        return EmbeddedEngine(config.engine_dir / spec.model, spec, config.serve, config.speculation, sink)
    if spec.backend == "trtllm":
        from tide_pipeline.engine.trtllm.engine import TrtllmEngine

        return TrtllmEngine(config, spec, sink)
    raise SettingsError(f"{config.engine_dir}/engine.toml: no engine for backend {spec.backend!r}; there are: {', '.join(BACKENDS)}")
