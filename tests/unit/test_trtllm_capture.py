"""What lies between a pass and the sink: shipments over two threads, the order of a batch, a draft put in place. Nothing of NVIDIA's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.unit.test_taps import HeldCopier
from tide_pipeline.contracts import EngineBuild, GenerationRequest, SamplingParams
from tide_pipeline.engine.memory import RING_SLOTS
from tide_pipeline.engine.trtllm.capture import DUMMY, Batch, PassTap, Prepared, arrange, read_batch
from tide_pipeline.engine.trtllm.facts import load_table
from tide_pipeline.engine.trtllm.in_place import load_draft
from tide_pipeline.engine.trtllm.layout import Context, Forward
from tide_pipeline.engine.trtllm.sampling import Totals, sampling_arguments, totals
from tide_pipeline.engine.trtllm.shipment import Shipment, Shipper
from tide_pipeline.errors import BuildError, RestartNeeded

CPU = torch.device("cpu")


# --- shipments ---------------------------------------------------------------------------------------------------

def ship(shipper: Shipper, number: int, rows: int = 2) -> Shipment:
    return shipper.ship(torch.full((rows, 6), float(number), dtype=torch.bfloat16), [torch.tensor([[number, -1]]), torch.tensor([3])])


def test_a_full_ring_drops_states_and_never_tokens() -> None:
    copier = HeldCopier()
    shipper = Shipper(4, 2, 3, CPU, copier)
    shipped = [ship(shipper, number) for number in range(RING_SLOTS + 2)]
    assert [s.handle is None for s in shipped] == [False] * RING_SLOTS + [True, True] and shipper.ring.dropped_rows == 4
    assert not any(s.is_ready() for s in shipped)
    for number, shipment in enumerate(shipped):
        copier.end(len(copier.copies))
        assert shipment.is_ready() and shipment.numbers() == [[[number, -1]], [3]]
        if shipment.handle is not None:
            assert bool((shipper.ring.rows(shipment.handle) == number).all())
        shipment.release()
    assert ship(shipper, 99).handle is not None


def test_a_pass_wider_than_the_ring_keeps_its_tokens() -> None:
    shipper = Shipper(4, 2, 3, CPU)
    wide = ship(shipper, 7, rows=5)
    assert wide.handle is None and wide.is_ready() and wide.numbers()[0] == [[7, -1]] and shipper.ring.dropped_rows == 5
    assert ship(shipper, 8).handle is not None


def test_tokens_beyond_bf16_arrive_as_they_are() -> None:
    ids = torch.tensor([[0, 1, 65_535, 151_935, 2**31 - 1, -1]])
    assert Shipper(4, 2, 3, CPU).ship(torch.zeros(1, 6), [ids]).numbers() == [ids.tolist()]


# --- a batch -----------------------------------------------------------------------------------------------------

def request(number: int, tokens: int = 0, start: int = 0, size: int = 0, is_dummy: bool = False) -> SimpleNamespace:
    return SimpleNamespace(py_request_id=2_000 + number, py_client_id=number, is_dummy=is_dummy, context_current_position=start,
                           context_chunk_size=size, get_tokens=lambda beam: list(range(tokens)))


def test_a_batch_is_read_and_put_in_the_order_of_its_rows() -> None:
    scheduled = SimpleNamespace(context_requests=[request(1, 10, 4, 3), request(2, 5, 0, 5)],
                                generation_requests=[request(3), request(4), request(9, is_dummy=True)])
    batch = read_batch(scheduled)
    assert batch == Batch({2_001: Context(1, 4, (4, 5, 6), False), 2_002: Context(2, 0, (0, 1, 2, 3, 4), True)}, {2_003: 3, 2_004: 4})
    forward = arrange(batch, Prepared(None, (2_002, 2_001, 2_004, 2_009, 2_003, 2_010), 2))
    assert [c.request for c in forward.contexts] == [2, 1] and forward.generations == (4, DUMMY, 3) and forward.num_rows == 8 + 3 * 3
    assert isinstance(forward, Forward)


@pytest.mark.parametrize("ids", [(2_003, 2_001), (2_001,), (2_001, 2_009), ()])
def test_rows_in_another_order_are_no_layout_of_ours(ids: tuple[int, ...]) -> None:
    batch = Batch({2_001: Context(1, 0, (0,), True)}, {2_003: 3})
    with pytest.raises(ValueError, match="not in the order"):
        arrange(batch, Prepared(None, ids, 2))


class Ear:
    """Hears why capture ended."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def on_pass(self, forward: Forward, shipment: Shipment, began: float) -> None:
        raise AssertionError("an empty pass is nobody's")

    def on_broken(self, why: str) -> None:
        self.broken.append(why)


def test_a_pass_goes_through_whatever_the_server_calls_its_batch() -> None:
    def original(engine: Any, batch: Any, resources: Any = None) -> tuple[Any, Any]:
        return batch, resources

    ear = Ear()
    tap = PassTap(load_table("1.4"), Shipper(4, 2, 3, CPU), ear, 3)
    forward, empty = tap._around_forward(original), SimpleNamespace(context_requests=[], generation_requests=[])
    tap.is_on = True
    assert forward(None, empty, 1) == forward(None, empty, resources=1) == forward(None, resources=1, batch=empty) == (empty, 1)
    assert tap.is_on and not ear.broken
    assert forward(None, batch="packed", resources=1) == ("packed", 1)         # not ours to read: capture ends, the pass does not
    assert not tap.is_on and len(ear.broken) == 1 and tap.faults == 1


