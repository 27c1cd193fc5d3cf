"""A session sees a GPU only if all of its tests need one, and a process that has used it forks no other."""

import os

import pytest
import torch

from wan_model.testing import devices, processes


@pytest.mark.parametrize("expression", ["", "rounding", "not gpu", "rounding and not gpu"])
def test_gpus_are_hidden(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.hide_gpus(expression)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("expression", ["gpu", "(gpu)", "gpu and rounding"])
def test_tests_that_need_one_see_it(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert not devices.hide_gpus(expression)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_this_session_is_one_of_them() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_no_fork_after_cuda_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    forked = []
    monkeypatch.setattr(os, "fork", lambda: forked.append(1) or 1)
    assert processes._fork({}) == 1
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=r"^CUDA is initialised in this process, and a forked one could not use it"):
        processes._fork({})
    assert len(forked) == 1
