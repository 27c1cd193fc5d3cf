import types

import pytest
from megatron.energon import WorkerConfig

from wan_data.energon import pipeline
from wan_data.reading.loader import LoaderConfig, PackLoader


def workers(**changes):
    return pipeline.make_workers(**{"rank": 0, "world_size": 1, "num_workers": 0, "seed": 0, **changes})


def test_errors_are_let_through_by_whichever_handler_there_is(monkeypatch):
    def only(name):
        monkeypatch.setattr(pipeline, "_accepts", lambda function, asked: asked == name)

    only("global_error_handler")
    for_workers, for_maps = pipeline._raising()
    assert (list(for_workers), list(for_maps)) == (["global_error_handler"], [])
    only("error_handler")
    of_workers, of_maps = pipeline._raising()
    assert (list(of_workers), list(of_maps)) == ([], ["error_handler"])
    for handler in (*for_workers.values(), *of_maps.values()):
        for more in ((), ("sources",)):  # Energon 6 passes the sample only
            with pytest.raises(KeyError, match="bad"):
                handler(KeyError("bad"), "sample", *more)


def test_an_energon_that_would_leave_out_samples_is_refused(monkeypatch, dataset):
    monkeypatch.setattr(pipeline, "_accepts", lambda function, asked: False)
    with pytest.raises(
        ValueError, match=r"Megatron-Energon .* cannot be used: it takes no handler of errors and would"
    ):
        PackLoader(LoaderConfig(str(dataset), capacity=200), rank=0, world_size=1)


def right(self):
    """``rank_worker_id`` of Energon 6.0.1."""
    process = pipeline.torch.utils.data.get_worker_info()
    return (process.id + process.num_workers - self.worker_id_offset) % process.num_workers if process else 0


@pytest.mark.parametrize("energon", ["as installed", "as 6.0.1"])
def test_the_first_process_is_the_worker_whose_turn_it_is(monkeypatch, energon):
    if energon == "as 6.0.1":
        monkeypatch.setattr(WorkerConfig, "rank_worker_id", right)
    monkeypatch.setattr(WorkerConfig, "worker_id_offset", 1)
    found = []
    for process in range(3):
        info = types.SimpleNamespace(id=process, num_workers=3)
        monkeypatch.setattr("torch.utils.data.get_worker_info", lambda info=info: info)
        found.append(workers(num_workers=3).rank_worker_id())
    assert found == [1, 2, 0]