# --- a draft put in place ----------------------------------------------------------------------------------------

class Served(nn.Module):
    """A target with its draft, as named in NVIDIA's model: the fields that matter."""

    def __init__(self, weights: dict[str, Tensor], takes: bool = True) -> None:
        super().__init__()
        self.draft_model = nn.Module()
        self.draft_model.fc = nn.Linear(weights["fc.weight"].shape[1], weights["fc.weight"].shape[0], bias=False, dtype=torch.bfloat16)
        self.takes = takes

    def load_draft_weights(self, weights: dict[str, Tensor]) -> None:
        if self.takes:
            self.draft_model.fc.weight.copy_(weights["fc.weight"])


def engine_with(weights: dict[str, Tensor], **how: Any) -> SimpleNamespace:
    engine = SimpleNamespace(model_engine=SimpleNamespace(model=Served(weights, **how)), resets=0)
    engine.reset_prefix_cache = lambda: setattr(engine, "resets", engine.resets + 1)
    return engine


def test_a_draft_put_in_place_is_read_back(tiny_build: EngineBuild) -> None:
    folder = str(Path(tiny_build.path) / "draft")
    weights = load_file(f"{folder}/model.safetensors")
    engine = engine_with(weights)
    load_draft(engine, folder, tiny_build.draft_digest)
    assert torch.equal(engine.model_engine.model.draft_model.fc.weight, weights["fc.weight"].bfloat16()) and engine.resets == 1
    with pytest.raises(BuildError, match="was not taken"):
        load_draft(engine_with(weights, takes=False), folder, tiny_build.draft_digest)
    with pytest.raises(BuildError, match="altered"):
        load_draft(engine, folder, "0" * 64)
    engine.model_engine.model.draft_model.fc = nn.Linear(2, 2)
    engine.model_engine.model.load_draft_weights = lambda weights: None
    with pytest.raises(BuildError, match="can't be found"):
        load_draft(engine, folder, tiny_build.draft_digest)


def test_another_draft_vocabulary_needs_another_server(tiny_build: EngineBuild) -> None:
    folder = str(Path(tiny_build.path) / "draft")
    weights = load_file(f"{folder}/model.safetensors")
    if "d2t" not in weights:
        pytest.skip("this draft has the whole vocabulary")
    engine = engine_with(weights)
    engine.model_engine.model.draft_model.register_buffer("d2t", weights["d2t"] + 1)
    with pytest.raises(RestartNeeded):
        load_draft(engine, folder, tiny_build.draft_digest)


# --- requests and totals -----------------------------------------------------------------------------------------

def test_greedy_requests_leave_sampling_unset() -> None:
    greedy = sampling_arguments(GenerationRequest("a", "x", SamplingParams(max_tokens=5)), (7, 8))
    assert greedy["end_id"] == 7 and greedy["stop_token_ids"] == [8] and not {"temperature", "top_p", "top_k", "seed"} & greedy.keys()
    sampled = sampling_arguments(GenerationRequest("a", "x", SamplingParams(temperature=0.8, top_k=5, seed=3, ignore_eos=True)), (7, 8))
    assert (sampled["temperature"], sampled["top_k"], sampled["seed"], sampled["ignore_eos"]) == (0.8, 5, 3, True)
    assert "stop_token_ids" not in sampled


@pytest.mark.parametrize("how", [SamplingParams(temperature=0.8), SamplingParams(temperature=0.8, top_k=5),
                                 SamplingParams(temperature=0.8, top_p=0.9)])
def test_a_temperature_is_never_sent_alone(how: SamplingParams) -> None:
    """With neither top_k nor top_p TensorRT-LLM decodes greedily, whatever the temperature."""
    assert sampling_arguments(GenerationRequest("a", "x", how), ())["top_p"] == how.top_p


def output(average: float | None, drafted: int = 0) -> Any:
    metrics = SimpleNamespace(speculative_decoding=SimpleNamespace(total_draft_tokens=drafted))
    return SimpleNamespace(avg_decoded_tokens_per_iter=average, outputs=[SimpleNamespace(request_perf_metrics=metrics)])


def test_totals_are_the_servers_where_it_counts() -> None:
    counted = Totals(6, 6, 18, 4)
    assert totals(output(None), 11, 3, counted) == counted
    assert totals(output(11 / 6), 11, 3, counted) == Totals(5, 5, 18, 5)       # six iterations, the prompt's among them
    assert totals(output(11 / 6, drafted=15), 11, 3, counted) == Totals(5, 5, 15, 5)
    assert totals(output(1.0), 11, 0, Totals(10, 0, 0, 0)) == Totals(10, 0, 0, 0)
    assert totals(SimpleNamespace(), 11, 3, counted) == counted
