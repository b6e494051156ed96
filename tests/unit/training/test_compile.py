import pytest
import torch

from mixmae.layers import attention
from mixmae.training.compile import compile_blocks
from mixmae.training.recompute import recompute_stages
from tests.factories import noise_images, seeded, tiny_mixmae


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, by a backend that runs them as they are."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiling(function, backend=backend, **options))
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("recomputed", [(), (1, 2)])
def test_for_a_gpu_blocks_of_a_stage_share_a_graph(monkeypatch, graphs, recomputed):
    """And no step compiles anew: the draws change, the shapes do not. Names stay as they are."""
    monkeypatch.setattr(attention, "on_cpu", lambda tensor: False)  # windows are masked and grids sorted as on a GPU
    plain, compiled = tiny_mixmae(num_images=2), tiny_mixmae(num_images=2)
    compile_blocks(compiled, torch.device("cuda"))
    recompute_stages(compiled, recomputed)
    images, names = noise_images(4), list(plain.state_dict())
    assert list(compiled.state_dict()) == names
    counts = []
    for seed in range(3):
        losses = [method(images, generator=seeded(seed)).loss for method in (plain, compiled)]
        losses[1].backward()
        torch.testing.assert_close(losses[1], losses[0])
        counts.append(len(graphs))
    stages = plain.encoder.stages
    assert counts == [len(stages)] * 3  # the decoder's only block is also its last, of which hidden tokens take a half
    assert sum(len(stage.blocks) for stage in stages) > len(stages)


def test_on_a_cpu_nothing_is_compiled(graphs):
    method = tiny_mixmae(num_images=2)
    compile_blocks(method, torch.device("cpu"))
    method(noise_images(4), generator=seeded()).loss.backward()
    assert graphs == []
