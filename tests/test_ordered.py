"""Sums in one order: what is asked of torch, and that it is taken back."""

import os

import pytest
import torch

from bytecap.model.determinism import ask_for_order, in_order, same_sums


def asked():
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_order_is_asked_for_on_a_gpu_and_taken_back(strict, before):
    start = asked()
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with same_sums("cuda", strict=strict):
            assert asked() == (True, not strict, False, strict, False)
        assert asked() == (*before, *start[2:])
        with same_sums("cpu", strict=strict):
            assert asked() == (*before, *start[2:])
    finally:
        torch.use_deterministic_algorithms(start[0], warn_only=start[1])


def test_what_knows_no_order_is_done_again_without_fused_attention():
    seen = []

    def work():
        seen.append(asked()[1])
        if not seen[-1]:
            raise RuntimeError("this does not have a deterministic implementation")
        return 7

    assert in_order("cuda", work) == 7
    assert seen == [False, True]


def test_other_errors_are_left_alone():
    def work():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_order("cuda", work)
    assert in_order("cpu", lambda: 3) == 3


def test_a_workspace_of_the_user_s_own_is_left(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    ask_for_order()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
