import pytest
import torch
from adaptkit_hra import HRA

from adaptkit import AdaptKitError
from adaptkit.testing import check_tuner


def test_hra_keeps_the_promises_of_a_tuner():
    check_tuner(HRA(r=4))


def test_hra_is_what_peft_calls_hra():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    W = model[0].weight.detach().clone()
    tuned = peft.get_peft_model(model, peft.HRAConfig(r=4, target_modules=["0"], init_weights=False))
    U = next(p for n, p in tuned.named_parameters() if "hra_u" in n).detach()

    merged = tuned.merge_and_unload()[0].weight

    assert torch.allclose(HRA(r=4).weight(W, {"U": U}), merged, atol=1e-6)


def test_odd_ranks_are_refused():
    with pytest.raises(AdaptKitError, match="even r"):
        HRA(r=3)
