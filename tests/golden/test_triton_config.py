"""The rendered Triton model repository, byte for byte."""

from __future__ import annotations

from pathlib import Path

from tide_pipeline.config import ServeSettings, TideConfig
from tide_pipeline.serve.repository import handed_over, render_config, render_model_repository, triton_queue_size

GOLDEN = Path(__file__).parent / "triton_config.pbtxt"


def test_config_pbtxt_is_the_golden_one() -> None:
    assert render_config(TideConfig(), "replica-0", Path("/etc/tide/tide.toml")) == GOLDEN.read_text()


def test_repository_layout(tmp_path: Path) -> None:
    place = render_model_repository(TideConfig(engine="tiny"), tmp_path / "repository", replica="r1", config_file=Path("/etc/tide.toml"))
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == ["tiny/1/model.py", "tiny/config.pbtxt"]
    assert 'name: "tiny"' in (place / "tiny" / "config.pbtxt").read_text()
    compile((place / "tiny" / "1" / "model.py").read_text(), "model.py", "exec")


def test_a_burst_of_queue_size_is_taken_and_few_wait_in_the_engine() -> None:
    assert (triton_queue_size(ServeSettings(queue_size=8)), triton_queue_size(ServeSettings(queue_size=0))) == (8, 1)   # 0: no limit at all
    for queue_size in (1, 4, 64):
        assert 1 <= handed_over(ServeSettings(queue_size=queue_size, max_batch=8)) <= min(8, queue_size)
