"""The shares of a cluster that the actors of a preparation take."""

import pytest

from wan_data.prepare.on_ray.layout import make_layout


def taken(stages, resource):
    return sum(stage.actors * getattr(stage, resource) for stage in stages)


@pytest.mark.parametrize(
    ("resources", "processes", "decoders"),
    [
        ({"CPU": 2.0}, None, None),
        ({"CPU": 3.0}, 2, 5),
        ({"CPU": 96.0, "GPU": 8.0}, None, None),
        ({"CPU": 96.0, "GPU": 8.0}, 24, 200),
        ({"CPU": 4.0, "GPU": 1.0}, 16, 1),
    ],
)
def test_all_actors_of_a_stage_have_room(resources, processes, decoders):
    layout = make_layout(resources, 1, "auto", processes, decoders)
    together = (layout.decode, layout.encode, layout.text, layout.write)
    gpus = resources.get("GPU", 0)
    assert layout.device == ("cuda" if gpus else "cpu")
    for stages in ((layout.probe,), together):
        assert taken(stages, "cpus") <= resources["CPU"]
        assert taken(stages, "gpus") <= gpus
        assert all(stage.actors >= 1 and (stage.cpus or stage.gpus) for stage in stages)
    assert layout.encode.actors == processes or layout.encode.actors == (gpus or 1)


def test_one_autoencoder_a_gpu_shares_it_with_the_texts():
    layout = make_layout({"CPU": 8.0, "GPU": 2.0}, 2, "cuda", None, None)
    assert layout.encode.gpus > 0.5, "two of them never come to one GPU"
    assert layout.encode.gpus + layout.text.gpus <= 1


@pytest.mark.parametrize(
    ("device", "processes", "message"),
    [
        ("cuda:1", None, "--device cuda:1 names a GPU of one machine"),
        ("cuda", None, "the Ray cluster has none"),
        ("cpu", 0, "--num-processes is 0; it must be at least 1"),
    ],
)
def test_what_a_cluster_has_not_is_refused(device, processes, message):
    with pytest.raises(ValueError, match=message):
        make_layout({"CPU": 2.0}, 1, device, processes, None)
