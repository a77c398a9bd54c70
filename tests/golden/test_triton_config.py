"""The rendered Triton model repository, byte for byte."""

from __future__ import annotations

from pathlib import Path

from tide_pipeline.config import ServeSettings, TideConfig
from tide_pipeline.serve.repository import handed_over, render_config, render_model_repository, triton_queue_size

GOLDEN = Path(__file__).parent / "triton_config.pbtxt"


def test_config_pbtxt_is_the_golden_one() -> None:
    assert render_config(TideConfig(), "replica-0", Path("/etc/tide/tide.toml")) == GOLDEN.read_text()


def test_repository_layout(tmp_path: Path) -> None:
    place = render_model_repository(TideConfig(engine="tiny"), tmp_path / "repository", replica="r1", config_file=Path("/etc/tide/tide.toml"))
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == ["tiny/1/model.py", "tiny/config.pbtxt"]
    assert 'name: "tiny"' in (place / "tiny" / "config.pbtxt").read_text()
    compile((place / "tiny" / "1" / "model.py").read_text(), "model.py", "exec")


def test_waiting_requests_add_up_to_queue_size() -> None:
    for queue_size in (3, 4, 8, 64):
        serve = ServeSettings(queue_size=queue_size)
        assert handed_over(serve) + 1 + triton_queue_size(serve) == queue_size
    assert triton_queue_size(ServeSettings(queue_size=1)) == 1                 # 0 would be no limit at all
